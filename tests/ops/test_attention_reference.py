"""The definition itself against what others compute: torch, transformers, finite differences, a loop by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastlm.ops import attention
from fastlm.ops.attention import reference


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "reference")


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(7, 7), (3, 8), (1, 5)])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_sdpa_with_an_explicit_mask(seq_q, seq_k, window, causal):
    if window is not None and not causal:
        window = None
    q, k, v = draw(2, seq_q, 6, 8), draw(2, seq_k, 2, 8), draw(2, seq_k, 2, 8)
    mask = torch.tensor(
        [
            [
                (not causal or j <= i + seq_k - seq_q) and (window is None or j > i + seq_k - seq_q - window)
                for j in range(seq_k)
            ]
            for i in range(seq_q)
        ]
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    out = attention(q, k, v, causal=causal, window=window, scale=0.3)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


def test_softcap_equals_gemma2s_eager_attention():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v = draw(2, 9, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)
    causal = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    module = SimpleNamespace(num_key_value_groups=2, head_dim=8, training=False)
    expected, _ = eager_attention_forward(
        module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal[None, None], scaling=0.7, softcap=2.0
    )
    # its softmax runs in fp32
    torch.testing.assert_close(attention(q, k, v, causal=True, scale=0.7, softcap=2.0), expected, rtol=1e-6, atol=1e-6)


def test_sinks_equal_gpt_oss_eager_attention():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v, sinks = draw(2, 9, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8), draw(4)
    causal = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    expected, _ = eager_attention_forward(
        module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal[None, None], scaling=0.7
    )
    torch.testing.assert_close(
        attention(q, k, v, causal=True, scale=0.7, sinks=sinks), expected, rtol=1e-12, atol=1e-12
    )


def test_every_option_at_once_equals_a_loop_by_hand():
    seq_q, seq_k, heads, window, softcap, scale = 4, 6, 2, 3, 1.5, 0.4
    q, k, v = draw(1, seq_q, heads, 8), draw(1, seq_k, 1, 8), draw(1, seq_k, 1, 8)
    sinks, bias = draw(heads), draw(1, heads, seq_q, seq_k)
    out, lse = attention(
        q, k, v, causal=True, window=window, softcap=softcap, scale=scale, sinks=sinks, bias=bias, return_lse=True
    )
    for h in range(heads):
        for i in range(seq_q):
            position = i + seq_k - seq_q
            total, row = math.exp(sinks[h]), torch.zeros(8, dtype=torch.float64)
            for j in range(max(0, position - window + 1), position + 1):
                logit = softcap * math.tanh(float(q[0, i, h] @ k[0, j, 0]) * scale / softcap) + float(bias[0, h, i, j])
                total += math.exp(logit)
                row += math.exp(logit) * v[0, j, 0]
            torch.testing.assert_close(out[0, i, h], row / total, rtol=1e-12, atol=1e-12)
            assert lse[0, h, i].item() == pytest.approx(math.log(total), rel=1e-12)


def test_lse_is_the_logsumexp_of_the_logits():
    q, k = draw(1, 5, 2, 8), draw(1, 7, 2, 8)
    _, lse = attention(q, k, k, return_lse=True)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window": 2, "softcap": 1.3},
        {"causal": True, "sinks": True, "bias": (1, 2, 4, 1)},
        {"bias": (2, 1, 4, 5), "softcap": 2.0},
    ],
)
def test_gradients_through_out_and_lse_equal_finite_differences(options):
    q, k, v = (draw(*s).requires_grad_() for s in ((2, 4, 2, 3), (2, 5, 1, 3), (2, 5, 1, 3)))
    options = dict(options)
    sinks = draw(2).requires_grad_() if options.pop("sinks", False) else None
    bias = draw(*options.pop("bias")).requires_grad_() if "bias" in options else None

    def function(q, k, v, sinks, bias):
        return attention(q, k, v, sinks=sinks, bias=bias, **options, return_lse=True)

    assert torch.autograd.gradcheck(function, (q, k, v, sinks, bias))


def test_the_backward_written_by_hand_equals_autograd_with_rows_that_see_nothing():
    q, k, v = (draw(2, s, h, 8).requires_grad_() for s, h in ((9, 4), (5, 2), (5, 2)))
    sinks, bias = draw(4).requires_grad_(), draw(1, 4, 1, 5).requires_grad_()
    options = {"causal": True, "window": 3, "softcap": 2.0, "scale": 0.5}
    for extra in ({}, {"sinks": sinks, "bias": bias}):
        leaves = [q, k, v, *extra.values()]
        out, lse = reference.attention(q, k, v, **options, **extra)
        grad = torch.randn_like(out)
        expected = torch.autograd.grad(out, leaves, grad)
        ours = torch.autograd.grad(attention(q, k, v, **options, **extra), leaves, grad)
        assert (lse[..., :4] == (sinks.detach()[None, :, None] if extra else -torch.inf)).all()
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
