"""The functions of the flash-attn package against their definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastlm.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastlm.errors import ConfigError

BIG = 10**6  # keys to a side: all of them


def visible(seq_q: int, seq_k: int, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """flash-attn's README: the bottom right corners of queries and keys stand together; a window is inclusive."""
    queries = torch.arange(seq_q)[:, None] + seq_k - seq_q
    keys = torch.arange(seq_k)
    left, right = (BIG if side < 0 else side for side in window)
    return (keys >= queries - left) & (keys <= queries + (0 if causal else right))


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `(batch, seq, heads, head_dim)`; a query that sees nothing gives zero."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.double().transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    logits = q @ k.transpose(2, 3) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if slopes is not None:
        queries = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        logits = logits - slopes.double().view(-1, slopes.shape[-1], 1, 1) * (queries - torch.arange(k.shape[2])).abs()
    logits = logits.masked_fill(~visible(q.shape[2], k.shape[2], causal, window), -torch.inf)
    probabilities = torch.softmax(logits, -1).nan_to_num(0.0)
    return (probabilities @ v).transpose(1, 2), logits.logsumexp(-1)


def draw(seed: int, seq_q: int = 13, seq_k: int = 19) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, h, 16, generator=generator) for n, h in ((seq_q, 4), (seq_k, 2), (seq_k, 2))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window": (4, 0)},
        {"causal": True, "window": (4, 3)},
        {"window": (4, 0)},
        {"window": (-1, 0)},
        {"causal": True, "scale": 0.7, "softcap": 2.0},
        {"causal": True, "slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        {"slopes": torch.rand(2, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(13, 19), (19, 13), (1, 9), (7, 7)])
def test_flash_attn_func_is_its_definition(options: dict, sizes: tuple[int, int], fresh_seed: int) -> None:
    q, k, v = draw(fresh_seed, *sizes)
    expected, lse = by_definition(q, k, v, **options)
    names = {"window": "window_size", "scale": "softmax_scale", "slopes": "alibi_slopes"}
    theirs = {names.get(name, name): value for name, value in options.items()}
    torch.testing.assert_close(flash_attn_func(q, k, v, **theirs).double(), expected, rtol=1e-5, atol=1e-5)
    out, found_lse, probabilities = flash_attn_func(q, k, v, return_attn_probs=True, **theirs)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_lse.double(), lse, rtol=1e-5, atol=1e-5)
    assert probabilities is None


@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
def test_flash_attn_varlen_func_is_its_definition_for_each_sequence(window: tuple[int, int], fresh_seed: int) -> None:
    lengths_q, lengths_k = (5, 0, 9, 1), (7, 3, 9, 6)
    parts = [draw(fresh_seed + i, *sizes) for i, sizes in enumerate(zip(lengths_q, lengths_k, strict=True))]
    q, k, v = (torch.cat([part[i][0] for part in parts]).requires_grad_() for i in range(3))
    offsets = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    out = flash_attn_varlen_func(q, k, v, *offsets, 9, 9, causal=True, window_size=window)
    expected = [by_definition(*(t[:1] for t in part), causal=True, window=window)[0][0] for part in parts]
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))


def test_what_is_not_supported_is_refused_by_name(fresh_seed: int) -> None:
    q, k, v = draw(fresh_seed)
    for options in ({"window_size": (3, 2)}, {"window_size": (3, -1)}, {"window_size": (-1, 2)}):
        with pytest.raises(ConfigError, match="window"):
            flash_attn_func(q, k, v, **options)
    with pytest.raises(ConfigError, match=r"dropout_p=0\.1"):
        flash_attn_func(q, k, v, dropout_p=0.1)
    offsets = torch.tensor([0, 13], dtype=torch.int32)
    packed = (q[0], q[0], q[0], offsets, offsets, 13, 13)
    with pytest.raises(ConfigError, match="alibi_slopes"):
        flash_attn_varlen_func(*packed, alibi_slopes=torch.ones(4))
    with pytest.raises(ConfigError, match="block_table"):
        flash_attn_varlen_func(*packed, block_table=torch.zeros(1, 1, dtype=torch.int32))
