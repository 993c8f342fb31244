"""The output layer and the draw in Triton, for calls without filters, penalties or the most probable tokens.

A program of the first kernel multiplies 64 rows of hidden states with the weights of 128 tokens and keeps of their
logits, for each row and group of 32 tokens, the maximum and the sum of exp((x - maximum) / temperature): 1/16 of the
logits' bytes at most. A program of the second takes one row: the groups' sums give the mass of all, u and the mass the
group that the draw falls in (inverse CDF; u as in `sample`), and that group's 32 logits, made again from its weights,
the token. So the weights are read once, and 32 of them again for each row, 256 KB at a hidden size of 4096.

Reading the weights is what takes the time up to some hundreds of rows. Tiles are the same whatever the batch, so a row
gives the same bits whatever shares it.

With a filter the threshold is known only when all logits are, and making them twice reads the weights twice; with
penalties each row has its own logits. Such calls are served by `chunked`, whose logits take 64 MB whatever the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.attention.triton import capability, matmul, tanh
from fastlm.ops.fused_linear_sample import chunked
from fastlm.ops.sampling.triton import _finite, _locate, _uniform
from fastlm.ops.sampling.triton import supports as sampling_supports
from fastlm.ops.sampling.triton_search import LARGEST_FLOAT, LOG2_E

GROUP = tl.constexpr(32)  # tokens whose logits are made again
GROUPS = 1024  # groups that the second kernel takes at a time
DRAW_WARPS = 8
DRAW_BLOCK_K = 256  # 16 KB of weights in flight at once; with 512 registers spill


class Tiles(NamedTuple):
    """Rows, tokens and hidden dimensions a tile; warps; tiles in flight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tiles(dtype: torch.dtype, chip: int) -> Tiles:
    """`chip`: 80 for sm_80, 0 if interpreted."""
    if chip == 0:
        return Tiles(16, 64, 32, 1, 1)
    if dtype == torch.float32 or chip < 80:
        return Tiles(16, 64, 32, 4, 3)
    return Tiles(64, 128, 64, 4, 4 if 90 <= chip < 110 else 3)


def supports(hidden: Tensor, weight: Tensor, **settings: object) -> str | None:
    if weight.stride(1) != 1:
        return "needs a weight whose last dimension is contiguous"
    if hidden.dtype == torch.bfloat16 and 0 < capability(hidden.device) < 80:
        return "needs compute capability 8.0 for bf16; use fp16"
    return sampling_supports(weight.t())


@triton.jit
def _row_scale(temperature_ptr, row, mask):
    """log2(e) / temperature of rows; that of temperature 1 where it is 0."""
    temperature = tl.load(temperature_ptr + row, mask, 1.0)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(tl.div_rn(tl.full(divisor.shape, LOG2_E, tl.float32), divisor), LARGEST_FLOAT)


@triton.jit
def _sums(logits, highest, scale):
    """Sums over the last dimension of exp2((x - highest) · scale); 0 where highest is -inf, NaN where it is +inf."""
    subtract = tl.where(highest == float("-inf"), 0.0, highest)
    return tl.sum(tl.exp2((logits - subtract[:, :, None]) * scale[:, None, None]), 2)


