"""The process: uvicorn around the application, until a signal ends it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from hellm.serve.logs import json_logs

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol
else:
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as _Protocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol

__all__ = ["serve"]

# Seconds that open requests have after SIGTERM.
_DRAIN = 30
# Connections beyond these are told 503 at once.
_MAX_CONNECTIONS = 2048
# Seconds that a client has for the head of a request, and that an idle connection stays open.
_HEAD_TIMEOUT, _KEEP_ALIVE = 10, 30


class _PatientProtocol(_Protocol):
    """Closes connections of clients that do not get on with the head of a request; uvicorn waits for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_since: float | None = time.monotonic()
        self._check_later()

    def data_received(self, data: bytes) -> None:
        if self._head_since is None and not self._is_answering():
            self._head_since = time.monotonic()
        super().data_received(data)
        if self._is_answering():
            self._head_since = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._check.cancel()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _check_later(self) -> None:
        self._check = asyncio.get_running_loop().call_later(_HEAD_TIMEOUT / 2, self._close_if_slow)

    def _close_if_slow(self) -> None:
        slow = self._head_since is not None and time.monotonic() - self._head_since >= _HEAD_TIMEOUT
        if slow and not self._is_answering():
            self.transport.close()
        else:
            self._check_later()


class _Server(uvicorn.Server):
    """Tells where it listens as soon as it does."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[str, int], None]) -> None:
        super().__init__(config)
        self.on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.servers:
            self.on_listening(*self.servers[0].sockets[0].getsockname()[:2])


def serve(app: FastAPI, host: str, port: int, *, on_listening: Callable[[str, int], None]) -> int:
    """Serve until SIGTERM or SIGINT; what is open then is answered first.

    Args:
        app: Of `hellm.serve.app.create_app`.
        host, port: Where to listen; port 0 takes a free one.
        on_listening: Called with the address when connections are taken.
    Returns: Exit code: 0.
    Raises: OSError, the address cannot be had.
    """
    listening = _listening_socket(host, port)
    config = uvicorn.Config(
        app,
        http=_PatientProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_DRAIN,
    )
    server = _Server(config, on_listening)
    with listening, json_logs():
        try:
            server.run(sockets=[listening])
        except (SystemExit, KeyboardInterrupt):
            # uvicorn raises the signal again that has asked for the end; that is no failure.
            if not server.started:
                raise
    return 0


def _listening_socket(host: str, port: int) -> socket.socket:
    """Raises: OSError saying which address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}") from None
    return listening
