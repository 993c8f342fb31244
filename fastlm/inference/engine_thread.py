"""An engine on a thread of its own, which any thread may send requests to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from fastlm.inference.engine import Engine
from fastlm.inference.outputs import Piece
from fastlm.inference.sampling_params import SamplingParams
from fastlm.inference.sequence import Pooling

Receive = Callable[[Piece], object]
Result = TypeVar("Result")


class EngineThread:
    """Steps `engine` while it has work, and hands each piece to the receiver of its request.

    Receivers are called on this thread and must not block; one that raises has its request cancelled.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._closed = False
        self._next_id = 0
        self._receivers: dict[Hashable, tuple[Receive, set[int]]] = {}  # and the continuations that have not ended
        self._thread = threading.Thread(target=self._run, name="fastlm engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: str | list[int], params: SamplingParams, receive: Receive, *, pooling: Pooling | None = None
    ) -> int:
        """Queues a request and returns its id, which its pieces bear.

        Raises:
            CapacityError, ConfigError: as `Engine.add_request`.
            RuntimeError: the thread was closed.
        """
        ids = self._engine.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        self._engine.check(ids, params, pooling)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine was closed")
            request_id = self._next_id
            self._next_id += 1

            def add() -> None:
                self._receivers[request_id] = (receive, set(range(1 if pooling else params.n)))
                self._engine.add_request(request_id, ids, params, pooling=pooling)

            self._inbox.append(add)
            self._changed.notify()
        return request_id

    def cancel(self, request_id: int) -> None:
        """Ends a request; its receiver is given nothing more. Does nothing if it has ended."""

        def drop() -> None:
            self._receivers.pop(request_id, None)
            self._engine.cancel(request_id)

        with self._changed:
            self._inbox.append(drop)
            self._changed.notify()

    def run(self, function: Callable[[], Result]) -> Future[Result]:
        """Calls `function` between two steps, when nothing else uses the model."""
        future: Future[Result] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            if self._closed:
                raise RuntimeError("the engine was closed")
            self._inbox.append(call)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Ends what is being served with an error, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._inbox or self._engine.has_work or self._closed):
                    self._changed.wait()
                commands, self._inbox = self._inbox, []
                closed = self._closed
            for command in commands:
                command()
            if closed:
                self._fail_all("the engine was closed")
                return
            try:
                pieces = self._engine.step()
            except Exception as error:  # whoever waits must hear of it, and the next request is served all the same
                self._fail_all(f"the engine failed: {type(error).__name__}: {error}")
                continue
            for piece in pieces:
                self._deliver(piece)

    def _deliver(self, piece: Piece) -> None:
        if piece.request_id not in self._receivers:
            return
        receive, unfinished = self._receivers[piece.request_id]
        if piece.finish_reason is not None:
            unfinished.remove(piece.index)
            if not unfinished:
                del self._receivers[piece.request_id]
        try:
            receive(piece)
        except Exception:  # its event loop is closed, say
            self._receivers.pop(piece.request_id, None)
            self._engine.cancel(piece.request_id)

    def _fail_all(self, error: str) -> None:
        for request_id, (receive, unfinished) in self._receivers.items():
            for index in unfinished:
                with suppress(Exception):
                    receive(Piece(request_id, "", None, "error", index, error=error))
            self._engine.cancel(request_id)
        self._receivers.clear()
