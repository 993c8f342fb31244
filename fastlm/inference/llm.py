"""A model to ask: text, streams of text, probabilities and embeddings, from any number of threads and coroutines."""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlm.errors import CheckpointError, ConfigError, InferenceError
from fastlm.inference.beam_search import Beam, beam_search
from fastlm.inference.chat import ChatPrompt, Messages, Tools, chat_prompt
from fastlm.inference.engine import Engine, Stats
from fastlm.inference.engine_thread import EngineThread
from fastlm.inference.generation import Prompt, collect, list_of_prompts, params_of_each
from fastlm.inference.outputs import Completion, Piece
from fastlm.inference.sampling_params import SamplingParams
from fastlm.inference.sequence import Pooling
from fastlm.model import load
from fastlm.model.checkpoint import LanguageModel
from fastlm.tokenizer import Tokenizer

Params = SamplingParams | Sequence[SamplingParams]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Score:
    """Log-probability (natural logarithm) of each token of a text, given those before it."""

    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class LLM:
    """A model behind an engine that serves everything asked of it together.

    >>> llm = LLM("gemma3-270m")
    >>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=20))

    Args:
        model: what `fastlm.model.load` takes, such as a name, a directory or a GGUF file; or a model with its
            `tokenizer`.
        device: where a model is loaded to; one that is given as an object stays where it is.
        options: those of `Engine`, such as `memory`, `max_batch_tokens`, `num_drafts`.
    """

    def __init__(
        self,
        model: LanguageModel | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        if isinstance(model, str | Path):
            loaded = load(model, device=device)
            if tokenizer is None:
                if loaded.tokenizer is None:
                    raise CheckpointError(f"{model} holds no tokenizer.json; put it there, or give a tokenizer")
                tokenizer = Tokenizer.from_file(loaded.tokenizer)
            model = loaded.model
        if tokenizer is None:
            raise ConfigError("a model that is given as an object needs its tokenizer beside it")
        self.model = model
        self.tokenizer = tokenizer
        self._engine = Engine(model, tokenizer, **options)
        self._thread = EngineThread(self._engine)
        self.close: Callable[[], object] = weakref.finalize(self, self._thread.close)
        """Ends the engine; what is being served ends with an error."""

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text as a prompt, what documents begin with among them."""
        return self._engine.prompt_ids(text)

    def chat_prompt(self, messages: Messages, tools: Tools = ()) -> ChatPrompt:
        """What to continue for the assistant's next message, and what ends it. See `fastlm.inference.chat`."""
        return chat_prompt(self.tokenizer, messages, tools)

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises CapacityError or ConfigError if the request could never be served."""
        self._engine.check(self.prompt_ids(prompt) if isinstance(prompt, str) else prompt, params)

    def stats(self) -> Stats:
        return self._engine.stats()

    def generate(self, prompts: Sequence[Prompt], params: Params | None = None) -> list[Completion]:
        """Continues each prompt (text, or token ids): n completions of the first, then of the second, …

        With one `params` for several prompts, the i-th completion is drawn with seed + i.

        Raises:
            CapacityError: a prompt is longer than the context, or than the memory.
            ConfigError: the parameters do not fit.
        """
        prompts = list_of_prompts(prompts)
        return collect(prompts, self.stream(prompts, params))

    def stream(self, prompts: Sequence[Prompt], params: Params | None = None) -> Iterator[Piece]:
        """Like `generate`, a piece at a time, of whole characters. `request_id` is the number of the prompt.

        A stream that is not read to its end frees what it holds when it is closed.
        """
        prompts = list_of_prompts(prompts)
        settings = params_of_each(prompts, params or SamplingParams())
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        with _Requests(self._thread, pieces.put) as requests:
            requests.submit_all(prompts, settings)
            while requests.unfinished:
                yield requests.own(pieces.get())

    async def agenerate(self, prompts: Sequence[Prompt], params: Params | None = None) -> list[Completion]:
        """`generate`, awaited. Cancelling the task frees what it holds."""
        prompts = list_of_prompts(prompts)
        pieces = [piece async for piece in self.astream(prompts, params)]
        return collect(prompts, iter(pieces))

    async def astream(self, prompts: Sequence[Prompt], params: Params | None = None) -> AsyncIterator[Piece]:
        """`stream`, awaited piece by piece."""
        prompts = list_of_prompts(prompts)
        settings = params_of_each(prompts, params or SamplingParams())
        stream = self._apieces(prompts, settings)
        try:
            async for piece in stream:
                yield piece
        finally:
            await stream.aclose()

    async def _apieces(
        self, prompts: list[Prompt], settings: list[SamplingParams], *, pooling: Pooling | None = None
    ) -> AsyncGenerator[Piece, None]:
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        with _Requests(self._thread, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)) as requests:
            requests.submit_all(prompts, settings, pooling=pooling)
            while requests.unfinished:
                yield requests.own(await pieces.get())

    def score(self, texts: Sequence[Prompt], *, since: Sequence[int] | None = None) -> list[Score]:
        """How probable the model finds each text (or list of token ids, whose first has no probability).

        `since`: for each text the first token that is scored, 0 by default. Texts that begin alike before it are read
        once.

        Raises:
            CapacityError: a text is longer than the context.
            InferenceError: the model's logits are not finite.
        """
        starts = [0] * len(texts) if since is None else since
        params = [SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=start) for start in starts]
        completions = self.generate(texts, params)
        scores = []
        for completion in completions:
            if completion.prompt_logprobs is None:
                raise InferenceError(f"a text could not be scored: {completion.error}")
            known = [entry for entry in completion.prompt_logprobs if entry is not None]
            scores.append(Score([entry.token_id for entry in known], [entry.logprob for entry in known]))
        return scores

    def embed(self, texts: Sequence[Prompt], *, pooling: Pooling = "mean") -> Tensor:
        """A vector of length 1 for each text: the mean of its tokens' last hidden states, or the last of them.

        Returns:
            `(texts, hidden_size)` fp32.

        Raises:
            CapacityError: a text is longer than the context.
            InferenceError: the model's hidden states are not finite.
        """
        texts = list_of_prompts(texts)
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        found: dict[int, Tensor] = {}
        with _Requests(self._thread, pieces.put) as requests:
            requests.submit_all(texts, [SamplingParams(max_tokens=0)] * len(texts), pooling=pooling)
            while requests.unfinished:
                piece = requests.own(pieces.get())
                if piece.embedding is None:
                    raise InferenceError(f"a text could not be embedded: {piece.error}")
                assert isinstance(piece.request_id, int)
                found[piece.request_id] = piece.embedding
        return torch.stack([found[i] for i in range(len(texts))]) if texts else torch.empty(0, self.hidden_size)

    async def apool(self, texts: Sequence[Prompt], *, pooling: Pooling) -> Tensor:
        """`embed`, awaited; with pooling="logits", the logits of the token after each text, `(texts, vocab_size)`."""
        texts = list_of_prompts(texts)
        found: dict[int, Tensor] = {}
        stream = self._apieces(texts, [SamplingParams(max_tokens=0)] * len(texts), pooling=pooling)
        try:
            async for piece in stream:
                if piece.embedding is None:
                    raise InferenceError(f"a text could not be read: {piece.error}")
                assert isinstance(piece.request_id, int)
                found[piece.request_id] = piece.embedding
        finally:
            await stream.aclose()
        return torch.stack([found[i] for i in range(len(texts))])

    def run(self, function: Callable[[], Result]) -> Future[Result]:
        """Calls `function` on the engine's thread, between two of its steps, when nothing else uses the model."""
        return self._thread.run(function)

    @property
    def max_sequences(self) -> int:
        """The most sequences that run at once; others wait."""
        return self._engine.scheduler.max_sequences

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""
        return self._engine.runner.vocab_size

    @property
    def context_length(self) -> int | None:
        """The most tokens of a sequence; None for a recurrent model, which has no limit."""
        return self._engine.context_length

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    def beam_search(
        self, prompt: Prompt, *, width: int = 4, max_tokens: int = 64, length_penalty: float = 1.0
    ) -> list[Beam]:
        """The most probable continuations that a beam of `width` finds, best first.

        See `fastlm.inference.beam_search`.

        Raises:
            CapacityError: the prompt and `max_tokens` are longer than the context.
        """
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        self.check(ids, SamplingParams(max_tokens=max_tokens))
        return beam_search(self, ids, width=width, max_tokens=max_tokens, length_penalty=length_penalty)


class _Requests:
    """The requests of one call. They are numbered as the call's prompts are, and cancelled if it ends before them."""

    def __init__(self, thread: EngineThread, receive: Callable[[Piece], object]) -> None:
        self._thread = thread
        self._receive = receive
        self._rows: dict[object, int] = {}  # the engine's id -> number of the prompt
        self._remaining: dict[int, int] = {}  # number of the prompt -> continuations that have not ended

    def __enter__(self) -> _Requests:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for request_id, row in self._rows.items():
            if row in self._remaining:
                self._thread.cancel(request_id)  # type: ignore[arg-type]

    @property
    def unfinished(self) -> bool:
        return bool(self._remaining)

    def submit_all(
        self, prompts: list[Prompt], settings: list[SamplingParams], *, pooling: Pooling | None = None
    ) -> None:
        for row, (prompt, params) in enumerate(zip(prompts, settings, strict=True)):
            self._rows[self._thread.submit(prompt, params, self._receive, pooling=pooling)] = row
            self._remaining[row] = 1 if pooling else params.n

    def own(self, piece: Piece) -> Piece:
        """The piece under the number of its prompt."""
        row = self._rows[piece.request_id]
        if piece.finish_reason is not None:
            self._remaining[row] -= 1
            if self._remaining[row] == 0:
                del self._remaining[row]
        return replace(piece, request_id=row)
