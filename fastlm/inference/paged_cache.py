"""Keys and values in blocks, and one step of many sequences over them.

A step packs the new tokens of all its sequences into one row. Its keys and values are written to their slots first;
then sequences with few new tokens are served together by `decode_attention`, which reads blocks where they lie, and
each longer chunk by `attention` over its keys, copied together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fastlm._core import native, native_missing
from fastlm.inference.cuda_graphs import DecodeGraphs, Record, StaticStep
from fastlm.inference.native_decoder import Group, NativeDecoder, unsupported
from fastlm.inference.scheduler import Chunk
from fastlm.inference.shared_prefix import for_kernels
from fastlm.model import Transformer
from fastlm.nn import QuantizedLinear
from fastlm.ops import attention, decode_attention
from fastlm.ops.decode_attention import MAX_QUERY_LEN


def cache_dtype(model: Transformer) -> torch.dtype:
    """The model's; fp16 beside quantized weights, where it changes less than rounding activations to 8 bits does."""
    is_quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    return torch.float16 if is_quantized and model.dtype == torch.float32 else model.dtype


class PagedCache:
    """Memory for `num_blocks` blocks in each layer: `keys[layer]` and `values[layer]` are
    `(num_blocks, block_size, kv_heads, head_dim)`."""

    def __init__(
        self, model: Transformer, num_blocks: int, block_size: int, max_sequences: int = 0, record: Record | None = None
    ) -> None:
        """With `record`, steps of one token a sequence are recorded and replayed, as `cuda_graphs` says."""
        c = model.config
        device = model.output_weight.device
        shape = (num_blocks + (record is not None), block_size, c.num_kv_heads, c.head_dim)
        dtype = cache_dtype(model)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(c.num_layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self._native = None
        self._graphs = None
        if record is not None:
            self._graphs = DecodeGraphs(
                lambda step: model.hidden_states(step.ids[None], RecordedStep(self, step, c.context_length))[0],
                max_sequences,
                max_blocks=-(-c.context_length // block_size),
                free_slot=num_blocks * block_size,
                device=device,
                record=record,
            )
        elif unsupported(model) is None:
            self._native = NativeDecoder(model, self.keys, self.values)

    @staticmethod
    def bytes_per_block(model: Transformer, block_size: int) -> int:
        c = model.config
        return 2 * c.num_layers * block_size * c.num_kv_heads * c.head_dim * cache_dtype(model).itemsize

    def hidden_states(self, model: Transformer, chunks: list[Chunk]) -> Tensor:
        """Computes the chunks, in their order: `(tokens, hidden_size)`."""
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].ids))
        step = PagedStep(self, [chunks[i] for i in order])
        device = self.keys[0].device
        ids = torch.tensor([token for i in order for token in chunks[i].ids], device=device)
        hidden = None
        if self._native is not None and not step.prefills:
            hidden = self._native.hidden_states(ids, step.positions(0)[0], step.slots, step.groups, step.end(0))
        if self._graphs is not None and step.decodes:
            group = step.groups[0]
            hidden = self._graphs.hidden_states(
                ids, step.positions(0)[0], step.slots, group.block_table, group.context_lens,
                group.num_shared_tokens,
            )  # fmt: skip
        if hidden is None:
            hidden = model.hidden_states(ids[None], step)[0]
        if step.prefills and native_missing() is None and any(chunk.reaches_end for chunk in chunks):
            native().give_back_memory()  # of the layers' activations, which malloc would hold until the next prompt
        if order == list(range(len(chunks))):
            return hidden
        pieces = dict(zip(order, hidden.split([len(chunks[i].ids) for i in order]), strict=True))
        return torch.cat([pieces[i] for i in range(len(chunks))])


@dataclass
class _Prefill:
    """A longer chunk, in rows `rows` of the step."""

    rows: slice
    start: int
    blocks: Tensor  # (blocks,) int64


