"""Keys and values in blocks, and one step of many sequences over them.

A step runs through the native decoder where that serves it, as a recorded graph on a GPU, or layer by layer.

Layers with a window may keep theirs in a pool of other blocks, of which a sequence has those that its window reaches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import native, native_missing
from fastlm.inference.cuda_graphs import DecodeGraphs, Record
from fastlm.inference.native_decoder import NativeDecoder, unsupported
from fastlm.inference.paged_step import PagedStep, RecordedStep
from fastlm.inference.scheduler import Chunk
from fastlm.model import Transformer
from fastlm.nn import QuantizedLinear


def cache_dtype(model: Transformer) -> torch.dtype:
    """The model's; fp16 beside quantized weights, where it changes less than rounding activations to 8 bits does."""
    is_quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    return torch.float16 if is_quantized and model.dtype == torch.float32 else model.dtype


class PagedCache:
    """Memory for `num_blocks` blocks in each layer: `keys[layer]` and `values[layer]` are
    `(num_blocks, block_size, kv_heads, head_dim)`. With `window_blocks`, layers with a window have as many instead."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        window_blocks: int = 0,
        *,
        max_sequences: int = 0,
        record: Record | None = None,
    ) -> None:
        """With `record`, steps of one token for up to `max_sequences` are recorded and replayed, see `cuda_graphs`."""
        c = model.config
        dtype, device = cache_dtype(model), model.output_weight.device
        self.num_blocks, self.window_blocks = num_blocks, window_blocks
        self.windowed = [window_blocks > 0 and c.window(layer) is not None for layer in range(c.num_layers)]
        spare = record is not None  # a block that is nobody's, for the padding of recorded steps
        shapes = [
            ((window_blocks if windowed else num_blocks) + spare, block_size, c.num_kv_heads, c.head_dim)
            for windowed in self.windowed
        ]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self._native = None
        self._graphs = None
        if record is not None:
            self._graphs = DecodeGraphs(
                lambda step: model.hidden_states(step.ids[None], RecordedStep(self, step, c.context_length))[0],
                max_sequences,
                max_blocks=-(-c.context_length // block_size),
                free_slots=(num_blocks * block_size, window_blocks * block_size),
                device=device,
                record=record,
            )
        elif unsupported(model) is None:
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
        if self._graphs is not None and step.decodes:
            hidden = self._graphs.hidden_states(step.inputs(ids))
        if hidden is None:
            hidden = model.hidden_states(ids[None], step)[0]
        if step.prefills and native_missing() is None and any(chunk.reaches_end for chunk in chunks):
            native().give_back_memory()  # of the layers' activations, which malloc would hold until the next prompt
        if order == list(range(len(chunks))):
            return hidden
        pieces = dict(zip(order, hidden.split([len(chunks[i].ids) for i in order]), strict=True))
        return torch.cat([pieces[i] for i in range(len(chunks))])
