from __future__ import annotations

import numpy as np
import pytest

from fastlm.labs import emergence, find_idea
from fastlm.labs.emergence import ANSWER, DIGITS, EQUALS, IGNORED, PLUS, Rung, largest_step, sums
from fastlm.labs.statistics import bootstrap_over_seeds
from fastlm.labs.workbench import Workbench


def test_every_sum_is_right_and_only_its_answer_is_scored() -> None:
    inputs, targets = sums(np.random.default_rng(), 200)
    for row, answer in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert (row[DIGITS], row[2 * DIGITS + 1]) == (PLUS, EQUALS)
        left, right = (int("".join(map(str, row[i : i + DIGITS]))) for i in (0, DIGITS + 1))
        assert int("".join(map(str, answer[-ANSWER:]))) == left + right
        assert set(answer[:-ANSWER]) == {IGNORED}
        assert row[-(ANSWER - 1) :] == answer[-ANSWER:-1]  # each digit is predicted from those before it


def test_largest_step_is_a_share_of_the_whole_rise() -> None:
    assert largest_step([0.0, 0.0, 1.0, 1.0]) == 1.0
    assert largest_step([0.0, 0.25, 0.5, 0.75, 1.0]) == 0.25
    assert largest_step([0.3, 0.3]) == 0.0


def test_a_small_ladder_reports_both_measures(lab: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emergence, "WIDTHS", (4, 8))
    monkeypatch.setattr(emergence, "STEPS", 3)
    monkeypatch.setattr(emergence, "QUESTIONS", 50)
    lab.begin(find_idea("emergence"))
    emergence.run(lab)
    [table] = lab.result.tables
    assert len(table.rows) == 2
    assert len(lab.result.findings) == 4
    # Untrained models guess: a digit is right about once in ten, and the log-probability is about log(1/12).
    assert all(float(row[4]) < 0.4 for row in table.rows)  # type: ignore[arg-type]


def test_the_interval_counts_seeds_as_well_as_answers() -> None:
    """Answers of one model that are all alike say no more than one: with equal seeds there is no doubt between them."""
    apart = np.repeat([[0.0], [1.0], [0.5]], 400, axis=1)
    interval = bootstrap_over_seeds(apart, seed=0)
    assert (interval.value, interval.low, interval.high) == (0.5, 0.0, 1.0)
    alike = bootstrap_over_seeds(np.tile(np.arange(400) % 2, (3, 1)).astype(float), seed=0)
    expected = 1.96 * 0.5 / np.sqrt(3 * 400)
    assert alike.high - alike.low == pytest.approx(2 * expected, rel=0.15)


def test_what_digits_make_is_taken_of_each_seed() -> None:
    """One seed is always right and one never: the mean of the products is 1/2, the product of the means 1/16."""
    right = np.stack([np.ones((10, 4), dtype=bool), np.zeros((10, 4), dtype=bool)])
    rung = Rung(100, right, np.zeros((2, 10)))
    assert rung.expected == 0.5
    assert rung.exact_of_seeds == [1.0, 0.0]


@pytest.mark.slow
def test_whole_answers_follow_from_digits(lab: Workbench) -> None:
    lab.begin(find_idea("emergence"))
    emergence.run(lab)
    assert lab.result.findings[2].holds, lab.result.findings[2].statement
