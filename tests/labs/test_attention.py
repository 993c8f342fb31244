"""The attention lab: what it measures against outside facts, and what it claims at small size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlm.labs import attention
from fastlm.labs.attention_measures import attention_maps, induction, largest, shuffled, uniform, where
from fastlm.labs.workbench import Workbench
from fastlm.model import ModelConfig, build_model
from fastlm.training.config import Preset
from tests.labs.conftest import failed

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64,
    context_length=64,
)  # fmt: skip


def test_maps_are_the_attention_that_the_model_computes():
    """The model's own output of a layer is its maps times its values."""
    model = build_model(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    seen = {}
    layer = model.model.layers[1].self_attn
    layer.v_proj.register_forward_hook(lambda module, inputs, out: seen.update(values=out))
    layer.o_proj.register_forward_pre_hook(lambda module, inputs: seen.update(mixed=inputs[0]))
    ids = torch.randint(0, 50, (17,)).tolist()
    maps = attention_maps(model, ids)
    assert maps.shape == (2, 4, 17, 17)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 17))
    assert (maps.triu(1) == 0).all()
    values = seen["values"][0].view(17, 2, 8).repeat_interleave(2, dim=1)  # two query heads share a key head
    mixed = torch.einsum("hqk,khd->qhd", maps[1], values).reshape(17, 32)
    torch.testing.assert_close(seen["mixed"][0], mixed, rtol=1e-4, atol=1e-5)


def test_shares_of_heads_whose_places_are_known():
    eye = torch.eye(6)
    before = torch.zeros(6, 6)
    before[torch.arange(1, 6), torch.arange(5)] = 1
    before[0, 0] = 1
    first = torch.zeros(6, 6)
    first[:, 0] = 1
    found = where(torch.stack([eye, before, first])[None])
    assert found.itself.tolist() == [[1, 0, 0]]
    assert found.previous.tolist() == [[0, 1, 0]]
    assert found.first.tolist() == [[0, 0, 1]]
    assert found.distance.tolist() == [[0, 1, 3.5]]  # queries 2, 3, 4, 5 look so far back
    assert found.entropy.abs().max() < 1e-9
    even = uniform(4)
    assert even.first.item() == even.previous.item() == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert even.distance.item() == pytest.approx((1 + 1.5) / 2)


def test_induction_looks_at_what_followed_the_first_occurrence():
    """In A B C A B C the queries of the second half look at B, C, A."""
    maps = torch.zeros(1, 2, 7, 7)  # the first token begins the text
    maps[0, 1, [4, 5, 6], [2, 3, 4]] = 1
    assert induction(maps, 3).tolist() == [[0, 1]]
    assert largest(induction(maps, 3)) == (0, 1)


def test_shuffling_keeps_the_tokens_and_the_first():
    ids = torch.randperm(40).tolist()
    mixed = shuffled(ids, torch.Generator().manual_seed(0))
    assert mixed[0] == ids[0]
    assert mixed != ids
    assert sorted(mixed) == sorted(ids)


def test_a_head_that_looks_back_comes_with_learning(run, monkeypatch, shared_data):
    if shared_data is None:
        pytest.skip("the texts of nsmc are not there")
    monkeypatch.setattr(attention, "DOCUMENTS", 2500)
    monkeypatch.setattr(attention, "VOCAB_SIZE", 384)
    monkeypatch.setattr(attention, "SMALL", Preset(64, 2, 32, context_length=48, batch_size=16))
    monkeypatch.setattr(attention, "STEPS", 250)
    monkeypatch.setattr(Workbench, "seeds", lambda lab: [0])
    result = run("attention")
    assert len(result.findings) == 1
    assert failed(result) == []
    assert "no-model" in result.missing[0]


@pytest.mark.slow
@pytest.mark.parametrize("lang", ["ko", "en"])
def test_claims_about_gemma_hold(run, gemma, tmp_path, lang):
    result = run("attention", model=gemma, lang=lang, data=tmp_path)
    assert failed(result) == []
    assert len(result.findings) == 4
    assert len(result.pictures) == 3
