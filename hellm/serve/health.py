"""Whether the process lives, whether it answers, and how it is doing."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from hellm.serve.readiness import check_operators

__all__ = ["Readiness", "prepare", "router"]

logger = logging.getLogger(__name__)

router = APIRouter(tags=["health"])
# Whoever starts and watches processes has no key.
_OPEN = {"security": []}


@dataclass
class Readiness:
    """How far the start has come.

    Attributes:
        is_ready: Requests are answered.
        state: In words.
    """

    is_ready: bool = False
    state: str = "starting"


async def prepare(app: FastAPI) -> None:
    """Check the operators and warm up; then requests are answered."""
    readiness, service, loop = app.state.readiness, app.state.service, asyncio.get_running_loop()
    try:
        if not app.state.settings.skip_selftest:
            readiness.state = "checking the operators"
            await loop.run_in_executor(None, check_operators)
        readiness.state = "warming up"
        app.openapi()
        await loop.run_in_executor(None, service.warm_up)
    except Exception as error:
        readiness.state = f"not able to serve: {error}"
        logger.error("%s", readiness.state)
        return
    readiness.is_ready, readiness.state = True, "ready"


@router.get("/health/live", openapi_extra=_OPEN)
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/health/ready", openapi_extra=_OPEN, responses={503: {"description": "Not yet, or not any more."}})
async def ready(request: Request) -> Response:
    """The operators have passed their self-test, and the model has been asked once."""
    readiness = request.app.state.readiness
    body: dict[str, Any] = {"status": readiness.state, **request.app.state.service.snapshot.receipt()}
    return JSONResponse(body, 200 if readiness.is_ready else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=request.app.state.metrics.content_type)
