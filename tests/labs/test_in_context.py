from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastlm.labs import in_context
from fastlm.labs.data_in_context import ANIMALS, PAIRS, TOOLS, repeated
from fastlm.labs.episodes import IGNORED
from fastlm.labs.in_context import Task, draw, induction, prompt
from fastlm.labs.workbench import Workbench

INVENTED = Task("", "", "{} ->", [(x, "zib") for x in ANIMALS] + [(x, "kov") for x in TOOLS], ("zib", "kov"))


@pytest.mark.parametrize("count", in_context.SHOTS)
def test_no_question_is_among_its_examples_and_labels_are_even(count: int) -> None:
    for seed in range(5):
        shots, questions = draw(INVENTED, count, seed, "true")
        assert len(shots) == count
        assert not {x for x, _ in shots} & {x for x, _ in questions}
        assert sum(y == "zib" for _, y in questions) == in_context.QUESTIONS // 2
        assert abs(sum(1 if y == "zib" else -1 for _, y in shots)) <= 1
        shuffled, same = draw(INVENTED, count, seed, "shuffled")
        assert same == questions
        assert [x for x, _ in shuffled] == [x for x, _ in shots]
        assert sorted(y for _, y in shuffled) == sorted(y for _, y in shots)


def test_words_are_enough_and_different() -> None:
    assert len({korean for korean, _ in PAIRS}) == len(PAIRS) >= in_context.QUESTIONS + in_context.SHOTS[-1]
    assert not set(ANIMALS) & set(TOOLS)
    assert prompt(INVENTED, [("dog", "zib")], "saw") == "dog -> zib\n\nsaw ->"


def test_what_is_scored_has_occurred_before_with_its_answer() -> None:
    inputs, targets = repeated(np.random.default_rng(), 16)
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        for at, answer in enumerate(answers):
            if answer != IGNORED:
                earlier = row.index(row[at])
                assert earlier < at
                assert row[earlier + 1] == answer
    assert (targets != IGNORED).float().mean() > 0.5


@pytest.mark.slow
def test_two_layers_learn_to_copy_and_one_does_not(lab: Workbench) -> None:
    from fastlm.labs import find_idea

    lab.begin(find_idea("in-context"))
    with lab.part("", ""):
        induction(lab)
    [finding] = lab.result.findings
    assert finding.holds, finding.statement
    assert (Path(lab.out) / "runs").exists()
