"""Which tokens of which sequences the next step computes.

Every step takes up to `max_batch_tokens` tokens: first the next token of each running sequence, then parts of prompts
that running sequences have not been read to the end, then new sequences in the order of their arrival. So a long prompt
is read in chunks between which the others go on (Agrawal et al., "Sarathi-Serve", 2024), and sequences come and go at
any step (Yu et al., "Orca", 2022).

When a running sequence finds no free block, the one that arrived last gives all of its own back and waits, to be
computed anew (Kwon et al., "PagedAttention", 2023, section 4.5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fastlm.inference.block_manager import BlockManager
from fastlm.inference.sequence import Sequence


@dataclass
class Chunk:
    """Tokens of one sequence to compute: `ids` at the positions from `start` on. The last `num_drafts` are guesses."""

    sequence: Sequence
    start: int
    ids: list[int]
    num_drafts: int = 0

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be drawn after it."""
        return self.start + len(self.ids) - self.num_drafts == self.sequence.window_length


class Scheduler:
    """Queues of sequences over one `BlockManager`. `draft(sequence)` guesses the tokens that follow."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        draft: Callable[[Sequence], list[int]] | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = min(max_sequences, max_batch_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of arrival
        self.num_preemptions = 0
        self.num_prefix_hits = 0  # tokens of prompts that were found in the cache
        self._draft = draft

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, waiting or running, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.table)

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks; it waits, before all that have not begun."""
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, whose blocks are there. Empty when nothing runs or waits."""
        # Before anyone takes a block. What is given back here is in no query's window, and can still be found below.
        for sequence in self.running:
            self.blocks.slide(sequence.table, sequence.num_computed)
        chunks: dict[Sequence, Chunk] = {}
        budget = self.max_batch_tokens
        preempted = False
        decoding = [s for s in self.running if s.window_length - s.num_computed == 1]
        reading = [s for s in self.running if s.window_length - s.num_computed > 1]
        for sequence in decoding + reading:
            if budget == 0:
                break
            if preempted and sequence not in self.running:  # preempted for one before it
                continue
            chunk = self._chunk(sequence, budget)
            while not self.blocks.grow(sequence.table, chunk.start + len(chunk.ids)):
                victim = self.running[-1]
                self.preempt(victim)
                preempted = True
                if victim in chunks:
                    budget += len(chunks.pop(victim).ids)
                if victim is sequence:
                    break
            else:
                chunks[sequence] = chunk
                budget -= len(chunk.ids)
        # Only now is it certain what will be computed. Keys are written before any are read, so a sequence that begins
        # in this step may share what another computes in it.
        for chunk in chunks.values():
            self._register(chunk)
        while self.waiting and budget and not preempted and len(self.running) < self.max_sequences:
            first = self._begin(self.waiting[0], budget)
            if first is None:
                break
            self.waiting.popleft()
            self.running.append(first.sequence)
            chunks[first.sequence] = first
            budget -= len(first.ids)
            self._register(first)
        return list(chunks.values())

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start = sequence.num_computed
        budget = min(budget, self.blocks.longest_chunk(start))
        ids = sequence.window()[start : start + budget]
        # Guesses go with a next token alone: behind a part of the prompt they would change how that is rounded.
        if self._draft is None or not sequence.draws or start + 1 != sequence.window_length:
            return Chunk(sequence, start, ids)
        drafts = self._draft(sequence)[: budget - len(ids)]
        return Chunk(sequence, start, ids + drafts, len(drafts))

    def _begin(self, sequence: Sequence, budget: int) -> Chunk | None:
        """The first chunk of a waiting sequence, or None when there is no room for all the tokens that it has."""
        self.blocks.share(sequence.table, self.blocks.match(sequence.shareable()))
        if not self.blocks.has_room(sequence.table, sequence.window_length, self.max_batch_tokens):
            self.blocks.release(sequence.table)
            return None
        sequence.num_computed = len(sequence.table.blocks) * self.blocks.block_size
        self.num_prefix_hits += sequence.num_computed
        chunk = self._chunk(sequence, budget)
        if not self.blocks.grow(sequence.table, chunk.start + len(chunk.ids)):  # no room for the drafts
            chunk = Chunk(sequence, chunk.start, chunk.ids[: len(chunk.ids) - chunk.num_drafts])
            self.blocks.grow(sequence.table, chunk.start + len(chunk.ids))
        return chunk

    def _register(self, chunk: Chunk) -> None:
        table, end = chunk.sequence.table, chunk.start + len(chunk.ids) - chunk.num_drafts
        if end // self.blocks.block_size > len(table.prefixes):
            self.blocks.register(table, chunk.sequence.window()[:end])
