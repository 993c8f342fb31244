from __future__ import annotations

import numpy as np
import pytest

from fastlm.errors import DataError
from fastlm.training.data import TokenSplit, WindowSampler


def counting(n: int) -> TokenSplit:
    return TokenSplit([np.arange(n, dtype=np.uint32)], n)


def test_a_batch_depends_on_the_seed_and_the_step_alone() -> None:
    split = counting(1000)
    forward = WindowSampler(split, 16, 4, seed=3)
    batches = [forward.batch(step) for step in range(40)]
    for step in (39, 0, 17, 38):
        inputs, targets = WindowSampler(split, 16, 4, seed=3).batch(step)
        assert inputs.equal(batches[step][0])
        assert targets.equal(batches[step][1])
    assert not WindowSampler(split, 16, 4, seed=4).batch(0)[0].equal(batches[0][0])


def test_targets_are_the_tokens_after_the_inputs() -> None:
    inputs, targets = WindowSampler(counting(500), 16, 8, seed=0).batch(5)
    assert targets.equal(inputs + 1)
    assert inputs.diff().eq(1).all()


@pytest.mark.parametrize("tokens", [17, 18, 33, 160, 161, 1000])
def test_an_epoch_reads_each_window_once_and_the_next_epoch_in_another_order(tokens: int) -> None:
    sampler = WindowSampler(counting(tokens), 16, 1, seed=1)
    epochs = [
        [int(sampler.batch(epoch * sampler.windows + i)[0][0, 0]) for i in range(sampler.windows)] for epoch in (0, 1)
    ]
    for starts in epochs:
        assert sorted(np.diff(sorted(starts)).tolist()) == [16] * (sampler.windows - 1)
        assert max(starts) + 16 < tokens
    assert sampler.windows >= max(1, (tokens - 1) // 16 - 1)
    if sampler.windows > 3:
        assert epochs[0] != epochs[1]


def test_a_context_longer_than_the_data_is_refused_with_both_numbers() -> None:
    WindowSampler(counting(17), 16, 1, seed=0).batch(0)
    with pytest.raises(DataError, match="16 tokens: too few for a context of 16"):
        WindowSampler(counting(16), 16, 1, seed=0)
