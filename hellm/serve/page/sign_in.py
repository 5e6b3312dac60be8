"""How a browser brings the API key: a form, and a cookie that stands for it.

The cookie holds no key, only until when it is good and a seal by the key, so that it ends by itself, and when the key
is changed. No script can read it (HttpOnly), and no browser sends it for another site (SameSite=Strict).
"""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from hellm.serve.page.rendering import PageRoute, render

__all__ = ["COOKIE", "is_good", "new_cookie", "router"]

COOKIE = "hellm"
_SECONDS = 12 * 3600
# Seconds by which the clock may be set back meanwhile. A cookie of a clock that was years ahead is good for no years.
_STEP = 3600

router = APIRouter(route_class=PageRoute)


def new_cookie(key: str, now: float | None = None) -> str:
    """A value that `is_good` for half a day."""
    until = str(int((time.time() if now is None else now) + _SECONDS))
    return f"{until}.{_seal(key, until)}"


def is_good(cookie: str, key: str) -> bool:
    """Whether a cookie was made here, with this key, and not too long ago."""
    until, _, seal = cookie.partition(".")
    genuine = hmac.compare_digest(seal.encode(), _seal(key, until).encode())
    return genuine and 0 < int(until) - time.time() <= _SECONDS + _STEP


def _seal(key: str, until: str) -> str:
    return hmac.new(key.encode(), f"hellm page until {until}".encode(), hashlib.sha256).hexdigest()


@router.get("/sign-in")
async def form(request: Request, next: str = "/") -> Response:
    """The form."""
    return render(request, "sign_in.html", next=_own(next), wrong=False)


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """With the right key, on to where the browser was going."""
    async with request.form(max_files=0, max_fields=2) as sent:
        given, target = str(sent.get("key", "")).strip(), _own(str(sent.get("next", "/")))
    key = request.app.state.settings.api_key
    if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
        return render(request, "sign_in.html", 401, next=target, wrong=True)
    answer = RedirectResponse(target, 303)
    if key is not None:
        # What the browser sees, whatever stands between it and this server.
        secure = urlsplit(request.headers.get("origin", "")).scheme == "https"
        answer.set_cookie(
            COOKIE, new_cookie(key), max_age=_SECONDS, httponly=True, samesite="strict", secure=secure, path="/"
        )
    return answer


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """The cookie is taken back."""
    answer = RedirectResponse("/sign-in", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict", path="/")
    return answer


def _own(target: str) -> str:
    """A path of this server; anything else is the first page."""
    return target if target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable() else "/"
