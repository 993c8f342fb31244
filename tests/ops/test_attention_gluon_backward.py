"""The Hopper kernels of attention's backward, run by the simulator of their barriers and copies. On a GPU they are
tested in test_attention_gluon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlm.ops import tuning
from fastlm.ops._registry import missing
from tests.ops.gluon_simulator import Simulation, SimulationError
from tests.ops.helpers import assert_as_exact_as, poisoned_memory
from tests.ops.test_attention import plain_attention
from tests.ops.test_attention_gluon import draw

pytestmark = pytest.mark.skipif(missing("gluon") is not None, reason=str(missing("gluon")))

KERNELS = Path(__file__).resolve().parents[2] / "fastlm" / "ops" / "attention" / "gluon_backward_kernels.py"

# seq_q, seq_k, heads, kv_heads, head_dim, causal, rows a tile, stages. A block of either grid has 128 rows of its own.
CASES: dict[str, tuple[int, int, int, int, int, bool, int, int]] = {
    "one query, one key": (1, 1, 1, 1, 64, True, 16, 2),
    "one query": (1, 53, 4, 2, 64, True, 16, 2),
    "full, gqa, odd": (67, 91, 4, 2, 64, False, 16, 3),
    "full, tiles": (64, 128, 2, 1, 64, False, 16, 2),
    "causal": (200, 200, 2, 1, 64, True, 32, 2),
    "causal, tiles": (128, 128, 1, 1, 64, True, 16, 4),
    "causal, tile + 1, mqa": (129, 129, 3, 1, 64, True, 32, 3),
    "causal, more keys, shifted": (61, 163, 2, 1, 64, True, 16, 2),
    "causal, more queries": (150, 61, 2, 1, 64, True, 16, 2),
    "causal, queries without keys": (300, 3, 1, 1, 64, True, 64, 2),
    "head_dim 128": (70, 90, 2, 1, 128, True, 32, 3),
}


def exact_gradients(tensors: list[Tensor], grad: Tensor, grad_lse: Tensor, causal: bool, dtype: torch.dtype):
    """(out, lse, gradients) of plain attention in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out, lse = plain_attention(*leaves, causal=causal)
    empty = lse == -torch.inf
    grads = torch.autograd.grad(
        (out, lse.masked_fill(empty, 0.0)), leaves, (grad.to(dtype), (grad_lse * ~empty).to(lse.dtype))
    )
    return out.detach(), lse.detach(), grads


def check_backward(
    tensors: list[Tensor], causal: bool, block: int, stages: int, source: str | Path = KERNELS, seed: int = 0
) -> None:
    from fastlm.ops.attention import gluon, gluon_backward

    q, k, v = tensors
    grad = torch.randn(q.shape).to(q.dtype)
    grad_lse = torch.randn(q.shape[0], q.shape[2], q.shape[1]) * 0.1
    out, lse, exact = exact_gradients(tensors, grad, grad_lse, causal, torch.float64)
    _, _, plain = exact_gradients(tensors, grad, grad_lse, causal, q.dtype)
    delta = (out * grad).sum(-1).transpose(1, 2) - grad_lse * (lse > -torch.inf)
    call = gluon_backward.Call(
        q, k, v, grad, lse.float().contiguous(), delta.float().contiguous(), causal, q.shape[-1] ** -0.5
    )
    with poisoned_memory():
        ours = [torch.empty(t.shape, dtype=t.dtype) for t in tensors]
    tiles = gluon.Tiles(block, stages)
    for name, launch in (
        ("keys_kernel", gluon_backward.plan_keys(call, ours[1], ours[2], tiles)),
        ("queries_kernel", gluon_backward.plan_queries(call, ours[0], tiles)),
    ):
        Simulation(source, seed).run(name, launch.grid, launch.args, launch.constants)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_as_exact_as(a, b, c)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_match_float64_however_warps_and_copies_interleave(case, dtype, fresh_seed):
    *shape, causal, block, stages = CASES[case]
    tensors = draw(tuple(shape), dtype)
    for seed in range(fresh_seed, fresh_seed + 2):
        check_backward(tensors, causal, block, stages, seed=seed)


def test_a_head_whose_gradient_is_not_finite_harms_no_other():
    """A tile of queries may reach into the next head's lse and delta."""
    from fastlm.ops.attention import gluon, gluon_backward

    q, k, v = draw((70, 70, 2, 2, 64), torch.bfloat16)
    grad = torch.randn(q.shape).bfloat16()
    lse, delta = torch.zeros(2, 2, 70), torch.zeros(2, 2, 70)
    lse[:, 1], delta[:, 1] = float("nan"), float("nan")
    call = gluon_backward.Call(q, k, v, grad, lse, delta, True, 0.125)
    grad_k, grad_v = (torch.empty(k.shape, dtype=k.dtype) for _ in range(2))
    launch = gluon_backward.plan_keys(call, grad_k, grad_v, gluon.Tiles(64, 2))
    source = KERNELS.read_text()
    for mask in ("", "gl.where(queries < seq_q, lse,", "gl.where(queries < seq_q, delta_smem"):
        assert source.count(mask) == 1 or not mask
        changed = source.replace(mask, mask.replace("< seq_q", "< seq_q + 99")) if mask else source
        Simulation(changed, 0).run("keys_kernel", launch.grid, launch.args, launch.constants)
        harmed = not all(torch.isfinite(t[:, :, 0]).all() for t in (grad_k, grad_v))
        assert harmed == bool(mask)


