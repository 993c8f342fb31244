"""The real model. What it must give was written down from transformers 5.24, which read the same file in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlm.errors import CheckpointError
from fastlm.model import Transformer
from fastlm.model.gguf import load_gguf
from fastlm.model.pretrained import pretrained
from fastlm.nn import QuantizedEmbedding, QuantizedLinear

FACTS = json.loads(Path(__file__).with_name("gemma3_270m.json").read_text())
LOCAL = Path(__file__).parents[2] / ".test-data" / "gemma3-270m.gguf"


@pytest.fixture(scope="module")
def path() -> Path:
    if LOCAL.is_file():
        return LOCAL
    try:
        return pretrained("gemma3-270m")
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def exact(path: Path) -> Transformer:
    return load_gguf(path, dtype=torch.float32)


def test_the_file_describes_gemma_3_270m(path: Path) -> None:
    model = load_gguf(path)
    c = model.config
    assert (c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim) == (18, 640, 4, 1, 256)
    assert (c.intermediate_size, c.sliding_window, c.vocab_size, c.qk_norm) == (2048, 512, 262_144, True)
    assert c.full_attention_layers == (5, 11, 17)
    assert (c.rope_theta, c.rope_local_theta, c.context_length) == (1_000_000.0, 10_000.0, 32_768)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 18 * 7


def test_quantized_logits_are_near_and_agree_on_the_next_token(path: Path) -> None:
    model = load_gguf(path)
    with torch.inference_mode():
        logits = model(torch.tensor([FACTS["prompt"]]))[0]
    for row, top in zip(logits, FACTS["prompt_top"], strict=True):
        ids, expected = (torch.tensor(v) for v in zip(*top, strict=True))
        assert (row[ids] - expected).norm() < 0.1 * expected.norm()
    assert logits[-1].argmax() == FACTS["prompt_top"][-1][0][0]


@pytest.mark.slow
def test_logits_in_fp32_equal_those_of_transformers_also_beyond_the_window(exact: Transformer) -> None:
    with torch.inference_mode():
        logits = exact(torch.tensor([FACTS["prompt"]]))[0]
        rows = exact.hidden_states(torch.tensor([FACTS["long"]]))[0, FACTS["long_positions"]]
        of_long = exact.logits(rows)
    for row, top in [*zip(logits, FACTS["prompt_top"], strict=True), *zip(of_long, FACTS["long_top"], strict=True)]:
        ids, expected = (torch.tensor(v) for v in zip(*top, strict=True))
        assert row.topk(len(ids)).indices.tolist() == ids.tolist()
        torch.testing.assert_close(row[ids], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_the_greedy_continuation_is_that_of_transformers(exact: Transformer) -> None:
    ids, cache = list(FACTS["prompt"]), exact.new_cache(1, 64)
    with torch.inference_mode():
        logits = exact(torch.tensor([ids]), cache)
        for _ in FACTS["greedy"]:
            ids.append(int(logits[0, -1].argmax()))
            logits = exact(torch.tensor([ids[-1:]]), cache)
    assert ids[len(FACTS["prompt"]) :] == FACTS["greedy"]
