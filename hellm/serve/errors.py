"""What a client is told that something is wrong with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

__all__ = ["Overloaded", "RequestError", "refusal"]


class RequestError(Exception):
    """A request that cannot be answered as it is.

    Args:
        status: 4xx.
        message: What must be and what was.
        field: Where, e.g. "users[3]"; None for the request as a whole.
        nearest: Ids that look like an unknown one.
    """

    def __init__(self, status: int, message: str, *, field: str | None = None, nearest: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.nearest = status, message, field, list(nearest)

    def body(self) -> dict[str, Any]:
        return {"errors": [{"field": self.field, "message": self.message, "nearest": self.nearest}]}


class Overloaded(Exception):
    """Too much is waiting, or this has waited too long.

    Args:
        message: Which of the two.
        retry_after: Seconds.
    """

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.message, self.retry_after = message, retry_after


def refusal(error: RequestError | Overloaded) -> Response:
    """The answer that says what is wrong."""
    if isinstance(error, Overloaded):
        body = RequestError(503, error.message).body()
        return JSONResponse(body, 503, headers={"Retry-After": str(error.retry_after)})
    return JSONResponse(error.body(), error.status)
