"""A real model over the real protocol: Gemma 3 270M, where its packages are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from fastlm.errors import CheckpointError
from fastlm.inference import LLM, SamplingParams
from fastlm.model.pretrained import pretrained
from fastlm.tokenizer import as_transformers
from tests.serve.conftest import Running, serving


@pytest.fixture(scope="module")
def gemma() -> Iterator[Running]:
    try:
        path = pretrained("gemma3-270m")
    except CheckpointError as error:
        pytest.skip(str(error))
    with LLM(path, memory=1 << 29) as llm, serving(llm, name="gemma3-270m") as running:
        yield running


def test_gemma_continues_and_streams(gemma: Running) -> None:
    with openai.OpenAI(base_url=f"{gemma.url}/v1", api_key="none") as client:
        asked = {"model": "gemma3-270m", "prompt": "The capital of France is", "max_tokens": 7, "temperature": 0}
        assert client.completions.create(**asked).choices[0].text.startswith(" the capital of the country of France")
        events = list(client.completions.create(**asked, stream=True))
        assert len(events) == 7
        assert "".join(event.choices[0].text for event in events) == " the capital of the country of France"


@pytest.mark.slow
def test_lm_eval_scores_over_the_server_as_the_model_does(gemma: Running, tmp_path: Path) -> None:
    """lm-evaluation-harness's local-completions, with its own requests, against our scores of the same tokens."""
    clients = pytest.importorskip("lm_eval.models.openai_completions", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance

    as_transformers(gemma.llm.tokenizer).save_pretrained(tmp_path)
    model = clients.LocalCompletionsAPI(
        base_url=f"{gemma.url}/v1/completions", model="gemma3-270m", tokenizer=str(tmp_path), max_length=2048
    )
    pairs = [("The capital of France is", " Paris"), ("The sky is", " blue"), ("1, 2, 3,", " 4, 5")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, continuation), (logprob, greedy) in zip(pairs, model.loglikelihood(asked), strict=True):
        ids = model.tok_encode(context + continuation)
        tokens = len(ids) - len(model.tok_encode(context))
        (score,) = gemma.llm.score([ids])
        assert logprob == pytest.approx(sum(score.logprobs[-tokens:]), abs=1e-3)
        (alone,) = gemma.llm.generate([ids[:-tokens]], SamplingParams(max_tokens=tokens, temperature=0))
        assert greedy == (alone.token_ids == ids[-tokens:])
    until = Instance("generate_until", {}, ("1, 2, 3,", {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}), 0)
    ids = model.tok_encode("1, 2, 3,")
    (alone,) = gemma.llm.generate([ids], SamplingParams(max_tokens=8, temperature=0, stop=("\n",)))
    assert model.generate_until([until]) == [alone.text]
