"""`create_app`: the application, put together."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import hellm
from hellm.serve import health, routes
from hellm.serve.errors import Overloaded, RequestError
from hellm.serve.guard import Guard
from hellm.serve.metrics import Metrics
from hellm.serve.page import add_page
from hellm.serve.page.catalogue import Catalogue
from hellm.serve.schema import ItemRequest
from hellm.serve.service import Service, Source
from hellm.serve.settings import Settings
from hellm.serve.store import Store

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

_DESCRIPTION = "Recommendations from a finished run. Every answer names the run that it comes from."


def create_app(
    source: Source,
    store: Store | None = None,
    settings: Settings | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
) -> FastAPI:
    """An ASGI application that serves a run.

    `app.state` holds `service` (`hellm.serve.service.Service`, by which every route asks), `metrics` and `settings`.

    Args:
        source: Where the run is.
        store: Where events and items are kept; None takes none.
        settings: Limits; None is `Settings()`.
        data: The data set of the run, for the page: pictures, and what deserves a look in it.
    Raises: As `hellm.serve.state.load_snapshot` and `hellm.serve.page.catalogue.Catalogue.load`.
    """
    settings, metrics = settings or Settings(), Metrics()
    service = Service(source, store, settings, metrics)
    catalogue = None if data is None else Catalogue.load(data, service.snapshot.recommender.item_ids)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.open()
        preparing = asyncio.get_running_loop().create_task(health.prepare(app))
        try:
            yield
        finally:
            preparing.cancel()
            await asyncio.gather(preparing, return_exceptions=True)
            await service.close()
            app.state.shop.pictures.close()

    # Their pages load scripts from elsewhere.
    app = FastAPI(
        title="hellm",
        version=hellm.__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service, app.state.settings, app.state.metrics = service, settings, metrics
    app.state.readiness = health.Readiness()
    app.include_router(health.router, responses={status: routes.REFUSALS[status] for status in (401, 403, 408, 413)})
    app.include_router(routes.router)
    add_page(app, catalogue)
    _add_error_handlers(app)
    app.openapi = lambda: _description(app)
    app.add_middleware(Guard, settings=settings, metrics=metrics, readiness=app.state.readiness)
    return app


def _description(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with what a route reads by itself, as it comes in two forms."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = app.openapi_schema["components"]["schemas"]
        schemas["ItemRequest"] = ItemRequest.model_json_schema()
    return app.openapi_schema


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def _refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(Overloaded)
    async def _overloaded(request: Request, error: Overloaded) -> Response:
        body = RequestError(503, error.message).body()
        return JSONResponse(body, 503, headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"errors": [_told(one) for one in error.errors()[:20]]}, 422)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        return JSONResponse(RequestError(error.status_code, str(error.detail)).body(), error.status_code, error.headers)


def _told(error: dict[str, Any]) -> dict[str, Any]:
    """What pydantic finds wrong, as `RequestError.body` says it; what was given may be long, so it is not repeated.

    The first part of a place says whether it is in the body, the path or the query.
    """
    place = error["loc"][1:]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return {"field": field or None, "message": str(error["msg"]).removeprefix("Value error, "), "nearest": []}
