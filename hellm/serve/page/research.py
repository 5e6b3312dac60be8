"""What a researcher asks."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hellm.serve.page.rendering import PageRoute, render

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)


@router.get("/research")
async def home(request: Request) -> Response:
    """Where everything begins."""
    return render(request, "research.html")
