"""One step of many sequences over a paged cache.

A step packs the new tokens of all its sequences into one row. Its keys and values are written to their slots first;
then sequences with few new tokens are served together by `decode_attention`, which reads blocks where they lie, and
each longer chunk by `attention` over its keys, copied together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm.inference.block_manager import BlockTable
from fastlm.inference.cuda_graphs import DecodeInputs
from fastlm.inference.native_decoder import Group
from fastlm.inference.scheduler import Chunk
from fastlm.inference.shared_prefix import for_kernels
from fastlm.ops import attention, decode_attention
from fastlm.ops.decode_attention import MAX_QUERY_LEN

if TYPE_CHECKING:
    from fastlm.inference.paged_cache import PagedCache


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
                tables = [chunk.sequence.table for chunk in group]
                lengths = [chunk.start + query_len for chunk in group]
                block_table = _rows([table.blocks for table in tables], device)
                self.groups.append(
                    Group(
                        slice(first_row, len(positions)),
                        len(group),
                        query_len,
                        block_table,
                        _rows([_seen(table) for table in tables], device) if cache.window_blocks else block_table,
                        torch.tensor(lengths, dtype=torch.int32, device=device),
                        for_kernels([table.blocks for table in tables], lengths, block_size, device),
                    )
                )
        self._end = max(positions) + 1
        self._positions = torch.tensor([positions], device=device)
        self.slots = torch.tensor(slots, device=device)
        self.window_slots = torch.tensor(window_slots, device=device) if cache.window_blocks else self.slots

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one new token."""
        return not self.prefills and len(self.groups) == 1 and self.groups[0].query_len == 1

    def inputs(self, ids: Tensor) -> DecodeInputs:
        """Of a step that `decodes`."""
        (group,) = self.groups
        return DecodeInputs(
            ids,
            self._positions[0],
            self.slots,
            self.window_slots,
            group.block_table,
            group.window_table,
            group.context_lens,
            group.num_shared_tokens,
        )

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
                num_shared_tokens=None if windowed else group.num_shared_tokens,
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


class RecordedStep(PagedStep):
    """A step whose inputs stay where they are, and whose sequences may be of any length up to `context_length`."""

    def __init__(self, cache: PagedCache, inputs: DecodeInputs, context_length: int) -> None:
        size = len(inputs.ids)
        self._cache = cache
        self._end = context_length
        self._positions = inputs.positions[None]
        self.slots, self.window_slots = inputs.slots, inputs.window_slots
        tables = inputs.block_table, inputs.window_table
        self.groups = [Group(slice(0, size), size, 1, *tables, inputs.context_lens, inputs.num_shared_tokens)]
        self.prefills = []


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
