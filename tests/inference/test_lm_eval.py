"""The adapter for lm-evaluation-harness, where that is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.inference import SamplingParams
from fastlm.model import Transformer, save_model
from fastlm.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed")


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def saved(model: Transformer, tokenizer: Tokenizer, directory: Path) -> Path:
    save_model(model, directory / "model")
    tokenizer.save(directory / "model" / "tokenizer.json")
    return directory / "model"


@pytest.fixture
def harness(llama: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Any]:
    from fastlm.inference.lm_eval import FastLM

    made = FastLM(str(saved(llama, tokenizer, tmp_path)), batch_size=1)
    yield made
    made.llm.close()


def logprobs(harness: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return harness.llm.model(torch.tensor([ids]))[0].log_softmax(-1)


def test_continuations_have_the_models_own_probabilities(harness) -> None:
    pairs = [("The film", " was good"), ("The film", " 음악도"), ("", "이 영화는"), ("The film was", " 🎬")]
    for (context, continuation), (logprob, greedy) in zip(
        pairs, harness.loglikelihood(instances("loglikelihood", pairs)), strict=True
    ):
        given = harness.tok_encode(context) if context else [harness.prefix_token_id]
        following = harness.tok_encode(context + continuation, add_special_tokens=False)[len(given) if context else 0 :]
        rows = logprobs(harness, given + following)[len(given) - 1 : -1]
        expected = rows.gather(1, torch.tensor(following)[:, None]).sum()
        assert logprob == pytest.approx(float(expected), abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == torch.tensor(following)).all())


def test_long_texts_are_scored_token_by_token_once(harness) -> None:
    text = "이 영화는 정말 재미있었다. The film was good! " * 8
    ids = harness.tok_encode(text, add_special_tokens=False)
    assert len(ids) > 2 * harness.max_length
    (total,) = harness.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    room, expected, end = harness.max_length - 1, 0.0, 0
    while end < len(ids):
        since, end = end, min(len(ids), end + room)
        window = [harness.prefix_token_id, *ids[:end]] if since == 0 else ids[end - room - 1 : end]
        rows = logprobs(harness, window)
        expected += sum(float(rows[len(window) - 1 - (end - i), ids[i]]) for i in range(since, end))
    assert total == pytest.approx(expected, rel=1e-3)


def test_texts_go_on_greedily_up_to_the_tasks_stop(harness) -> None:
    settings = {"until": ["e"], "max_gen_toks": 12, "temperature": 0, "do_sample": False}
    (text,) = harness.generate_until(instances("generate_until", [("The film", settings)]))
    params = SamplingParams(max_tokens=12, temperature=0, stop=("e",))
    assert text == harness.llm.generate([harness.tok_encode("The film")], params)[0].text


def test_the_harness_runs_a_task_by_its_own_command(llama, tokenizer, tmp_path) -> None:
    model = saved(llama, tokenizer, tmp_path)
    questions = [{"prompt": "The film", "choices": [" was", " 음악", "!"], "answer": i % 3} for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    command = [sys.executable, "-m", "fastlm.inference.lm_eval", "run", "--model", "fastlm"]
    command += ["--model_args", f"model={model}", "--tasks", "tiny", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "results")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["tiny"]["acc,none"]
    assert accuracy == pytest.approx(1 / 3)  # the same choice of three each time, right in two of six
