"""N replicas of the server behind one route, by Ray Serve (`pip install fastlm[ray]`).

    serve run fastlm.serve.ray:build model=gemma3-270m replicas=2

An ingress takes requests and hands each to a replica, which holds a model, an engine and the whole application. When a
replica dies, the requests that it had not begun to answer go to another; an answer that had begun breaks off, as what
was sent cannot be taken back. Ray starts a new replica in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Scope

from fastlm.inference import LLM
from fastlm.serve.app import create_app
from fastlm.serve.backend import Backend, model_name, warm_up
from fastlm.serve.errors import ApiError, JsonResponse
from fastlm.serve.limits import Limits

MAX_ONGOING = 512  # requests of a replica; its own queue refuses before
ATTEMPTS = 5  # a request is given to so many replicas until one answers
RETRY_SECONDS = 0.2  # until Ray has noticed that a replica is dead
Forwarded = dict[str, Any]  # what of an ASGI scope goes to a replica


@serve.deployment(max_ongoing_requests=MAX_ONGOING)
class Replica:
    """One model, and the application over it."""

    def __init__(
        self, model: str, name: str | None, api_key: str | None, limits: Limits, engine: dict[str, Any]
    ) -> None:
        llm = LLM(model, **engine)
        warm_up(llm)
        run = Path(model)
        self._backend = Backend(
            llm, name or model_name(model), limits, run=run if (run / "log.jsonl").is_file() else None
        )
        self._app = create_app(self._backend, api_key=api_key)

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has ended."""
        self._backend.llm.run(lambda: None).result(timeout=60)

    async def answer(self, forwarded: Forwarded, body: bytes) -> AsyncIterator[Message]:
        """The messages of the application's answer, as ASGI has them."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        scope: Scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, **forwarded}
        given = False

        async def receive() -> Message:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # the client's leaving comes as this call's cancellation
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            kept = {key: message[key] for key in ("type", "status", "headers", "body", "more_body") if key in message}
            if "headers" in kept:
                kept["headers"] = [(bytes(key), bytes(value)) for key, value in kept["headers"]]
            await messages.put(kept)

        async def work() -> None:
            try:
                await self._app(scope, receive, send)
            finally:
                await messages.put(None)

        task = asyncio.ensure_future(work())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()


@serve.deployment(max_ongoing_requests=10 * MAX_ONGOING)
class Ingress:
    """The one route: hands requests to replicas, and those of a replica that died to another."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        scope = request.scope
        forwarded: Forwarded = {
            "http_version": "1.1",
            "method": scope["method"],
            "scheme": scope["scheme"],
            "path": scope["path"],
            "raw_path": scope["path"].encode(),
            "root_path": "",
            "query_string": bytes(scope["query_string"]),
            "headers": [(bytes(key), bytes(value)) for key, value in scope["headers"]],
            "client": None,
            "server": None,
        }
        body = await request.body()
        for attempt in range(ATTEMPTS):
            messages: Any = self._replicas.answer.remote(forwarded, body)
            try:
                start = await anext(messages)
                first = await anext(messages)
            except (RayError, StopAsyncIteration):  # the replica died before the answer began
                await asyncio.sleep(RETRY_SECONDS * (attempt + 1))
                continue
            except asyncio.CancelledError:  # the client left
                messages.cancel()
                raise
            response = StreamingResponse(_content(first, messages), start["status"])
            response.raw_headers = [(bytes(key), bytes(value)) for key, value in start["headers"]]
            return response
        error = ApiError(503, "no replica answers", headers={"Retry-After": "1"})
        return JsonResponse(error.to_json(), error.status, headers=error.headers)


async def _content(first: Message, messages: Any) -> AsyncIterator[bytes]:
    try:
        yield first.get("body", b"")
        async for message in messages:
            yield message.get("body", b"")
    finally:
        messages.cancel()  # does nothing to an answer that has come to its end


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application that `serve run` and `serve.run` take.

    Args:
        arguments: "model" (as `fastlm serve --model`), and, if wanted, "replicas" (2), "name", "api_key", "limits" (a
            mapping, see `Limits`), "engine" (a mapping of `LLM`'s options, such as "device"), and "num_cpus" and
            "num_gpus" of a replica.
    """
    model = str(arguments["model"])
    limits = Limits(**(arguments.get("limits") or {}))
    options = {"num_cpus": float(arguments.get("num_cpus", 1)), "num_gpus": float(arguments.get("num_gpus", 0))}
    replica = Replica.options(  # type: ignore[attr-defined]
        num_replicas=int(arguments.get("replicas", 2)), ray_actor_options=options
    )
    return Ingress.bind(  # type: ignore[attr-defined]
        replica.bind(model, arguments.get("name"), arguments.get("api_key"), limits, arguments.get("engine") or {})
    )
