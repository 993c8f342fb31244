"""uvicorn around the application: header time-outs, the way down, and a log that holds no secret."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastlm.errors import ConfigError
from fastlm.serve.backend import Backend

KEEP_ALIVE_SECONDS = 30  # an idle connection is kept for so long after an answer
MAX_HEADER_BYTES = 64 << 10
BACKLOG = 1024  # connections that the system holds until they are taken


class Server(uvicorn.Server):
    """Serves `app` until SIGTERM or SIGINT; then takes no more, and lets what has begun end within the limit."""

    def __init__(self, app: ASGIApp, backend: Backend) -> None:
        limits = backend.limits

        class Protocol(_TimedProtocol):
            header_seconds = limits.header_seconds

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(max(1, limits.drain_seconds)),
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                backlog=BACKLOG,
            )
        )
        self._backend = backend

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._backend.draining = True
        super().handle_exit(sig, frame)


class _TimedProtocol(H11Protocol):
    """Closes a connection whose next request line and headers take longer than `header_seconds`.

    uvicorn itself waits for them without end, so that idle connections could use up all there are.
    """

    header_seconds = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before or (self.cycle is not None and not self.cycle.response_complete):
            self._stop_timer()
        elif self._header_timer is None:  # the next request on a connection that was kept
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before a model is loaded.

    Raises:
        ConfigError: the address cannot be bound to.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; give another --host or --port") from None
    return bound


def serve(app: ASGIApp, backend: Backend, bound: socket.socket) -> None:
    """Serves until a signal, and ends the engine. Returns after SIGTERM; SIGINT raises KeyboardInterrupt."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that leaves
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn takes the signal, drains, and then raises it again
    try:
        Server(app, backend).run(sockets=[bound])
    finally:
        backend.llm.close()
        bound.close()
