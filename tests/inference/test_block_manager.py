from __future__ import annotations

import random

import pytest

from fastlm.inference.block_manager import BlockManager, BlockTable


def filled(manager: BlockManager, ids: list[int]) -> BlockTable:
    table = BlockTable()
    manager.share(table, manager.match(ids))
    assert manager.grow(table, len(ids))
    manager.register(table, ids)
    return table


def test_a_prefix_is_found_block_by_block_and_the_last_token_is_always_left() -> None:
    manager = BlockManager(10, 4)
    table = filled(manager, list(range(12)))
    assert manager.match(list(range(12))) == table.blocks[:2]  # the third is full, but would leave nothing to compute
    assert manager.match([*range(12), 99]) == table.blocks
    assert manager.match([*range(8), 99, 99, 99, 99, 99]) == table.blocks[:2]
    assert manager.match([1, *range(1, 12)]) == []
    assert manager.match([]) == []


def test_the_same_tokens_after_another_prefix_are_not_the_same_block() -> None:
    manager = BlockManager(10, 2)
    filled(manager, [1, 2, 7, 7])
    assert len(manager.match([1, 2, 7, 7, 0])) == 2
    filled(manager, [3, 4, 5, 5])
    assert len(manager.match([3, 4, 7, 7, 0])) == 1


class Colliding(int):
    """An integer whose hash is that of every other."""

    def __hash__(self) -> int:
        return 0


def test_tokens_whose_hashes_collide_are_told_apart() -> None:
    manager = BlockManager(10, 2)
    one = filled(manager, [Colliding(i) for i in (1, 2, 3, 4)])
    other = filled(manager, [Colliding(i) for i in (1, 3, 3, 4)])
    assert set(one.blocks).isdisjoint(other.blocks)
    assert manager.match([Colliding(i) for i in (1, 2, 3, 4, 5)]) == one.blocks
    assert manager.match([Colliding(i) for i in (1, 3, 3, 4, 5)]) == other.blocks
    assert manager.match([Colliding(i) for i in (2, 2, 3, 4, 5)]) == []


def test_shared_blocks_are_freed_by_their_last_user() -> None:
    manager = BlockManager(6, 2)
    first = filled(manager, [1, 2, 3, 4])
    second = filled(manager, [1, 2, 3, 4, 5])
    assert second.blocks[:2] == first.blocks
    assert manager.num_used == 3
    manager.release(first)
    assert manager.num_used == 3
    manager.release(second)
    assert manager.num_used == 0


def test_memory_is_taken_from_empty_blocks_first_then_from_the_least_recently_used_prefix_end_first() -> None:
    manager = BlockManager(5, 2)
    old, new = filled(manager, [1, 2, 3, 4]), filled(manager, [5, 6])
    manager.release(old)
    manager.release(new)
    table = BlockTable()
    assert manager.grow(table, 4)  # the two that never held anything
    assert len(manager.match([1, 2, 3, 4, 0])) == 2
    assert manager.grow(table, 6)
    assert len(manager.match([1, 2, 3, 4, 0])) == 1  # the end of the older prefix is gone
    assert len(manager.match([5, 6, 0])) == 1
    assert manager.grow(table, 8)
    assert manager.match([1, 2, 3, 4, 0]) == []
    assert len(manager.match([5, 6, 0])) == 1


def test_growing_beyond_what_is_free_changes_nothing() -> None:
    manager = BlockManager(3, 4)
    table = BlockTable()
    assert manager.grow(table, 5)
    blocks = list(table.blocks)
    assert not manager.grow(table, 13)
    assert table.blocks == blocks
    assert manager.num_free == 1
    assert manager.grow(table, 12)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_random_use_keeps_the_books(prefix_caching: bool, fresh_seed: int) -> None:
    """A block belongs to as many tables as it has users, its contents are what its tables say, and at the end all are
    free."""
    rng = random.Random(fresh_seed)
    manager = BlockManager(17, 3, prefix_caching=prefix_caching)
    tables: list[tuple[BlockTable, list[int]]] = []
    contents: dict[int, list[int]] = {}
    hits = 0
    for _ in range(2000):
        if tables and rng.random() < 0.45:
            table, _ = tables.pop(rng.randrange(len(tables)))
            manager.release(table)
        else:
            ids = [rng.randrange(2) for _ in range(rng.randint(1, 14))]
            table = BlockTable()
            found = manager.match(ids)
            for i, block in enumerate(found):
                assert contents[block] == ids[: (i + 1) * 3]  # the whole prefix, not the block's tokens alone
            hits += len(found)
            manager.share(table, found)
            if not manager.grow(table, len(ids)):
                manager.release(table)
                continue
            for i in range(len(found), len(table.blocks)):
                contents[table.blocks[i]] = ids[: (i + 1) * 3]
            manager.register(table, ids)
            tables.append((table, ids))
        users = [block for table, _ in tables for block in table.blocks]
        assert manager.num_used == len(set(users))
        for table, ids in tables:
            for i, block in enumerate(table.blocks):
                assert contents[block] == ids[: (i + 1) * 3]
    assert (hits > 0) == prefix_caching
    for table, _ in tables:
        manager.release(table)
    assert manager.num_used == 0
