"""Templates and what every page is given; errors as pages."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import jinja2
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from hellm.serve.errors import Overloaded, RequestError
from hellm.serve.page.charts import number
from hellm.serve.page.reasons import basis_in_words, reason_in_words

__all__ = ["PageRoute", "error_page", "render", "wants_page"]

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "count": "{:,}".format,
    "percent": "{:.0%}".format,
    "number": number,
    "signed": lambda value: f"{value:+.4f}".replace("-", "\N{MINUS SIGN}"),
    "day": lambda seconds: f"{datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc):%d %b %Y}",
    "reason": reason_in_words,
    "basis": basis_in_words,
}
_TITLES = {401: "Sign in", 404: "Not found", 503: "Not now"}


def render(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """A page.

    Args:
        request: What asks for it.
        template: A file of `templates/`.
        status: Of the answer.
        **values: What the template needs, beside `path`, `has_key` (whether one can sign out) and `receipt`.
    """
    state = request.app.state
    values = {
        "path": request.url.path,
        "has_key": state.settings.api_key is not None,
        "receipt": state.service.snapshot.receipt(),
        **values,
    }
    html = _ENVIRONMENT.get_template(template).render(values)
    # Pages show customers, so nothing between here and the reader may keep them.
    return HTMLResponse(html, status, headers={"Cache-Control": "no-store"})


def wants_page(request: Request) -> bool:
    """Whether a person looks at the answer."""
    return "text/html" in request.headers.get("accept", "")


def error_page(request: Request, status: int, message: str, nearest: list[str] | None = None) -> Response:
    """What went wrong, in words."""
    title = _TITLES.get(status, "This does not work")
    page = render(request, "error.html", status, title=title, message=message, nearest=nearest or [])
    # Where htmx has asked for a part of a page, this takes the place of all of it.
    page.headers.update({"HX-Retarget": "#content", "HX-Reselect": "#content", "HX-Reswap": "outerHTML"})
    return page


class PageRoute(APIRoute):
    """A route whose errors are pages: `APIRouter(route_class=PageRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await answer(request)
            except RequestError as error:
                return error_page(request, error.status, error.message, error.nearest)
            except Overloaded as error:
                page = error_page(request, 503, error.message)
                page.headers["Retry-After"] = str(error.retry_after)
                return page
            except RequestValidationError as error:
                first = error.errors()[0]
                return error_page(request, 422, f"{first['loc'][-1]}: {first['msg']}")
            except HTTPException as error:
                return error_page(request, error.status_code, str(error.detail))

        return handler
