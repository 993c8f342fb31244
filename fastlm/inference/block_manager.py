"""Which blocks of the cache belong to whom, and which hold a prefix that another request may share.

A block holds `block_size` tokens. A block that is full of known tokens is registered under (the number of the prefix
before it, its token ids), and the prefix up to its end gets a number of its own, given once and never again. So a key
says exactly which tokens stand in the block and before it: a chain of hashes whose every lookup compares what was
hashed, and no collision is ever a hit.

A block that nobody uses keeps its contents until its memory is needed; blocks that hold no prefix go first, then the
least recently used. A sequence lets go of its last block first, so a prefix outlives what follows it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

NO_PREFIX = 0
Key = tuple[int, tuple[int, ...]]


@dataclass
class BlockTable:
    """The blocks of one sequence, and the numbers of its prefixes that end with its first, second, … full block."""

    blocks: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens. Without `prefix_caching`, none is shared."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._users = [0] * num_blocks
        self._keys: list[Key | None] = [None] * num_blocks
        self._prefixes = [NO_PREFIX] * num_blocks  # the number of the prefix that ends with the block
        self._registered: dict[Key, int] = {}  # -> block
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken is first
        self._last_prefix = NO_PREFIX

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those with a prefix that nobody uses among them."""
        return len(self._free)

    @property
    def num_registered(self) -> int:
        return len(self._registered)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, ids: Sequence[int]) -> list[int]:
        """The blocks that hold the longest registered prefix of `ids`. At least the last token is left to compute."""
        blocks: list[int] = []
        prefix = NO_PREFIX
        for start in range(0, len(ids) - self.block_size, self.block_size):
            block = self._registered.get((prefix, tuple(ids[start : start + self.block_size])))
            if block is None:
                break
            blocks.append(block)
            prefix = self._prefixes[block]
        return blocks

    def share(self, table: BlockTable, blocks: list[int]) -> None:
        """Begins an empty table with blocks that `match` found."""
        for block in blocks:
            if self._users[block] == 0:
                del self._free[block]
            self._users[block] += 1
        table.blocks = list(blocks)
        table.prefixes = [self._prefixes[block] for block in blocks]

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Gives `table` room for `num_tokens`. False, and nothing changes, when there are too few blocks."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            table.blocks.append(block)
        return True

    def register(self, table: BlockTable, ids: Sequence[int]) -> None:
        """Lets others share the blocks that are full of `ids`, the tokens that `table` holds from its beginning on.

        The memory must hold their keys and values before anyone who shares them reads it.
        """
        if not self.prefix_caching:
            return
        for i in range(len(table.prefixes), len(ids) // self.block_size):
            parent = table.prefixes[i - 1] if i else NO_PREFIX
            key = parent, tuple(ids[i * self.block_size : (i + 1) * self.block_size])
            block = self._registered.get(key)
            if block is None:  # else another sequence has computed the same block; ours stays unshared
                block = table.blocks[i]
                self._last_prefix += 1
                self._registered[key] = block
                self._keys[block], self._prefixes[block] = key, self._last_prefix
            table.prefixes.append(self._prefixes[block])

    def release(self, table: BlockTable) -> None:
        """Takes all blocks of `table` back."""
        for block in reversed(table.blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
        table.blocks, table.prefixes = [], []

    def forget_all(self) -> None:
        """Registered prefixes are not found any more. For when their memory may not hold what was promised."""
        for block in self._registered.values():
            self._keys[block] = None
        self._registered.clear()

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._registered[key]
            self._keys[block] = None
