from __future__ import annotations

import numpy as np
import pytest

from fastlm.labs import emergence, find_idea
from fastlm.labs.emergence import ANSWER, DIGITS, EQUALS, IGNORED, PLUS, largest_step, sums
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
    assert len(lab.result.findings) == 3
    # Untrained models guess: a digit is right about once in ten, and the log-probability is about log(1/12).
    assert all(float(row[3]) < 0.4 for row in table.rows)  # type: ignore[arg-type]


@pytest.mark.slow
def test_whole_answers_follow_from_digits(lab: Workbench) -> None:
    lab.begin(find_idea("emergence"))
    emergence.run(lab)
    assert lab.result.findings[2].holds, lab.result.findings[2].statement
