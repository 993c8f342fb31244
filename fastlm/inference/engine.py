"""Many requests at once over one model: schedule a step, run it, hand out what it gave.

`scheduler` says which tokens the next step computes, `block_manager` where their keys and values go, `model_runner`
computes them and draws, and this file does the bookkeeping. What a request says depends on its own tokens, settings
and seed alone: not on what else is served, on the size of chunks, on preemption or on what was found in the cache.
(Matrix products and attention may round differently for another number of rows; that moves a draw only when it lies
within rounding of the boundary between two tokens. Models that quantize their activations enlarge such a difference
where one is rounded to another step, and so may part after a prompt that is read in other chunks.)
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fastlm.errors import CapacityError, ConfigError
from fastlm.inference.block_manager import BlockManager
from fastlm.inference.cuda_graphs import record_on_gpu
from fastlm.inference.grammar import GrammarCompiler
from fastlm.inference.memory import CacheLayout, cache_bytes
from fastlm.inference.model_runner import ChunkResult, ModelRunner
from fastlm.inference.outputs import FinishReason, Piece
from fastlm.inference.paged_cache import PagedCache
from fastlm.inference.recurrent_cache import BLOCK_SIZE, RecurrentCache
from fastlm.inference.sampling_params import SamplingParams
from fastlm.inference.scheduler import Chunk, Scheduler
from fastlm.inference.sequence import Pooling, Sequence
from fastlm.model import Transformer
from fastlm.model.checkpoint import LanguageModel
from fastlm.ops.decode_attention import MAX_QUERY_LEN
from fastlm.tokenizer import Tokenizer

PastContext = Literal["stop", "reread"]
CPU_BATCH_TOKENS = 256  # reading a prompt is no faster in longer parts, which take more memory
GPU_BATCH_TOKENS = 8192
NOT_FINITE = "the model's logits are not finite, or every token is forbidden"
VOCABULARY_PADDING = 64  # published models round the rows of their embedding up to multiples of this or of more


@dataclass
class Stats:
    """Counts since the engine began, and its state now."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0  # tokens of prompts whose keys were found in the cache
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    waiting: int = 0
    running: int = 0
    blocks_used: int = 0  # of the layers that keep all tokens
    blocks_total: int = 0
    window_blocks_used: int = 0  # of the layers that keep the tokens of a window; no blocks where there are none
    window_blocks_total: int = 0
    block_size: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Engine:
    """Serves requests with one model. Not for several threads at once; see `LLM` for that.

    Args:
        model: set to evaluation mode. Its weights must not change as long as the engine lives.
        tokenizer: the one that the model was trained with.
        memory: bytes for keys and values. Default: what `max_sequences` of full length need, but at most a quarter of
            the free memory (on a GPU, four fifths of its free memory). Layers with a window keep the tokens within it.
        block_size: tokens a block. A recurrent model has one block a sequence.
        max_batch_tokens: most tokens a step computes. Default: 256 on a CPU, 8192 on a GPU.
        max_sequences: most sequences that run at once.
        prefix_caching: keep the keys and values of finished requests, for those that begin alike.
        past_context: what happens when a sequence has as many tokens as the model's context. "stop" ends it with
            finish_reason "length", and refuses longer prompts. "reread" goes on by reading the latest half anew, each
            time the context is full, so that tokens follow from context_length / 2 to context_length tokens.
        num_drafts: speculative decoding: up to this many tokens (at most 7), guessed from what followed the latest
            tokens where they stood before, are computed together with the next token. Changes the speed alone.
        cuda_graphs: on a GPU, record steps that give each sequence one token, and replay them. Changes the speed alone.

    Raises:
        ConfigError: model and tokenizer do not fit, or an option makes no sense.
        CapacityError: `memory` holds not even one block.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        memory: int | None = None,
        block_size: int = 16,
        max_batch_tokens: int | None = None,
        max_sequences: int = 64,
        prefix_caching: bool = True,
        past_context: PastContext = "stop",
        num_drafts: int = 0,
        cuda_graphs: bool = True,
    ) -> None:
        _require_fit(model, tokenizer)
        for name, value in (("block_size", block_size), ("max_sequences", max_sequences)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if type(num_drafts) is not int or not 0 <= num_drafts < MAX_QUERY_LEN:
            raise ConfigError(f"num_drafts must be an integer from 0 to {MAX_QUERY_LEN - 1}, not {num_drafts!r}")
        if past_context not in ("stop", "reread"):
            raise ConfigError(f'past_context must be "stop" or "reread", not {past_context!r}')
        on_cpu = model.output_weight.device.type == "cpu"
        if max_batch_tokens is None:
            max_batch_tokens = CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS
        if type(max_batch_tokens) is not int or max_batch_tokens < 1:
            raise ConfigError(f"max_batch_tokens must be a positive integer, not {max_batch_tokens!r}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.past_context = past_context
        self.num_drafts = num_drafts
        cache: PagedCache | RecurrentCache
        if isinstance(model, Transformer):
            self.context_length: int | None = model.config.context_length
            layout = CacheLayout.of(model, block_size)
            needs = max_sequences, self.context_length, max_batch_tokens
            per_block = layout.full_bytes + layout.window_bytes
            available = cache_bytes(memory, per_block, layout.bytes_for(*needs), model.output_weight.device)
            num_blocks, window_blocks = layout.split(available, *needs)
            record = None if on_cpu or not cuda_graphs else record_on_gpu
            cache = PagedCache(model, num_blocks, block_size, window_blocks, max_sequences=max_sequences, record=record)
            self.blocks = BlockManager(
                num_blocks,
                block_size,
                prefix_caching=prefix_caching,
                window=layout.window,
                window_blocks=window_blocks,
            )
        else:
            self.context_length = None
            self.num_drafts = 0  # the state cannot go back over a wrong guess
            per_block = RecurrentCache.bytes_per_block(model)
            enough = max_sequences * per_block
            num_blocks = cache_bytes(memory, per_block, enough, model.output_weight.device) // per_block
            cache = RecurrentCache(model, num_blocks)
            self.blocks = BlockManager(num_blocks, BLOCK_SIZE, prefix_caching=False)
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            draft=self._propose if self.num_drafts else None,
        )
        self.runner = ModelRunner(model, cache, min(tokenizer.vocab_size, model.config.vocab_size), self._eos)
        self._grammars = GrammarCompiler(tokenizer, self.runner.vocab_size)
        self._sequences: dict[Hashable, list[Sequence]] = {}
        self._ready: list[Piece] = []  # pieces that need no step
        self._stats = Stats()

    @property
    def _eos(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def has_work(self) -> bool:
        return bool(self._ready or self._sequences)

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text, after what its tokenizer says that texts begin with.

        A tokenizer that says nothing of the kind, as those trained here, has documents begin after an end of text.
        """
        ids = self.tokenizer.encode(text, disallowed_special=())
        settings = self.tokenizer.settings
        if settings.prefix_ids:
            return [*settings.prefix_ids, *ids]
        if ids and (settings.bos_token or settings.eos_token):
            return ids
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-text token, with which texts begin")
        return [self.tokenizer.eos_token_id, *ids]

    def add_request(
        self,
        request_id: Hashable,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        pooling: Pooling | None = None,
    ) -> None:
        """Queues a request; `step` gives its pieces under `request_id`.

        Args:
            prompt: text, or token ids, which are taken as they are.
            pooling: ask for a vector instead of text: the mean of the prompt's hidden states, or the last, of length
                1; or the logits of the token after it.

        Raises:
            CapacityError: the request can never be served: it is longer than the context, or than the memory.
            ConfigError: the id is in use, or the request does not fit the model.
        """
        if request_id in self._sequences:
            raise ConfigError(f"request {request_id!r} is being served already")
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        self.check(ids, params, pooling)
        sequences = [
            Sequence(
                request_id,
                i,
                ids,
                params,
                seed=(params.seed + i) % (1 << 63),
                pooling=pooling,
                matcher=self._grammars.matcher(params),
            )
            for i in range(1 if pooling else params.n)
        ]
        self._stats.prompt_tokens += len(ids)
        for sequence in sequences:
            if sequence.draws or pooling or sequence.is_read:
                if self.context_length is not None and sequence.window_length > self.context_length:
                    sequence.reread(max(1, self.context_length // 2))
                self._sequences.setdefault(request_id, []).append(sequence)
                self.scheduler.add(sequence)
            else:
                self._ready.append(Piece(request_id, "", None, "length", sequence.index))

    def check(self, ids: list[int], params: SamplingParams, pooling: Pooling | None = None) -> None:
        """Raises, as `add_request` does, unless the request can be served when it is alone. Any thread may ask."""
        vocab_size = self.runner.vocab_size
        if not ids:
            raise ConfigError("the prompt has no tokens; give at least one")
        wrong = [i for i in ids if not (type(i) is int and 0 <= i < self.model.config.vocab_size)]
        if wrong:
            raise ConfigError(f"the prompt holds the token id {wrong[0]!r}; the model has 0 to {vocab_size - 1}")
        if params.logit_bias and max(params.logit_bias) >= vocab_size:
            raise ConfigError(f"logit_bias names the token {max(params.logit_bias)}; the model has {vocab_size}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab_size:
                raise ConfigError(f"{name} is {getattr(params, name)}; the model has {vocab_size} tokens")
        if params.prompt_logprobs is not None and params.prompt_logprobs_start >= max(2, len(ids)):
            raise ConfigError(
                f"prompt_logprobs_start is {params.prompt_logprobs_start}, but the prompt has {len(ids)} tokens"
            )
        self._grammars.matcher(params)
        most = 0 if pooling else params.max_tokens
        total = len(ids) + most
        if self.context_length is not None:
            whole = self.past_context == "stop" or params.prompt_logprobs is not None or pooling is not None
            if whole and len(ids) + (most > 0) > self.context_length:
                asked = f" and {most} to generate" if most else ""
                raise CapacityError(
                    f"the prompt has {len(ids)} tokens{asked}; the model's context holds {self.context_length}"
                )
            total = min(total, self.context_length)
        needed, longest = self.blocks.blocks_for(total), self.blocks.longest_sequence
        if needed > longest:
            size = self.blocks.block_size
            raise CapacityError(
                f"{len(ids)} tokens of prompt and {most} to generate need {needed} blocks of {size} tokens; the cache "
                f"has {longest} ({longest * size} tokens): ask for fewer tokens, or give the engine more memory"
            )

    def cancel(self, request_id: Hashable) -> bool:
        """Ends a request, frees its blocks at once and gives no more of its pieces. False if it had ended before."""
        sequences = self._sequences.pop(request_id, [])
        for sequence in sequences:
            self.scheduler.remove(sequence)
        self._ready = [piece for piece in self._ready if piece.request_id != request_id]
        self._stats.cancelled += bool(sequences)
        return bool(sequences)

    def stats(self) -> Stats:
        stats = Stats(**asdict(self._stats))
        stats.prefix_hit_tokens = self.scheduler.num_prefix_hits
        stats.preemptions = self.scheduler.num_preemptions
        stats.waiting, stats.running = len(self.scheduler.waiting), len(self.scheduler.running)
        stats.blocks_used, stats.blocks_total = self.blocks.num_used, self.blocks.num_blocks
        stats.window_blocks_used, stats.window_blocks_total = self.blocks.num_window_used, self.blocks.num_window_blocks
        stats.block_size = self.blocks.block_size
        return stats

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Computes one step and gives the pieces that came of it, in the order of each continuation."""
        pieces, self._ready = self._ready, []
        chunks = self.scheduler.schedule()
        if not chunks:
            return pieces
        try:
            results = self.runner.run(chunks)
        except BaseException:
            self._start_over()
            raise
        self._stats.steps += 1
        for chunk, result in zip(chunks, results, strict=True):
            pieces += self._apply(chunk, result)
        return pieces

    def _start_over(self) -> None:
        """After a step that broke off: what it promised to compute is not in the cache."""
        for sequence in reversed(self.scheduler.running.copy()):
            self.scheduler.preempt(sequence)
        self.blocks.forget_all()

    def _apply(self, chunk: Chunk, result: ChunkResult) -> list[Piece]:
        sequence = chunk.sequence
        known = len(chunk.ids) - chunk.num_drafts
        sequence.num_computed = chunk.start + known
        if sequence.prompt_logprobs is not None:
            if any(math.isnan(entry.logprob) for entry in result.prompt_logprobs):
                sequence.prompt_logprobs = None
                return [self._piece(sequence, None, finish_reason="error", error=NOT_FINITE)]
            sequence.prompt_logprobs += result.prompt_logprobs
        if result.pooled is not None:
            keeps = sequence.pooled is not None and sequence.pooling == "mean"
            sequence.pooled = sequence.pooled + result.pooled if keeps else result.pooled  # type: ignore[operator]
        if not chunk.reaches_end:
            return []
        if sequence.pooling is not None:
            return [self._embedding(sequence)]
        if not sequence.draws:
            return [self._piece(sequence, None, finish_reason="length")]
        pieces = []
        self._stats.draft_tokens += chunk.num_drafts
        for i, drawn in enumerate(result.draws):
            if drawn.token is None:
                pieces.append(self._piece(sequence, None, finish_reason="error", error=NOT_FINITE))
                return pieces
            text = sequence.accept(drawn.token, self.tokenizer)
            self._stats.generated_tokens += 1
            if sequence.matcher is not None and sequence.matcher.error is not None:
                error = f"the grammar cannot be followed further: {sequence.matcher.error}"
                pieces.append(self._piece(sequence, None, text=text, finish_reason="error", error=error))
                return pieces
            if sequence.finish_reason is None and self._is_full(sequence) and self.past_context == "stop":
                sequence.finish_reason = "length"
                text += sequence.text.finish()
            pieces.append(
                self._piece(
                    sequence, drawn.token, text=text, logprob=drawn.logprob, finish_reason=sequence.finish_reason
                )
            )
            if sequence.finish_reason is not None:
                return pieces
            if i == chunk.num_drafts or chunk.ids[known + i] != drawn.token:
                break
            sequence.num_computed += 1  # the guess was right, and so are its keys
            self._stats.accepted_draft_tokens += 1
        if self.context_length is not None and sequence.window_length > self.context_length:
            self.blocks.release(sequence.table)
            sequence.reread(max(1, self.context_length // 2))
        return pieces

    def _is_full(self, sequence: Sequence) -> bool:
        return self.context_length is not None and sequence.window_length >= self.context_length

    def _piece(self, sequence: Sequence, token: int | None, *, text: str = "", **values: Any) -> Piece:
        """A piece of `sequence`, which ends with it when it has a finish_reason."""
        prompt_logprobs = None
        if sequence.prompt_logprobs and sequence.generated <= 1:
            prompt_logprobs = sequence.prompt_logprobs
        reason: FinishReason | None = values.get("finish_reason")
        if reason is not None:
            self._end(sequence)
            self._stats.failed += reason == "error"
            text += sequence.text.finish()
        return Piece(sequence.request_id, text, token, index=sequence.index, prompt_logprobs=prompt_logprobs, **values)

    def _embedding(self, sequence: Sequence) -> Piece:
        pooled = sequence.pooled
        assert pooled is not None
        if not pooled.isfinite().all():
            return self._piece(sequence, None, finish_reason="error", error="the model's hidden states are not finite")
        embedding = pooled if sequence.pooling == "logits" else torch.nn.functional.normalize(pooled, dim=0)
        return self._piece(sequence, None, finish_reason="stop", embedding=embedding)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        siblings = self._sequences[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request_id]
            self._stats.finished += 1

    def _propose(self, sequence: Sequence) -> list[int]:
        if sequence.matcher is not None:  # each draw needs to know where the grammar stands
            return []
        most = min(self.num_drafts, sequence.params.max_tokens - sequence.generated - 1)
        if self.context_length is not None:
            most = min(most, self.context_length - sequence.window_length)
        return sequence.lookup.propose(sequence.tokens, most)


def _require_fit(model: LanguageModel, tokenizer: Tokenizer) -> None:
    rows, ids = model.config.vocab_size, tokenizer.vocab_size
    padded = ids < rows and rows % VOCABULARY_PADDING == 0
    # Gemma 3's tokenizer has one for images, which models of text lack.
    beyond = sum(i >= rows for i in tokenizer.special_tokens.values())
    if ids - rows != beyond and not padded:
        raise ConfigError(
            f"the tokenizer has {ids} ids and the model {rows}: give the tokenizer that the model was trained with"
        )
