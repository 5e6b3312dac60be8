"""What stands before every route: who may ask, how much, and how fast; and what is counted and logged of it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import logging
import time
from collections.abc import Iterator
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hellm.serve.errors import RequestError
from hellm.serve.health import Readiness
from hellm.serve.metrics import Metrics
from hellm.serve.page.rendering import error_page, wants_page
from hellm.serve.page.sign_in import COOKIE, is_good
from hellm.serve.settings import Settings

__all__ = ["KEY_SCHEMES", "Guard"]

logger = logging.getLogger(__name__)

# For whoever starts and watches processes: no key, and answered before the server is ready.
_OPEN = ("/health/live", "/health/ready")
_BEFORE_READY = (*_OPEN, "/metrics", "/openapi.json")
# What a browser needs before it can bring the key; none of it tells anything.
_SIGN_IN = ("/sign-in", "/static/style.css", "/static/icon.svg", "/static/htmx.min.js")
_SAFE = ("GET", "HEAD", "OPTIONS")
# Of every answer. Nothing but this server is asked by a page, no script stands in one, and no other site shows it.
_HEADERS = Headers(
    {
        "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
).raw


class Guard:
    """ASGI middleware, the outermost of an application.

    A request is refused without a look at its body where that is possible. Its body is read as a whole, within a size
    and a time, before a route sees it; so a slow client holds a connection and nothing else. What is logged is the
    route, never an id, a title, an address or a key.

    Args:
        app: What it stands before.
        settings: Key, hosts and limits.
        metrics: Where requests are counted.
        readiness: Whether requests are answered yet.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, readiness: Readiness) -> None:
        self.app, self.settings, self.metrics, self.readiness = app, settings, metrics, readiness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self.app(scope, _replay(body, receive), counted_send)
        except RequestError as error:
            headers = {"WWW-Authenticate": 'Basic realm="hellm"'} if error.status == 401 else {}
            headers |= {"Retry-After": "5"} if error.status == 503 else {}
            # What was not read of a body would be taken for the next request.
            headers |= {"Connection": "close"}
            await _refusal(scope, error, headers)(scope, receive, counted_send)
        except _ClientGoneError:
            status = 499
        except Exception:
            logger.exception("a request to %s failed", _route(scope))
            if status:
                raise
            body = RequestError(500, "an error inside hellm; its log says more").body()
            await JSONResponse(body, 500)(scope, receive, counted_send)
        finally:
            self._count(scope, status, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        """Raises: RequestError, for what the head of a request tells."""
        headers, path, settings = Headers(scope=scope), scope["path"], self.settings
        host = _host_name(headers.get("host", ""))
        if settings.allowed_hosts is not None and host not in settings.allowed_hosts:
            raise RequestError(
                403, "the server does not answer for this host; --allowed-host names others", field="host"
            )
        if scope["method"] not in _SAFE:
            # A page of another site can make a browser send a form here, with the key that the browser knows.
            origin = headers.get("origin")
            if headers.get("sec-fetch-site") in ("cross-site", "same-site") or (
                origin is not None and urlsplit(origin).netloc != headers.get("host")
            ):
                raise RequestError(403, "must not be sent by a page of another site", field="origin")
        if path in _OPEN:
            return
        if settings.api_key is not None and path not in _SIGN_IN and not self._has_key(headers):
            raise RequestError(401, "needs the API key, as X-API-Key, as a bearer token or as the password of any user")
        if not self.readiness.is_ready and path not in _BEFORE_READY:
            raise RequestError(503, f"not ready: {self.readiness.state}")

    def _has_key(self, headers: Headers) -> bool:
        expected = (self.settings.api_key or "").encode()
        # All are compared, each in a time that does not depend on where it differs.
        given = any([hmac.compare_digest(given.encode(), expected) for given in _keys(headers)])
        cookie = _cookie(headers)
        return given or (cookie is not None and is_good(cookie, self.settings.api_key or ""))

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Raises: RequestError, too large or too slow."""
        most = self.settings.max_body
        length = Headers(scope=scope).get("content-length")
        if length is not None and (not length.isdecimal() or int(length) > most):
            raise RequestError(
                413, f"a request must have at most {most} bytes, got {length[:20]}", field="content-length"
            )
        parts, size, more = [], 0, True
        with _time_limit(self.settings.body_timeout):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise RequestError(413, f"a request must have at most {most} bytes, got more")
                more = message.get("more_body", False)
        return b"".join(parts)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route, method = _route(scope), scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.count(route, method, status, seconds)
        if self.settings.log_requests or status >= 500:
            level = logging.INFO if status < 500 else logging.WARNING
            about = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 2)}
            logger.log(level, "request", extra={"about": about})


_METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")


class _ClientGoneError(Exception):
    """The client has closed the connection before its request was whole."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises: RequestError, what is within takes longer. A task of its own, as `asyncio.wait_for` makes, costs more."""
    task, is_late = asyncio.current_task(), False
    assert task is not None  # a server is one

    def give_up() -> None:
        nonlocal is_late
        is_late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, give_up)
    try:
        yield
    except asyncio.CancelledError:
        if not is_late:
            raise
        # Of Python 3.11: nobody is to think that the task is still to end.
        uncancel = getattr(task, "uncancel", None)
        if uncancel is not None:
            uncancel()
        raise RequestError(408, f"a request must have been sent after {seconds:g} seconds") from None
    finally:
        timer.cancel()


def _refusal(scope: Scope, error: RequestError, headers: dict[str, str]) -> Response:
    """As JSON, or for a person as a page; who has no key yet is asked for it."""
    request = Request(scope)
    if error.status == 403 or not wants_page(request):
        return JSONResponse(error.body(), error.status, headers)
    if error.status != 401:
        page = error_page(request, error.status, error.message)
        page.headers.update(headers)
        return page
    asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    back = asked if request.method == "GET" else "/"
    form = f"/sign-in?next={quote(back, safe='')}"
    if "hx-request" in request.headers:
        # A part of a page was asked for, and the whole page has to go there.
        return Response(status_code=401, headers={"HX-Redirect": "/sign-in", "Connection": "close"})
    return RedirectResponse(form, 303, {"Connection": "close"})


def _cookie(headers: Headers) -> str | None:
    """What a signed-in browser brings."""
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, as a route expects it; then what the connection says."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _route(scope: Scope) -> str:
    """The template of a route, so that neither logs nor metrics hold ids."""
    return getattr(scope.get("route"), "path", "none")


def _host_name(host: str) -> str:
    """Without the port, in lower case."""
    if host.startswith("["):
        return host.partition("]")[0][1:].lower()
    return host.partition(":")[0].lower()


KEY_SCHEMES = {
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer"},
    "basic": {"type": "http", "scheme": "basic", "description": "The key is the password, of any user."},
}
"""The ways of giving the key, as OpenAPI describes them."""


def _keys(headers: Headers) -> Iterator[str]:
    """What a request gives as its key, in any of the ways."""
    if "x-api-key" in headers:
        yield headers["x-api-key"]
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        yield value.strip()
    elif kind.lower() == "basic":
        try:
            yield base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return
