from __future__ import annotations

import pytest
import torch

from fastlm.errors import ConfigError
from fastlm.nn.sdpa import scaled_dot_product_attention

torch_sdpa = torch.nn.functional.scaled_dot_product_attention


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_equals_torch(query, key, value, **options):
    ours, theirs = (f(query, key, value, **options) for f in (scaled_dot_product_attention, torch_sdpa))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(theirs)
    gradients = (torch.autograd.grad(out, (query, key, value), grad) for out in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(7, 7), (3, 8), (8, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_causal_is_aligned_as_torch_aligns_it(seq_q, seq_k, is_causal):
    assert_equals_torch(draw(2, 4, seq_q, 16), draw(2, 4, seq_k, 16), draw(2, 4, seq_k, 16), is_causal=is_causal)


def test_grouped_heads_and_scale_equal_torch():
    assert_equals_torch(
        draw(2, 6, 5, 16), draw(2, 2, 7, 16), draw(2, 2, 7, 16), is_causal=True, scale=0.2, enable_gqa=True
    )


@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 1, 7), (1, 4, 5, 7)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_equal_torch(shape, kind):
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    if kind == "float":
        mask = torch.randn(shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    assert_equals_torch(draw(2, 4, 5, 16), draw(2, 4, 7, 16), draw(2, 4, 7, 16), attn_mask=mask)


def test_a_mask_has_a_gradient():
    query, key, value = draw(1, 2, 3, 16), draw(1, 2, 4, 16), draw(1, 2, 4, 16)
    mask = draw(1, 1, 3, 4)
    gradients = (
        torch.autograd.grad(f(query, key, value, attn_mask=mask).square().sum(), mask)[0]
        for f in (scaled_dot_product_attention, torch_sdpa)
    )
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_query_that_sees_nothing_gives_zero():
    query = draw(1, 1, 2, 16)
    out = scaled_dot_product_attention(query, query, query, attn_mask=torch.tensor([[False, False], [True, True]]))
    assert torch.equal(out[0, 0, 0], torch.zeros(16, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_keeps_the_mean_and_follows_torchs_generator(causal):
    q, k = draw(1, 2, 4, 16), draw(1, 2, 7, 16)
    torch.manual_seed(5)
    draws = [scaled_dot_product_attention(q, k, k, dropout_p=0.3, is_causal=causal) for _ in range(600)]
    torch.manual_seed(5)
    assert torch.equal(scaled_dot_product_attention(q, k, k, dropout_p=0.3, is_causal=causal), draws[0])
    assert not torch.equal(draws[0], draws[1])
    plain = scaled_dot_product_attention(q, k, k, is_causal=causal)
    torch.testing.assert_close(torch.stack(draws).mean(0), plain, rtol=0.0, atol=0.3)


def test_what_cannot_be_done_is_refused_with_the_reason():
    q, k = draw(1, 4, 3, 16), draw(1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        scaled_dot_product_attention(q, q, q, dropout_p=1.0)
    with pytest.raises(ConfigError, match="exclude each other"):
        scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(3, 3, dtype=torch.bool), is_causal=True)
    with pytest.raises(ConfigError, match="enable_gqa=True"):
        scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match="must be"):
        scaled_dot_product_attention(q[0], q[0], q[0])
