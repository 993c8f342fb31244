"""A recurrent model's memory as a cache: one block a sequence, which holds its state, however long it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.inference.scheduler import Chunk
from fastlm.model import RNNLanguageModel

BLOCK_SIZE = 1 << 40  # tokens: no sequence needs a second block


class RecurrentCache:
    """Room for the states of `num_blocks` sequences."""

    def __init__(self, model: RNNLanguageModel, num_blocks: int) -> None:
        self.states = model.new_cache(num_blocks)
        self._device = model.output_weight.device

    @staticmethod
    def bytes_per_block(model: RNNLanguageModel) -> int:
        return sum(t.nbytes for t in model.new_cache(1).tensors)

    def hidden_states(self, model: RNNLanguageModel, chunks: list[Chunk]) -> Tensor:
        """Computes the chunks, in their order: `(tokens, hidden_size)`. Those of one token go together."""
        pieces: list[Tensor | None] = [None] * len(chunks)
        single = [i for i, chunk in enumerate(chunks) if len(chunk.ids) == 1 and chunk.start > 0]
        if single:
            slots = [chunks[i].sequence.table.blocks[0] for i in single]
            states = self.states.select(slots)
            ids = torch.tensor([chunks[i].ids for i in single], device=self._device)
            for i, piece in zip(single, model.hidden_states(ids, states), strict=True):
                pieces[i] = piece
            for mine, new in zip(self.states.tensors, states.tensors, strict=True):
                mine[:, slots] = new
        for i, chunk in enumerate(chunks):
            if pieces[i] is None:
                state = self.states.row(chunk.sequence.table.blocks[0])
                if chunk.start == 0:
                    state.clear()
                pieces[i] = model.hidden_states(torch.tensor([chunk.ids], device=self._device), state)[0]
        return torch.cat([piece for piece in pieces if piece is not None])
