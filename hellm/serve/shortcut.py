"""The shortest way to what is asked most."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hellm.serve.errors import Overloaded, RequestError, refusal

__all__ = ["Shortcut"]

Endpoint = Callable[[Request, Any], Awaitable[Response]]
_JSON = (b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8")


class Shortcut:
    """ASGI middleware: calls an endpoint that takes nothing but a body, without what FastAPI does for every request.

    To find the route, its dependencies and how to read and write each of them takes several times as long as all else
    that a request needs. A body that does not fit goes that way nevertheless, as does everything else: so there is one
    place that says what is wrong.

    Args:
        app: What is behind it.
        endpoints: Path -> what its body is, and a function of the request and the body; all by POST.
        router: Where they are declared.
    """

    def __init__(self, app: ASGIApp, endpoints: dict[str, tuple[type[BaseModel], Endpoint]], router: APIRouter) -> None:
        self.app = app
        routes = {route.path: route for route in router.routes if isinstance(route, APIRoute)}
        self._endpoints = {path: (*found, routes[path]) for path, found in endpoints.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._endpoints.get(scope.get("path", "")) if scope["type"] == "http" else None
        if found is None or scope["method"] != "POST" or _content_type(scope) not in _JSON:
            await self.app(scope, receive, send)
            return
        model, endpoint, route = found
        # `Guard` has read it as a whole.
        message = await receive()
        try:
            body = model.model_validate_json(message["body"])
        except ValidationError:
            await self.app(scope, _again(message, receive), send)
            return
        scope["route"] = route
        try:
            response = await endpoint(Request(scope, receive), body)
        except (RequestError, Overloaded) as error:
            response = refusal(error)
        await response(scope, receive, send)


def _content_type(scope: Scope) -> bytes | None:
    return next((value for name, value in scope["headers"] if name == b"content-type"), None)


def _again(message: Message, receive: Receive) -> Receive:
    """What was received, once more; then what comes after it."""
    messages = [message]

    async def received() -> Message:
        return messages.pop() if messages else await receive()

    return received
