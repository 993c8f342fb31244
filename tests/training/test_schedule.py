from __future__ import annotations

import pytest

from fastlm.training.schedule import learning_rate_scale, total_steps_when_decay_begins


def test_rate_rises_stays_and_falls_to_almost_zero() -> None:
    scales = [learning_rate_scale(step, 100, 10, 0.5) for step in range(100)]
    assert scales[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert scales[10:51] == [1.0] * 41
    assert scales[51:] == [pytest.approx((100 - i) / 50) for i in range(51, 100)]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("begin", [0, 1, 7, 100, 12_345])
def test_a_total_fixed_when_decay_begins_would_have_given_the_same_rates_before(fraction: float, begin: int) -> None:
    total = total_steps_when_decay_begins(begin, fraction)
    assert total > begin
    for step in range(max(0, begin - 50), begin if fraction < 1 else 0):
        assert learning_rate_scale(step, total, 20, fraction) == learning_rate_scale(step, None, 20, fraction)
    if begin >= 7 and fraction < 1:
        assert total == pytest.approx(begin / (1 - fraction), abs=1)