class PagedStep:
    """What a model sees as its cache: `KVCache`'s protocol for one row of packed tokens. Chunks come shortest first."""

    def __init__(self, cache: PagedCache, chunks: list[Chunk]) -> None:
        self._cache = cache
        device = cache.keys[0].device
        block_size = cache.keys[0].shape[1]
        positions: list[int] = []
        slots: list[int] = []
        self.groups: list[Group] = []
        self.prefills: list[_Prefill] = []
        for query_len, members in groupby(chunks, key=lambda chunk: len(chunk.ids)):
            group = list(members)
            first_row = len(positions)
            for chunk in group:
                blocks = chunk.sequence.table.blocks
                row, end = len(positions), chunk.start + query_len
                positions.extend(range(chunk.start, end))
                slots.extend(blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, end))
                if query_len > MAX_QUERY_LEN:
                    used = torch.tensor(blocks[: -(-end // block_size)], device=device)
                    self.prefills.append(_Prefill(slice(row, row + query_len), chunk.start, used))
            if query_len <= MAX_QUERY_LEN:
                longest = max(len(chunk.sequence.table.blocks) for chunk in group)
                table = [c.sequence.table.blocks + [0] * (longest - len(c.sequence.table.blocks)) for c in group]
                lengths = [c.start + query_len for c in group]
                self.groups.append(
                    Group(
                        slice(first_row, len(positions)),
                        len(group),
                        query_len,
                        torch.tensor(table, dtype=torch.int32, device=device),
                        torch.tensor(lengths, dtype=torch.int32, device=device),
                        for_kernels(table, lengths, block_size, device),
                    )
                )
        self._end = max(positions) + 1
        self._positions = torch.tensor([positions], device=device)
        self.slots = torch.tensor(slots, device=device)

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one new token."""
        return not self.prefills and len(self.groups) == 1 and self.groups[0].query_len == 1

    def end(self, seq: int) -> int:
        return self._end

    def positions(self, seq: int) -> Tensor:
        return self._positions

    def advance(self, seq: int) -> None:
        pass

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
    ) -> Tensor:
        q, k, v = q[0], k[0], v[0]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1)[self.slots] = k.to(keys.dtype)
        values.flatten(0, 1)[self.slots] = v.to(values.dtype)
        out = torch.empty_like(q)
        for group in self.groups:
            out[group.rows] = decode_attention(
                q[group.rows].unflatten(0, (group.size, group.query_len)),
                keys,
                values,
                group.block_table,
                group.context_lens,
                scale=scale,
                window=window,
                softcap=softcap,
                num_shared_tokens=group.num_shared_tokens,
            ).flatten(0, 1)
        for prefill in self.prefills:
            rows = prefill.rows
            if prefill.start == 0:
                its_keys, its_values = k[rows].to(keys.dtype), v[rows].to(values.dtype)  # as later chunks see them
            else:
                its_keys, its_values = _gather(keys, prefill, window), _gather(values, prefill, window)
            its_out = attention(
                q[None, rows],
                its_keys[None].to(q.dtype),
                its_values[None].to(q.dtype),
                causal=True,
                window=window,
                softcap=softcap,
                scale=scale,
            )
            assert isinstance(its_out, Tensor)
            out[rows] = its_out[0]
        return out[None]


class RecordedStep(PagedStep):
    """A step whose inputs stay where they are, and may be of any length up to `context_length`."""

    def __init__(self, cache: PagedCache, step: StaticStep, context_length: int) -> None:
        size = len(step.ids)
        self._cache = cache
        self._end = context_length
        self._positions = step.positions[None]
        self.slots = step.slots
        self.groups = [Group(slice(0, size), size, 1, step.block_table, step.context_lens, step.num_shared_tokens)]
        self.prefills = []


def _gather(memory: Tensor, prefill: _Prefill, window: int | None) -> Tensor:
    """Keys or values that the chunk's queries see, `(tokens, kv_heads, head_dim)`."""
    block_size = memory.shape[1]
    first = 0 if window is None else max(0, prefill.start + 1 - window)
    end = prefill.start + prefill.rows.stop - prefill.rows.start
    skipped = first // block_size
    return memory[prefill.blocks[skipped:]].flatten(0, 1)[first - skipped * block_size : end - skipped * block_size]