MUTATIONS: dict[str, tuple[str, str]] = {
    "a slot of queries is filled while it is read": ("mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)", "#"),
    "a slot of keys is filled while it is read": ("mbarrier.wait(empty.index(slot), phase ^ 1)", "#"),
    "the producer waits for the other phase": ("(i // STAGES & 1) ^ 1)", "i // STAGES & 1)"),
    "queries are read before they are there": ("mbarrier.wait(full.index(slot), (done + j) // STAGES & 1)", "#"),
    "the phase does not go on from head to head": ("(done + j) // STAGES & 1)", "j // STAGES & 1)"),
    "the first keys are read before they are there": ("    mbarrier.wait(k_full.index(0), 0)\n", ""),
    "values are read before they are there": ("mbarrier.wait(v_full.index(slot), phase)\n", "#\n"),
    "the next keys are read before they are there": (
        "mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < count)", "#"),
    "logits are used in flight": (
        "        logits = warpgroup_mma_wait(1, [logits])\n        if MASKED:",
        "        logits = warpgroup_mma_wait(2, [logits])\n        if MASKED:"),
    "gradients of weights are used in flight": (
        "grad_weights = warpgroup_mma_wait(1, [grad_weights])", "grad_weights = warpgroup_mma_wait(2, [grad_weights])"),
    "dK is used in flight": ("warpgroup_mma_wait(0, [grad_v, grad_k,", "warpgroup_mma_wait(1, [grad_v, grad_k,"),
    "queries are given back before the products are done": (
        "        grad_v, grad_k, p, ds = warpgroup_mma_wait(0, [grad_v, grad_k, p, ds])\n"
        "        mbarrier.arrive(empty.index(slot))\n",
        "        mbarrier.arrive(empty.index(slot))\n"
        "        grad_v, grad_k, p, ds = warpgroup_mma_wait(0, [grad_v, grad_k, p, ds])\n"),
    "keys are given back before dQ is done": (
        "        grad_q, ds = warpgroup_mma_wait(0, [grad_q, ds])\n        mbarrier.arrive(empty.index(slot))\n",
        "        mbarrier.arrive(empty.index(slot))\n        grad_q, ds = warpgroup_mma_wait(0, [grad_q, ds])\n"),
    "one consumer of two gives queries back": (
        "    full = allocate_barriers(STAGES, 1)\n    empty = allocate_barriers(STAGES, CONSUMERS)",
        "    full = allocate_barriers(STAGES, 1)\n    empty = allocate_barriers(STAGES, 1)"),
    "a copy's bytes are not all announced": (
        "2 * (q_desc.block_type.nbytes + lse_desc", "(q_desc.block_type.nbytes + lse_desc"),
    "dK is stored without a fence": (
        "    fence_async_shared()\n    tma_store(grad_k_desc", "    tma_store(grad_k_desc"),
    "the diagonal is not masked": ("keys[:, None] <= (queries + shift)", "keys[:, None] <= (queries + shift + 1)"),
    "one tile too few is masked": ("masked = gl.minimum(before + 1, count)", "masked = gl.minimum(before, count)"),
    "the walk starts a tile too late": ("// BLOCK_M * BLOCK_M", "// BLOCK_M * BLOCK_M + BLOCK_M"),
    "heads are read at seq_q instead of the pitch": ("(seq_q + 3) // 4 * 4", "seq_q"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_simulator_notices_each_mutation_of_the_backward_kernels(mutation):
    source, (old, new) = KERNELS.read_text(), MUTATIONS[mutation]
    assert source.count(old) == 1, f"the kernels have {source.count(old)} times: {old}"
    source = source.replace(old, new)
    for seed in range(10):
        tensors = draw((150, 171, 2, 1, 64), torch.bfloat16)
        try:
            check_backward(tensors, True, 16, 2, source, seed)
        except (SimulationError, AssertionError):
            return
    pytest.fail("no interleaving showed it")


def test_which_backward_follows_gluons_forward(monkeypatch):
    from fastlm.ops.attention import gluon, gluon_backward, triton_backward

    monkeypatch.setattr(gluon_backward, "backward", lambda *_: ("gluon",) * 3)
    monkeypatch.setattr(triton_backward, "backward", lambda *_: ("triton",) * 5)

    def served_by(head_dim: int) -> str:
        q, k, v = draw((5, 5, 1, 1, head_dim), torch.bfloat16)
        options = (None, None, None, None, None, None, True, None, None, 0.125, 0.0, None, False)
        return gluon.backward(q, None, q, k, v, q, torch.zeros(2, 1, 5), *options)[0]

    monkeypatch.setenv("FASTLM_BACKEND", "gluon")
    assert [served_by(head_dim) for head_dim in (64, 128, 256)] == ["gluon", "gluon", "triton"]
    monkeypatch.delenv("FASTLM_BACKEND")
    assert served_by(64) == "triton"
    record = {"backends": {tuning.backend_key("backward", 64, True): "gluon"}, "tiles": {}}
    monkeypatch.setattr(tuning, "record", lambda device: record)
    assert [served_by(head_dim) for head_dim in (64, 128)] == ["gluon", "triton"]
