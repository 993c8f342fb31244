"""Keys and values of the tokens seen so far, in memory that is allocated once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastlm.ops import attention


class Cache(Protocol):
    """What a model needs of a cache to add `seq` tokens to each of its rows."""

    def positions(self, seq: int) -> Tensor:
        """Where the new tokens stand in their sequences: `(rows, seq)` int64 on the model's device."""
        ...

    def end(self, seq: int) -> int:
        """One more than the last of them: how long a context they need."""
        ...

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
        """Stores k and v of the new tokens, then attends causally from q to all tokens of each sequence.

        q `(rows, seq, heads, head_dim)`, k and v `(rows, seq, kv_heads, head_dim)` -> like q; the options are those of
        `fastlm.ops.attention`.
        """
        ...

    def advance(self, num_tokens: int) -> None:
        """Called after the last layer."""
        ...


class KVCache:
    """Room for `capacity` tokens in each of `batch_size` rows and each layer. Rows may hold different numbers of
    tokens.

    `keys[layer]` and `values[layer]` are `(batch_size, capacity, num_kv_heads, head_dim)`; `lengths` is an int64 tensor
    on the CPU with the number of tokens that each row holds. A model appends to every layer, then calls `advance`.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch_size, capacity, num_kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def row(self, index: int) -> KVCache:
        """A cache of one row that shares this one's memory and lengths."""
        view = object.__new__(KVCache)
        view.keys = self.keys[:, index : index + 1]
        view.values = self.values[:, index : index + 1]
        view.lengths = self.lengths[index : index + 1]
        return view

    def select(self, rows: list[int]) -> KVCache:
        """A cache of some rows, in that order, in memory of its own."""
        chosen = object.__new__(KVCache)
        chosen.keys, chosen.values = self.keys[:, rows], self.values[:, rows]
        chosen.lengths = self.lengths[rows]
        return chosen

    def positions(self, seq: int) -> Tensor:
        device = self.keys.device
        return self.lengths.to(device)[:, None] + torch.arange(seq, device=device)

    def end(self, seq: int) -> int:
        return int(self.lengths.max()) + seq

    def advance(self, num_tokens: int) -> None:
        self.lengths += num_tokens

    def clear(self) -> None:
        self.lengths.zero_()

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
        """Stores k and v after what each row holds, then attends causally from q to all of it.

        q `(batch, seq, heads, head_dim)`, k and v `(batch, seq, kv_heads, head_dim)` -> like q; the options are those
        of `fastlm.ops.attention`. Rows of different lengths are served one by one, so that no row's arithmetic depends
        on another.

        Raises:
            ValueError: when a row has no room for `seq` more tokens.
        """
        starts = self.lengths.tolist()
        seq = q.shape[1]
        if max(starts) + seq > self.capacity:
            raise ValueError(f"the cache holds {max(starts)} of {self.capacity} tokens: no room for {seq} more")

        def append_and_attend(rows: slice, start: int) -> Tensor:
            end = start + seq
            self.keys[layer, rows, start:end] = k[rows]
            self.values[layer, rows, start:end] = v[rows]
            first = 0 if window is None else max(0, start + 1 - window)  # the earliest key that any query sees
            keys = self.keys[layer, rows, first:end].to(q.dtype)
            values = self.values[layer, rows, first:end].to(q.dtype)
            out = attention(q[rows], keys, values, causal=True, window=window, softcap=softcap, scale=scale)
            assert isinstance(out, Tensor)
            return out

        if len(set(starts)) == 1:
            return append_and_attend(slice(None), starts[0])
        return torch.cat([append_and_attend(slice(i, i + 1), start) for i, start in enumerate(starts)])
