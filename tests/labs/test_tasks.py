from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fastlm.labs.questions import exact_match, f1, questions
from fastlm.labs.small_models import prepare_documents
from fastlm.labs.task_baselines import WordList, letter_ngrams, unigram_bits_per_byte
from fastlm.labs.workbench import Workbench


@pytest.mark.parametrize("language", ["ko", "en"])
def test_two_hundred_questions_whose_answers_stand_in_their_passage(language: str) -> None:
    found = questions(language, 200, 3)  # type: ignore[arg-type]
    assert len({(r.passage, r.question) for r in found}) == 200
    for r in found:
        assert r.answer in r.passage
        assert r.first in r.passage
        assert r.answer not in r.question
    first_is_right = sum(r.first == r.answer for r in found) / len(found)
    assert 0.35 < first_is_right < 0.65  # a fair coin, four standard deviations
    assert found == questions(language, 200, 3)  # type: ignore[arg-type]


def test_marks_of_known_answers() -> None:
    assert exact_match("The nurse.", "nurse") == 1.0
    assert exact_match("1987년", "1987") == 1.0
    assert f1("a small red car", "red car") == pytest.approx(0.8)  # precision 2/3, recall 1
    assert f1("", "red") == f1("blue", "red") == 0.0


def test_unigram_bits_are_the_cross_entropy_of_counted_tokens(lab: Workbench) -> None:
    from fastlm.labs import find_idea

    lab.begin(find_idea("tasks"))
    texts = [f"가나 다라 {i % 7} 마바 {i}" for i in range(400)]
    dataset = prepare_documents(lab, "small", texts, vocab_size=300)
    counts = np.bincount(dataset.train.read(0, len(dataset.train)), minlength=dataset.tokenizer.vocab_size) + 1
    total = counts.sum()
    bits = sum(
        -math.log2(counts[i] / total)
        for i in dataset.valid.read(0, len(dataset.valid)).tolist()
        if i != dataset.eos_token_id
    )
    assert unigram_bits_per_byte(dataset) == pytest.approx(bits / dataset.valid.num_bytes)
    assert 0 < unigram_bits_per_byte(dataset) < 8


def test_the_word_list_learns_what_goes_together() -> None:
    words = WordList(
        [("개 크다", "big dog"), ("개 작다", "small dog"), ("집 크다", "big house"), ("집 작다", "small house")]
    )
    assert words.translate("집 크다 모름") == "house big"


def test_letter_ngrams_tell_what_letters_tell(lab: Workbench) -> None:
    train = [("좋아좋아", "+"), ("좋다 아주", "+"), ("싫어 싫다", "-"), ("아주 싫어", "-")]
    assert letter_ngrams(lab, train, ["좋아", "싫어"]) == ["+", "-"]


def test_without_data_or_model_each_part_says_what_is_missing(tmp_path: Path) -> None:
    from fastlm.labs import find_idea, run_lab

    result = run_lab(find_idea("tasks"), Workbench(tmp_path, lang="en", model="no-such-model", data=tmp_path / "none"))
    assert not result.findings
    assert len(result.missing) == 4
    assert any("github.com/e9t/nsmc" in line for line in result.missing)
