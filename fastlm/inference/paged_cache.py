"""Keys and values in blocks, and one step of many sequences over them.

A step packs the new tokens of all its sequences into one row. Its keys and values are written to their slots first;
then sequences with few new tokens are served together by `decode_attention`, which reads blocks where they lie, and
each longer chunk by `attention` over its keys, copied together.

Layers with a window may keep theirs in a pool of other blocks, of which a sequence has those that its window reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fastlm._core import native, native_missing
from fastlm.inference.block_manager import BlockTable
from fastlm.inference.native_decoder import Group, NativeDecoder, unsupported
from fastlm.inference.scheduler import Chunk
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
    `(num_blocks, block_size, kv_heads, head_dim)`. With `window_blocks`, layers with a window have as many instead."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int, window_blocks: int = 0) -> None:
        c = model.config
        dtype, device = cache_dtype(model), model.output_weight.device
        self.num_blocks, self.window_blocks = num_blocks, window_blocks
        self.windowed = [window_blocks > 0 and c.window(layer) is not None for layer in range(c.num_layers)]
        shapes = [
            (window_blocks if windowed else num_blocks, block_size, c.num_kv_heads, c.head_dim)
            for windowed in self.windowed
        ]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self._native = None
        if unsupported(model) is None:
            self._native = NativeDecoder(model, self.keys, self.values, self.windowed, num_blocks, window_blocks)

    @staticmethod
    def bytes_per_block(model: Transformer, block_size: int, num_layers: int | None = None) -> int:
        """Of all layers, or of some."""
        c = model.config
        layers = c.num_layers if num_layers is None else num_layers
        return 2 * layers * block_size * c.num_kv_heads * c.head_dim * cache_dtype(model).itemsize

    def hidden_states(self, model: Transformer, chunks: list[Chunk]) -> Tensor:
        """Computes the chunks, in their order: `(tokens, hidden_size)`."""
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].ids))
        step = PagedStep(self, [chunks[i] for i in order])
        device = self.keys[0].device
        ids = torch.tensor([token for i in order for token in chunks[i].ids], device=device)
        hidden = None
        if self._native is not None and not step.prefills:
            slots = step.slots, step.window_slots
            hidden = self._native.hidden_states(ids, step.positions(0)[0], slots, step.groups, step.end(0))
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
    window_blocks: Tensor


class PagedStep:
    """What a model sees as its cache: `KVCache`'s protocol for one row of packed tokens. Chunks come shortest first.

    What is named after the window is for layers in the windowed pool; without that pool, it is what the others use.
    """

    def __init__(self, cache: PagedCache, chunks: list[Chunk]) -> None:
        self._cache = cache
        device = cache.keys[0].device
        block_size = cache.keys[0].shape[1]
        positions: list[int] = []
        slots: list[int] = []
        window_slots: list[int] = []
        self.groups: list[Group] = []
        self.prefills: list[_Prefill] = []
        for query_len, members in groupby(chunks, key=lambda chunk: len(chunk.ids)):
            group = list(members)
            first_row = len(positions)
            for chunk in group:
                table = chunk.sequence.table
                row, end = len(positions), chunk.start + query_len
                positions.extend(range(chunk.start, end))
                slots.extend(_slots(table.blocks, chunk.start, end, block_size))
                if cache.window_blocks:
                    window_slots.extend(_slots(table.window_blocks, chunk.start, end, block_size))
                if query_len > MAX_QUERY_LEN:
                    used = torch.tensor(table.blocks, device=device)
                    seen = torch.tensor(_seen(table), device=device) if cache.window_blocks else used
                    self.prefills.append(_Prefill(slice(row, row + query_len), chunk.start, used, seen))
            if query_len <= MAX_QUERY_LEN:
                block_table = _rows([chunk.sequence.table.blocks for chunk in group], device)
                self.groups.append(
                    Group(
                        slice(first_row, len(positions)),
                        len(group),
                        query_len,
                        block_table,
                        _rows([_seen(c.sequence.table) for c in group], device) if cache.window_blocks else block_table,
                        torch.tensor([c.start + query_len for c in group], dtype=torch.int32, device=device),
                    )
                )
        self._end = max(positions) + 1
        self._positions = torch.tensor([positions], device=device)
        self.slots = torch.tensor(slots, device=device)
        self.window_slots = torch.tensor(window_slots, device=device) if cache.window_blocks else self.slots

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
        windowed = self._cache.windowed[layer]
        slots = self.window_slots if windowed else self.slots
        keys.flatten(0, 1)[slots] = k.to(keys.dtype)
        values.flatten(0, 1)[slots] = v.to(values.dtype)
        out = torch.empty_like(q)
        for group in self.groups:
            out[group.rows] = decode_attention(
                q[group.rows].unflatten(0, (group.size, group.query_len)),
                keys,
                values,
                group.window_table if windowed else group.block_table,
                group.context_lens,
                scale=scale,
                window=window,
                softcap=softcap,
            ).flatten(0, 1)
        for prefill in self.prefills:
            rows = prefill.rows
            if prefill.start == 0:
                its_keys, its_values = k[rows].to(keys.dtype), v[rows].to(values.dtype)  # as later chunks see them
            else:
                blocks = prefill.window_blocks if windowed else prefill.blocks
                its_keys, its_values = (_gather(memory, prefill, blocks, window) for memory in (keys, values))
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


def _slots(blocks: list[int], start: int, end: int, block_size: int) -> list[int]:
    return [blocks[p // block_size] * block_size + p % block_size for p in range(start, end)]


def _seen(table: BlockTable) -> list[int]:
    """Its windowed blocks, and in the place of those released, which nobody reads, a block that exists."""
    return [0] * table.num_released + table.window_blocks[table.num_released :]


def _rows(tables: list[list[int]], device: torch.device) -> Tensor:
    """(tables, longest) int32."""
    longest = max(map(len, tables))
    padded = [blocks + [0] * (longest - len(blocks)) for blocks in tables]
    return torch.tensor(padded, dtype=torch.int32, device=device)


def _gather(memory: Tensor, prefill: _Prefill, blocks: Tensor, window: int | None) -> Tensor:
    """Keys or values that the chunk's queries see, `(tokens, kv_heads, head_dim)`."""
    block_size = memory.shape[1]
    first = 0 if window is None else max(0, prefill.start + 1 - window)
    end = prefill.start + prefill.rows.stop - prefill.rows.start
    skipped, used = first // block_size, -(-end // block_size)
    return memory[blocks[skipped:used]].flatten(0, 1)[first - skipped * block_size : end - skipped * block_size]
