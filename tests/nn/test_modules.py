from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fastlm.nn import (
    Attention,
    KVCache,
    LinearCrossEntropyLoss,
    LoRALinear,
    RMSNorm,
    SwiGLU,
    can_recompute,
    norm_and_project,
)
from fastlm.ops import rotary_tables


def test_swiglu_takes_a_llama_mlps_state_dict_and_gives_its_output() -> None:
    theirs = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=3))
    ours = SwiGLU(24, 40)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_swiglu_in_training_keeps_no_product_and_has_the_gradients_of_plain_torch() -> None:
    layer, x = SwiGLU(24, 40), torch.randn(3, 5, 24, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        out = layer(x)
    assert sum(shape[-1] == 40 and shape[0] != 24 for shape in kept) == 2  # gate and up
    weights = (layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight)
    plain = (torch.nn.functional.silu(x @ weights[0].T) * (x @ weights[1].T)) @ weights[2].T
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, (x, *weights), grad) for y in (out, plain))
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(ours, theirs)
    layer.down_proj.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(layer(x), x, grad)[0], theirs[0])


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_projections_keep_no_normalised_input_and_have_its_gradients(has_residual: bool, dtype) -> None:
    norm, layers = RMSNorm(24, weight_offset=1.0), [torch.nn.Linear(24, n, bias=False) for n in (40, 8)]
    torch.nn.init.normal_(norm.weight)
    leaves = [torch.randn(3, 5, 24, requires_grad=True) for _ in range(1 + has_residual)]
    weights = [norm.weight, *(layer.weight for layer in layers)]
    kept: list[tuple[int, ...]] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        x, residual = leaves[0].to(dtype), leaves[1].to(dtype) if has_residual else None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            outs, stream = norm_and_project(norm, x, residual, *layers)
        y, h = (norm(x), x) if residual is None else norm(x, residual)
        plain = [layer(y) for layer in layers]
    assert kept.count((3, 5, 24)) == 1
    grads = [torch.randn_like(out) for out in (*outs, stream)]
    ours = torch.autograd.grad((*outs, stream), (*leaves, *weights), grads, retain_graph=True)
    theirs = torch.autograd.grad((*plain, h), (*leaves, *weights), grads, retain_graph=True)
    alone = torch.autograd.grad(outs[1], leaves[0], grads[1])  # the others have no gradient
    expected = torch.autograd.grad(plain[1], leaves[0], grads[1])
    for a, b in zip((*outs, stream, *ours, *alone), (*plain, h, *theirs, *expected), strict=True):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 0.02) * b.norm()


def test_what_is_not_plain_or_not_trained_is_not_made_again() -> None:
    norm, layer = RMSNorm(24), torch.nn.Linear(24, 8, bias=False)
    assert can_recompute(norm, layer)
    assert not can_recompute(None, layer)
    assert not can_recompute(norm, torch.nn.Linear(24, 8))
    assert not can_recompute(norm, LoRALinear(layer, 2, 1.0))
    with torch.no_grad():
        assert not can_recompute(norm, layer)


def test_rms_norm_takes_a_llama_norms_state_dict_and_adds_the_residual_first() -> None:
    theirs = LlamaRMSNorm(24, eps=1e-5)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 1.5)
    ours = RMSNorm(24, 1e-5)
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    y, h = ours(x, residual)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, theirs(x + residual), rtol=1e-5, atol=1e-6)


def test_loss_equals_torch_cross_entropy_of_the_logits_and_leaves_out_ignored_targets() -> None:
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(31, 16)
    targets = torch.randint(31, (2, 9))
    targets[0, 3] = -100
    logits = hidden @ weight.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(LinearCrossEntropyLoss()(hidden, weight, targets), expected)
    each = LinearCrossEntropyLoss()(hidden, weight, targets, "none")
    assert each.shape == targets.shape
    torch.testing.assert_close(each.sum() / 17, expected)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_with_a_cache_gives_what_attention_over_everything_gives(qk_norm, num_heads, num_kv_heads) -> None:
    layer = Attention(32, num_heads, num_kv_heads, 8, qk_norm=qk_norm)
    cos, sin = rotary_tables(8, 12)
    x = torch.randn(2, 12, 32)
    whole = layer(x, cos, sin)
    cache = KVCache(1, 2, 12, num_kv_heads, 8)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    pieces = []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        positions = torch.arange(start, stop).expand(2, -1)
        pieces.append(layer(x[:, start:stop], cos, sin, positions=positions, cache=cache))
        cache.advance(stop - start)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_full_cache_refuses_more_tokens_and_names_its_capacity() -> None:
    cache = KVCache(1, 1, 4, 2, 8)
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    with pytest.raises(ValueError, match="0 of 4 tokens: no room for 5"):
        cache.attend(0, q, k, k)


def test_a_row_of_a_cache_shares_its_memory_and_a_selection_does_not() -> None:
    cache = KVCache(1, 3, 4, 1, 2)
    cache.keys.zero_()
    row = cache.row(1)
    row.keys.fill_(7)
    row.advance(2)
    assert cache.lengths.tolist() == [0, 2, 0]
    assert (cache.keys[:, 1] == 7).all()
    assert (cache.keys[:, 0] == 0).all()
    chosen = cache.select([1])
    cache.row(1).clear()
    assert chosen.lengths.tolist() == [2]
