from __future__ import annotations

import numpy as np
import pytest

from fastlm.labs import find_idea, rnn
from fastlm.labs.episodes import IGNORED
from fastlm.labs.equal_models import matched, parameters, transformer
from fastlm.labs.rnn import ASK, SYMBOLS, puzzle
from fastlm.labs.workbench import Workbench
from fastlm.model import build_model


def test_every_network_has_as_many_parameters_within_a_twentieth() -> None:
    for shape in (transformer(ASK + 1, 32, 1024), transformer(512, 64, 64)):
        counts = {kind: sum(p.numel() for p in build_model(c).parameters()) for kind, c in matched(shape).items()}
        assert set(counts) == {"transformer", "rnn", "lstm", "gru"}
        assert max(counts.values()) < 1.05 * min(counts.values()), counts
        assert parameters(shape) == counts["transformer"]


@pytest.mark.parametrize("distance", rnn.DISTANCES)
def test_the_answer_of_a_puzzle_stands_that_far_back(distance: int) -> None:
    inputs, targets = puzzle(np.random.default_rng(), 8, distance)
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row[-1] == ASK
        [at] = [place for place, token in enumerate(row[:-1]) if token >= SYMBOLS]
        assert len(row) - 1 - at == distance
        assert answers[-1] == row[at]
        assert set(answers[:-1]) == {IGNORED}


def test_a_small_lab_says_each_of_its_claims(lab: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rnn, "RECALL_STEPS", 2)
    monkeypatch.setattr(rnn, "DISTANCES", (1, 4))
    monkeypatch.setattr(rnn, "LENGTHS", (8, 16))
    monkeypatch.setattr(rnn, "TIMED_RUNS", 1)
    monkeypatch.setattr(rnn, "TEXT_STEPS", 2)
    monkeypatch.setattr(rnn, "REVIEWS", 300)
    lab.begin(find_idea("rnn"))
    rnn.run(lab)
    assert len(lab.result.findings) == 5 - len(lab.result.missing)
    assert [table.columns[2:4] for table in lab.result.tables[:1]] == [["k=1", "k=4"]]