@triton.jit(do_not_specialize=["batch", "vocab_size"])
def _group_kernel(
    hidden_ptr, weight_ptr, temperature_ptr, highest_ptr, mass_ptr, raw_mass_ptr, hidden_stride, weight_stride,
    batch, vocab_size, groups, softcap,
    SOFTCAP: tl.constexpr, RAW: tl.constexpr, HIDDEN_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    tokens = first + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_K)
    is_row, is_token = rows < batch, tokens < vocab_size
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride + dims[None, :]
    weight_ptrs = weight_ptr + tokens.to(tl.int64)[:, None] * weight_stride + dims[None, :]
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, HIDDEN_SIZE, BLOCK_K, num_stages=STAGES):
        hidden_mask, weight_mask = is_row[:, None], is_token[:, None]
        if HIDDEN_SIZE % BLOCK_K != 0:
            is_dim = (k + dims < HIDDEN_SIZE)[None, :]
            hidden_mask, weight_mask = hidden_mask & is_dim, weight_mask & is_dim
        hidden = tl.load(hidden_ptrs + k, hidden_mask, 0.0)
        weight = tl.load(weight_ptrs + k, weight_mask, 0.0)
        logits = matmul(hidden, tl.trans(weight), logits, PRECISION)
    if SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    logits = tl.where(is_token[None, :], logits, float("-inf"))
    logits = tl.reshape(logits, (BLOCK_M, BLOCK_N // GROUP, GROUP))
    highest = tl.max(logits, 2)
    scale = _row_scale(temperature_ptr, rows, is_row)
    group = first // GROUP + tl.arange(0, BLOCK_N // GROUP)
    at = rows.to(tl.int64)[:, None] * groups + group[None, :]
    mask = is_row[:, None] & (group < groups)[None, :]
    tl.store(highest_ptr + at, highest, mask)
    tl.store(mass_ptr + at, _sums(logits, highest, scale), mask)
    if RAW:
        tl.store(raw_mass_ptr + at, _sums(logits, highest, scale * 0 + LOG2_E), mask)


@triton.jit
def _mass(highest_ptr, mass_ptr, start, groups, highest, scale, GROUPS: tl.constexpr):
    """Masses of groups from `start` on, fp64, relative to a logit of `highest`."""
    group = start + tl.arange(0, GROUPS)
    its_highest = tl.load(highest_ptr + group, group < groups, float("-inf"))
    its_mass = tl.load(mass_ptr + group, group < groups, 0.0)
    return (its_mass * tl.exp2((its_highest - highest) * scale)).to(tl.float64)


@triton.jit(do_not_specialize=["vocab_size", "groups"])
def _draw_kernel(
    hidden_ptr, weight_ptr, temperature_ptr, seed_ptr, position_ptr, highest_ptr, mass_ptr, raw_mass_ptr,
    ids_ptr, valid_ptr, logprobs_ptr, processed_ptr, hidden_stride, weight_stride, vocab_size, groups, softcap,
    SOFTCAP: tl.constexpr, RAW: tl.constexpr, HIDDEN_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    highest_ptr += row * groups
    mass_ptr += row * groups
    raw_mass_ptr += row * groups
    temperature = tl.load(temperature_ptr + row)
    scale = _row_scale(temperature_ptr, row, row >= 0)
    highest = tl.full((), float("-inf"), tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        highest = tl.maximum(highest, tl.max(tl.load(highest_ptr + group, group < groups, float("-inf"))))
    total = tl.full((), 0.0, tl.float64)
    raw_total = total
    if highest > float("-inf"):
        for start in range(0, groups, GROUPS):
            total += tl.sum(_mass(highest_ptr, mass_ptr, start, groups, highest, scale, GROUPS))
            if RAW:
                raw_total += tl.sum(_mass(highest_ptr, raw_mass_ptr, start, groups, highest, LOG2_E, GROUPS))
    valid = (total > 0) & (total < float("inf")) & (temperature >= 0) & _finite(temperature)  # NaN fails each

    token = tl.full((), 0, tl.int64)
    logprob = tl.full((), float("nan"), tl.float32)
    processed = logprob
    if valid:
        greedy = temperature == 0
        target = _uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row)) * total
        found = groups * 0 - 1  # the group, and the mass before it
        last = groups * 0
        before = tl.full((), 0.0, tl.float64)
        last_before = before
        running = before
        for start in range(0, groups, GROUPS):
            masses = _mass(highest_ptr, mass_ptr, start, groups, highest, scale, GROUPS)
            if greedy:
                group = start + tl.arange(0, GROUPS)
                masses = (tl.load(highest_ptr + group, group < groups, float("-inf")) == highest).to(tl.float64)
            mass = tl.sum(masses)
            if (found < 0) & (mass > 0):
                index, index_before = _locate(masses, running, tl.where(greedy, 0.0, target), GROUPS)
                last = start + index
                last_before = index_before
                if greedy | (running + mass > target):
                    found = last
                    before = index_before
            running += mass
        if found < 0:  # rounding left the target above the last sum
            found = last
            before = last_before

        tokens = found.to(tl.int64) * GROUP + tl.arange(0, GROUP)
        is_token = tokens < vocab_size
        dims = tl.arange(0, BLOCK_K)
        products = tl.zeros((GROUP, BLOCK_K), tl.float32)
        for k in range(0, HIDDEN_SIZE, BLOCK_K):
            is_dim = k + dims < HIDDEN_SIZE
            hidden = tl.load(hidden_ptr + row * hidden_stride + k + dims, is_dim, 0.0).to(tl.float32)
            weight_ptrs = weight_ptr + tokens[:, None] * weight_stride + (k + dims)[None, :]
            weight = tl.load(weight_ptrs, is_token[:, None] & is_dim[None, :], 0.0).to(tl.float32)
            products += weight * hidden[None, :]
        logits = tl.sum(products, 1)
        if SOFTCAP:
            logits = softcap * tanh(logits / softcap)
        logits = tl.where(is_token, logits, float("-inf"))
        if greedy:
            masses = (logits == tl.max(logits)).to(tl.float64)
        else:
            masses = tl.exp2((logits - highest) * scale).to(tl.float64)
        index, before = _locate(masses, before, tl.where(greedy, 0.0, target), GROUP)
        token = found.to(tl.int64) * GROUP + index
        if RAW:
            logit = tl.max(tl.where(tl.arange(0, GROUP) == index, logits, float("-inf")))
            logprob = (logit - highest) - tl.log(raw_total).to(tl.float32)
            processed = tl.where(greedy, 0.0, tl.div_rn(logit - highest, temperature) - tl.log(total).to(tl.float32))
    tl.store(ids_ptr + row, token)
    tl.store(valid_ptr + row, valid)
    if RAW:
        tl.store(logprobs_ptr + row, logprob)
        tl.store(processed_ptr + row, processed)


def fused_linear_sample(
    hidden: Tensor,
    weight: Tensor,
    settings: tuple[Tensor | None, ...],
    min_p_first: bool,
    softcap: float | None,
    return_logprobs: bool,
    num_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`settings`: temperature, top_k, top_p, min_p, three penalties, prompt_ids, output_ids, logit_bias, mask, seed,
    position."""
    temperature, *others, _, _, logit_bias, mask, seed, position = settings
    if num_logprobs or any(s is not None for s in (*others, logit_bias, mask)):
        return chunked.fused_linear_sample(
            hidden, weight, settings, min_p_first, softcap, return_logprobs, num_logprobs
        )  # fmt: skip
    assert temperature is not None
    assert seed is not None
    assert position is not None
    batch, hidden_size = hidden.shape
    vocab_size, device = weight.shape[0], hidden.device
    ids = torch.empty(batch, dtype=torch.int64, device=device)
    valid = torch.empty(batch, dtype=torch.bool, device=device)
    logprobs = torch.empty(batch if return_logprobs else 0, dtype=torch.float32, device=device)
    processed = torch.empty_like(logprobs)
    nothing = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.float32, device=device)
    if batch == 0:
        return ids, valid, logprobs, processed, *nothing
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    temperature = temperature.contiguous()
    groups = triton.cdiv(vocab_size, GROUP.value)
    highest, mass = (torch.empty((batch, groups), dtype=torch.float32, device=device) for _ in range(2))
    raw_mass = torch.empty_like(mass) if return_logprobs else mass
    if not hidden.is_cuda:
        precision = "widened"
    else:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    cut = tiles(hidden.dtype, capability(device))
    options = {"SOFTCAP": softcap is not None, "RAW": return_logprobs, "HIDDEN_SIZE": hidden_size}
    cap = 1.0 if softcap is None else softcap
    _group_kernel[(triton.cdiv(batch, cut.block_m), triton.cdiv(vocab_size, cut.block_n))](
        hidden, weight, temperature, highest, mass, raw_mass, hidden.stride(0), weight.stride(0), batch, vocab_size,
        groups, cap, **options, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, PRECISION=precision,
        STAGES=cut.num_stages, num_warps=cut.num_warps,
    )  # fmt: skip
    _draw_kernel[(batch,)](
        hidden, weight, temperature, seed.contiguous(), position.contiguous(), highest, mass, raw_mass,
        ids, valid, logprobs, processed, hidden.stride(0), weight.stride(0), vocab_size, groups, cap,
        **options, BLOCK_K=DRAW_BLOCK_K, GROUPS=GROUPS, num_warps=DRAW_WARPS,
    )  # fmt: skip
    return ids, valid, logprobs, processed, *nothing
