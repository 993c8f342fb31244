"""What stands before every endpoint: the key, the size and the time of a request, and the client's going away.

A body is read whole, within its limits, before anything is done with it. While the answer is made, the connection is
watched: when it is lost, or the time is over, the answer is cancelled, and with it what it holds of the engine.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastlm.serve.errors import UNREADABLE, ApiError, as_api_error, to_json
from fastlm.serve.limits import Limits
from fastlm.serve.metrics import Metrics

log = logging.getLogger("fastlm.serve")
# A body that is too large is read to its end all the same, and dropped, since many clients look for no answer before
# they have sent all of it. One of more than so many times the limit is cut off.
DISCARDED = 16
OPEN_PATHS = ("/", "/health", "/ready")  # and the files of the page: what they hold is public
OPEN_PREFIX = "/page/"
CLIENT_LEFT = 499  # before an answer began; nginx's number
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Guard:
    """An ASGI middleware. Endpoints find `on_end`, a list of coroutine functions to call after all, in their state."""

    def __init__(self, app: ASGIApp, *, limits: Limits, metrics: Metrics, api_key: str | None = None) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        scope.setdefault("state", {})["started"] = time.monotonic()
        self._metrics.in_flight += 1
        try:
            await self._serve(scope, receive, answer)
        except ApiError as error:
            await answer.refuse(error)
        except Exception as error:
            await answer.refuse(as_api_error(error))
        finally:
            self._metrics.in_flight -= 1
            route = scope.get("route")
            path = route.path if route is not None else "other"  # what a client wrote there stays out of the log
            seconds = time.monotonic() - scope["state"]["started"]
            status = answer.status or CLIENT_LEFT
            self._metrics.count_request(path, status, seconds)
            log.info("%s %s %d %.3f s", scope["method"], path, status, seconds)

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        self._check_key(scope)
        _check_content_type(scope)
        body = await self._body(scope, receive)
        if body is None:
            return
        on_end: list[Callable[[], Awaitable[object]]] = []
        scope["state"]["on_end"] = on_end
        gone = asyncio.ensure_future(_disconnected(receive))
        work = asyncio.ensure_future(self._app(scope, _replay(body, gone), answer.send))
        try:
            await asyncio.wait({work, gone}, timeout=self._limits.request_seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not gone.done():
                await _cancel(work)
                seconds = self._limits.request_seconds
                raise ApiError(504, f"the answer took longer than {seconds:g} s", code="timeout")
        finally:
            await _cancel(work)
            await _cancel(gone)
            for end in on_end:
                with suppress(Exception):
                    await end()

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if self._key is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIX) or scope["method"] == "OPTIONS":
            return
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise ApiError(
                401,
                "give the server's key in the header: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The request's body, or None when the client left."""
        most = self._limits.max_body
        said = _header(scope, b"content-length")
        if said.isdigit() and (len(said) > 18 or int(said) > DISCARDED * most):
            raise _too_large(said.decode(), most)
        parts, size = [], 0
        end = asyncio.get_running_loop().time() + self._limits.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), end - asyncio.get_running_loop().time())
            except (asyncio.TimeoutError, TimeoutError):
                seconds = self._limits.body_seconds
                raise ApiError(
                    408,
                    f"the body did not come within {seconds:g} s",
                    code="timeout",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size <= most:
                parts.append(message.get("body", b""))
            if size > DISCARDED * most:
                raise _too_large(f"more than {size}", most)
            if not message.get("more_body", False):
                if size > most:
                    raise _too_large(str(size), most)
                body = b"".join(parts)
                try:
                    body.decode()  # Python's JSON takes other encodings, and surrogates
                except UnicodeDecodeError:
                    raise ApiError(400, UNREADABLE) from None
                return body


class _Answer:
    """The way back to the client, which knows what has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Says why. Where the answer had begun, it stays without its end, and the server breaks the connection."""
        if self.status is not None:
            return
        body = to_json(error.to_json())
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        encoded = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})


def _check_content_type(scope: Scope) -> None:
    """A page of another site can make a browser send any body but JSON without asking first."""
    kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
    if scope["method"] == "POST" and kind != b"application/json" and not kind.endswith(b"+json"):
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")


def _too_large(size: str, most: int) -> ApiError:
    message = f"the body has {size} bytes; the limit is {most}"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _replay(body: bytes, gone: asyncio.Future[None]) -> Receive:
    """The body as one message, then the end of the connection when it comes."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.shield(gone)
        return {"type": "http.disconnect"}

    return receive


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
