"""Which blocks of the cache belong to whom, and which hold a prefix that another request may share.

A block holds `block_size` tokens. A block that is full of known tokens is registered under (the number of the prefix
before it, its token ids), and the prefix up to its end gets a number of its own, given once and never again. So a key
says exactly which tokens stand in the block and before it: a chain of hashes whose every lookup compares what was
hashed, and no collision is ever a hit.

Layers whose queries see a window of the latest tokens have blocks of their own, in a pool of their own, and a sequence
gives those back that no later query of it sees. They are registered under the number of the prefix that they end, so
finding a prefix finds them; it is a hit where those that the next token sees are still there.

A block that nobody uses keeps its contents until its memory is needed; blocks that hold no prefix go first, then the
least recently used. A sequence lets go of its last block first, so a prefix outlives what follows it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

NO_PREFIX = 0
NO_BLOCK = -1
Key = tuple[int, tuple[int, ...]]


@dataclass
class BlockTable:
    """The blocks of one sequence, and the numbers of its prefixes that end with its first, second, … full block.

    With a windowed pool, `window_blocks` are that pool's, beside `blocks`; the first `num_released` are NO_BLOCK.
    """

    blocks: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    window_blocks: list[int] = field(default_factory=list)
    num_released: int = 0


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens. Without `prefix_caching`, none is shared.

    window: with it, each block of a sequence is accompanied by one of a second pool of `window_blocks`, until it lies
    behind the window: at position p, tokens up to p - window are seen by no query from there on.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        window: int | None = None,
        window_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.window = window
        self.num_window_blocks = 0 if window is None else window_blocks
        self._full = _Pool(num_blocks)
        self._windowed = _Pool(self.num_window_blocks)
        self._prefixes = [NO_PREFIX] * num_blocks  # the number of the prefix that ends with the block
        self._last_prefix = NO_PREFIX

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._full.free)

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those with a prefix that nobody uses among them."""
        return len(self._full.free)

    @property
    def num_window_used(self) -> int:
        return self.num_window_blocks - len(self._windowed.free)

    @property
    def num_registered(self) -> int:
        return len(self._full.registered)

    @property
    def longest_sequence(self) -> int:
        """Blocks of the longest sequence that can be computed, be it token by token, when it is alone."""
        if self.window is None or self.num_window_blocks >= blocks_touched(self.window, self.block_size):
            return self.num_blocks
        return min(self.num_blocks, self.num_window_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def longest_chunk(self, start: int) -> int:
        """How many tokens from `start` on could be computed at once if all blocks that they do not see were free."""
        if self.window is None:
            return self.num_blocks * self.block_size - start
        return (self._first_seen(start) + self.num_window_blocks) * self.block_size - start

    def match(self, ids: Sequence[int]) -> list[int]:
        """The blocks that hold the longest registered prefix of `ids`. At least the last token is left to compute."""
        blocks: list[int] = []
        prefix = NO_PREFIX
        longest = there = 0  # `there`: windowed blocks without a gap up to here
        for start in range(0, len(ids) - self.block_size, self.block_size):
            block = self._full.registered.get((prefix, tuple(ids[start : start + self.block_size])))
            if block is None:
                break
            blocks.append(block)
            prefix = self._prefixes[block]
            if self.window is not None:
                there = there + 1 if prefix in self._windowed.registered else 0
                if there < len(blocks) - self._first_seen(start + self.block_size):
                    continue
            longest = len(blocks)
        return blocks[:longest]

    def share(self, table: BlockTable, blocks: list[int]) -> None:
        """Begins an empty table with blocks that `match` found."""
        for block in blocks:
            self._full.use(block)
        table.blocks = list(blocks)
        table.prefixes = [self._prefixes[block] for block in blocks]
        if self.window is not None:
            table.num_released = self._first_seen(len(blocks) * self.block_size)
            seen = [self._windowed.registered[prefix] for prefix in table.prefixes[table.num_released :]]
            for block in seen:
                self._windowed.use(block)
            table.window_blocks = [NO_BLOCK] * table.num_released + seen

    def has_room(self, table: BlockTable, num_tokens: int, max_chunk: int) -> bool:
        """Whether `table` can grow to `num_tokens` that are computed in chunks of up to `max_chunk`."""
        needed = self.blocks_for(num_tokens)
        if needed - len(table.blocks) > len(self._full.free):
            return False
        if self.window is None:
            return True
        at_once = min(blocks_touched(self.window - 1 + max_chunk, self.block_size), self.num_window_blocks)
        held = len(table.window_blocks) - table.num_released
        return min(needed - table.num_released, at_once) - held <= len(self._windowed.free)

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Gives `table` room for `num_tokens`. False, and nothing changes, when there are too few blocks."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > len(self._full.free) or (self.window is not None and missing > len(self._windowed.free)):
            return False
        for _ in range(missing):
            block, was_registered = self._full.take()
            if was_registered:  # the prefix is not found any more: its other block is of no use either
                self._windowed.forget(self._prefixes[block])
            table.blocks.append(block)
            if self.window is not None:
                table.window_blocks.append(self._windowed.take()[0])
        return True

    def slide(self, table: BlockTable, start: int) -> None:
        """Gives back the windowed blocks that no query from position `start` on sees."""
        if self.window is None:
            return
        for i in range(table.num_released, min(self._first_seen(start), len(table.window_blocks))):
            self._windowed.drop(table.window_blocks[i])
            table.window_blocks[i] = NO_BLOCK
            table.num_released += 1

    def register(self, table: BlockTable, ids: Sequence[int]) -> None:
        """Lets others share the blocks that are full of `ids`, the tokens that `table` holds from its beginning on.

        The memory must hold their keys and values before anyone who shares them reads it.
        """
        if not self.prefix_caching:
            return
        for i in range(len(table.prefixes), len(ids) // self.block_size):
            parent = table.prefixes[i - 1] if i else NO_PREFIX
            key = parent, tuple(ids[i * self.block_size : (i + 1) * self.block_size])
            block = self._full.registered.get(key)
            if block is None:  # else another sequence has computed the same block; ours stays unshared
                block = table.blocks[i]
                self._last_prefix += 1
                self._full.register(key, block)
                self._prefixes[block] = self._last_prefix
            prefix = self._prefixes[block]
            table.prefixes.append(prefix)
            # Blocks that guesses filled may be behind the window by the time that they are known to be right.
            if self.window is not None and i >= table.num_released and prefix not in self._windowed.registered:
                self._windowed.register(prefix, table.window_blocks[i])

    def release(self, table: BlockTable) -> None:
        """Takes all blocks of `table` back."""
        for block in reversed(table.blocks):
            self._full.drop(block)
        for block in reversed(table.window_blocks[table.num_released :]):
            self._windowed.drop(block)
        table.blocks, table.prefixes, table.window_blocks, table.num_released = [], [], [], 0

    def forget_all(self) -> None:
        """Registered prefixes are not found any more. For when their memory may not hold what was promised."""
        self._full.forget_all()
        self._windowed.forget_all()

    def _first_seen(self, position: int) -> int:
        """Index of the first block that the query at `position`, or a later one, sees."""
        assert self.window is not None
        return max(0, position + 1 - self.window) // self.block_size


def blocks_touched(num_tokens: int, block_size: int) -> int:
    """The most blocks that hold some of `num_tokens` > 0 tokens in a row."""
    return (num_tokens + block_size - 2) // block_size + 1


class _Pool:
    """Blocks of one kind: how many use each, under which key it is found, and which are free."""

    def __init__(self, num_blocks: int) -> None:
        self.registered: dict[Hashable, int] = {}  # key -> block
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken is first
        self._users = [0] * num_blocks
        self._keys: list[Hashable | None] = [None] * num_blocks

    def take(self) -> tuple[int, bool]:
        """A free block for one user, and whether it was registered until now."""
        block, _ = self.free.popitem(last=False)
        self._users[block] = 1
        key, self._keys[block] = self._keys[block], None
        if key is not None:
            del self.registered[key]
        return block, key is not None

    def use(self, block: int) -> None:
        if self._users[block] == 0:
            del self.free[block]
        self._users[block] += 1

    def drop(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            self.free[block] = None
            if self._keys[block] is None:
                self.free.move_to_end(block, last=False)

    def register(self, key: Hashable, block: int) -> None:
        self.registered[key], self._keys[block] = block, key

    def forget(self, key: Hashable) -> None:
        block = self.registered.pop(key, None)
        if block is not None:
            self._keys[block] = None
            if block in self.free:
                self.free.move_to_end(block, last=False)

    def forget_all(self) -> None:
        for block in self.registered.values():
            self._keys[block] = None
        self.registered.clear()
