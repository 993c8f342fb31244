"""From requests to the engine: who may come in, what it costs, and pieces as they come."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import Request
from torch import Tensor

from fastlm.errors import ConfigError
from fastlm.inference import LLM, Piece, SamplingParams
from fastlm.inference.sequence import Pooling
from fastlm.serve.errors import ApiError
from fastlm.serve.limits import Limits
from fastlm.serve.metrics import Metrics

Texts = Sequence[str | list[int]]
DEFAULT_SECONDS = 1.0  # that a text takes, before any has been served
LONGEST_RETRY = 60  # s


class Backend:
    """One model behind the endpoints. For its event loop's thread alone.

    Args:
        name: what clients call the model.
        run: the directory of its training run, if it has one.
    """

    def __init__(self, llm: LLM, name: str, limits: Limits, *, run: Path | None = None) -> None:
        self.llm = llm
        self.name = name
        self.limits = limits
        self.run = run
        self.metrics = Metrics()
        self.created = int(time.time())
        self.draining = False
        self.places = llm.max_sequences + limits.max_queue
        self.admitted = 0
        self._text_seconds = DEFAULT_SECONDS  # what a text took lately

    @property
    def window(self) -> int | None:
        """The most tokens of a text: the context, or the memory where that is smaller."""
        stats = self.llm.stats()
        if self.llm.context_length is None:
            return None
        return min(self.llm.context_length, stats.blocks_total * stats.block_size)

    @property
    def ready(self) -> bool:
        return not self.draining and self.admitted < self.places

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"there is no model {name[:200]!r} here; there is {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def max_tokens(self, asked: int | None, default: int | None, prompt_tokens: int) -> int:
        """How many tokens to generate when `asked` is given or not; a default of None is all that there is room for."""
        most = self.limits.max_tokens
        if asked is not None:
            if most is not None and asked > most:
                raise ApiError(400, f"max_tokens is {asked}; the limit is {most}", param="max_tokens")
            return asked
        if default is None:
            window = self.window
            default = 1024 if window is None else max(1, window - prompt_tokens)
        return default if most is None else min(default, most)

    async def prompt_ids(self, texts: Texts) -> list[list[int]]:
        """Ids of each text, which are not too many."""

        def encode() -> list[list[int]]:
            return [self.llm.prompt_ids(text) if isinstance(text, str) else text for text in texts]

        ids = await asyncio.to_thread(encode)
        for row in ids:
            self._check_length(len(row))
        return ids

    def _check_length(self, tokens: int) -> None:
        most = self.limits.max_prompt_tokens
        if most is not None and tokens > most:
            raise ApiError(
                400,
                f"the prompt has {tokens} tokens; the limit is {most}",
                param="prompt",
                code="context_length_exceeded",
            )

    async def begin(
        self, request: Request, prompts: list[list[int]], settings: list[SamplingParams]
    ) -> AsyncIterator[Piece]:
        """Sends prompts to the engine, and waits for the first piece, so that a refusal still has its status.

        Raises:
            ApiError: there is no room (429), or a prompt or its settings can not be served.
        """
        pieces = self._pieces(request, prompts, settings)
        request.state.on_end.append(pieces.aclose)
        first = await anext(pieces)
        return _with_first(first, pieces)

    async def _pieces(
        self, request: Request, prompts: list[list[int]], settings: list[SamplingParams]
    ) -> AsyncGenerator[Piece, None]:
        with self.admit(sum(params.n for params in settings)):

            def check() -> None:
                for prompt, params in zip(prompts, settings, strict=True):
                    self.llm.check(prompt, params)

            await asyncio.to_thread(check)  # compiling a grammar may take a while
            last: dict[tuple[Any, int], float] = {}
            started = request.state.started
            stream = self.llm.astream(prompts, settings)
            try:
                async for piece in stream:
                    now = time.monotonic()
                    key = piece.request_id, piece.index
                    if key in last:
                        self.metrics.next_token_seconds.add(now - last[key])
                    else:
                        self.metrics.first_token_seconds.add(now - started)
                    last[key] = now
                    yield piece
            finally:
                await stream.aclose()  # type: ignore[attr-defined]

    async def pool(self, texts: list[list[int]], pooling: Pooling) -> Tensor:
        """Embeddings of texts, or logits; see `LLM.apool`."""
        with self.admit(len(texts)):
            return await self.llm.apool(texts, pooling=pooling)

    def admit(self, texts: int) -> _Admission:
        """Takes places for `texts` texts, for as long as the result is entered.

        Raises:
            ApiError: there are not so many (400), or they are taken (429, with the time after which to come again).
        """
        if texts > self.places:
            raise ApiError(400, f"the request asks for {texts} texts at once; the limit is {self.places}")
        if self.admitted + texts > self.places:
            rounds = self.admitted / self.llm.max_sequences
            seconds = min(LONGEST_RETRY, max(1, math.ceil(rounds * self._text_seconds)))
            raise ApiError(
                429,
                f"the queue is full: {self.admitted} texts are admitted, and the limit is {self.places}",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        return _Admission(self, texts)

    def _leave(self, texts: int, seconds: float) -> None:
        self.admitted -= texts
        self._text_seconds += 0.1 * (seconds - self._text_seconds)


class _Admission:
    """Places that are taken while it is entered."""

    def __init__(self, backend: Backend, texts: int) -> None:
        self._backend = backend
        self._texts = texts

    def __enter__(self) -> None:
        self._backend.admitted += self._texts
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._backend._leave(self._texts, time.monotonic() - self._began)


async def _with_first(first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in pieces:
        yield piece


def model_name(model: str) -> str:
    """What clients call a model that was given as `model`: a hub's id or a name as it is, a path by its last part."""
    path = Path(model)
    if not path.exists():
        return model
    name = path.resolve().name
    if not name:
        raise ConfigError(f"{model} has no name to call the model by")
    return name.removesuffix(".gguf")
