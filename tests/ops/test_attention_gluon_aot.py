"""Attention's Hopper kernels, compiled for sm_90 without a GPU: what their design asks of the machine code."""

from __future__ import annotations

import re

import pytest

from fastlm.ops._registry import missing
from tests.ops.helpers import Compiled, compile_for_chips

pytestmark = [pytest.mark.aot, pytest.mark.skipif(missing("gluon") is not None, reason=str(missing("gluon")))]

SHARED_LIMIT = 227 * 1024
HEAD_DIMS = [64, 128, 256]
DTYPES = ["bf16", "fp16"]


def compile_kernel(name: str, head_dim: int, causal: bool, dtype: str) -> Compiled:
    from triton.experimental.gluon._runtime import GluonASTSource

    from fastlm.ops.attention import gluon, gluon_kernels

    kernel = getattr(gluon_kernels, name)
    tiles = gluon.TILES[head_dim]
    rows = {"q": gluon_kernels.ROWS.value, "k": tiles.block, "v": tiles.block, "out": gluon_kernels.ROWS.value}
    signature = {f"{t}_desc": f"tensordesc<{dtype}[1, {n}, 1, {head_dim}],{gluon._LAYOUT!r}>" for t, n in rows.items()}
    signature |= {"lse_ptr": "*fp32", "factor": "fp32"} | dict.fromkeys(["heads", "group", "seq_q", "seq_k"], "i32")
    constants = {"CAUSAL": causal, "HEAD_DIM": head_dim, "BLOCK_N": tiles.block, "STAGES": tiles.stages}
    (compiled,) = compile_for_chips(kernel, signature, constants, capabilities=[90], source=GluonASTSource)
    return compiled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_products_and_copies_are_hoppers_and_registers_suffice(head_dim, causal, dtype):
    compiled = compile_kernel("forward_kernel", head_dim, causal, dtype)
    assert compiled.chip == "sm_90a"
    products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", compiled.ptx)
    from_registers = [a == "{" for a in products]
    assert any(from_registers)  # P · V
    assert not all(from_registers)  # Q · Kᵀ
    assert "mma.sync" not in compiled.ptx
    assert re.search(r"cp\.async\.bulk\.tensor\.4d\.shared::(cta|cluster)\.global", compiled.ptx)
    assert "cp.async.bulk.tensor.4d.global.shared::cta" in compiled.ptx
    assert "ld.global" not in compiled.ptx
    assert {"240", "24"} <= set(re.findall(r"setmaxnreg\S+\s+(\d+)", compiled.ptx))
    assert compiled.spill_bytes == 0
    assert compiled.shared_bytes <= SHARED_LIMIT
    # ptxas says so (C7510 and its kin) where it runs products one by one that the kernel issued together.
    assert not re.search(r"C75\d\d|serialized", compiled.messages), compiled.messages


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_exponentials_are_taken_while_products_run(head_dim, causal):
    """Between the wait for Q · Kᵀ, which leaves P · V in flight, and the wait for P · V stands the whole softmax."""
    from fastlm.ops.attention import gluon

    compiled = compile_kernel("forward_kernel", head_dim, causal, "bf16")
    assert compiled.sass, "nvdisasm, which comes with Triton, was not found"
    overlapped = []
    for after in compiled.sass.split("WARPGROUP.DEPBAR.LE gsb0, 0x1 ")[1:]:
        softmax, found, _ = after.partition("WARPGROUP.DEPBAR.LE gsb0, 0x0 ")
        assert found
        overlapped.append(softmax.count("MUFU.EX2"))
        assert "HGMMA" not in softmax
    assert len(overlapped) == (4 if causal else 2)  # two consumers, and the tiles at the diagonal apart
    # A thread of 128 has block_n / 2 of a tile's 64 × block_n logits.
    assert min(overlapped) >= gluon.TILES[head_dim].block // 2


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_warpgroup_meets_before_one_of_its_threads_arrives(head_dim):
    """One thread arrives for four warps, each of which must be done; the simulator takes this for granted."""
    compiled = compile_kernel("forward_kernel", head_dim, True, "bf16")
    steps = re.findall(r"bar\.sync|mbarrier\.arrive\.shared::cta|wgmma\.\w+|mbarrier\.try_wait", compiled.ptx)
    arrivals = [i for i, step in enumerate(steps) if step.startswith("mbarrier.arrive")]
    assert len(arrivals) >= 14  # K's first, and for both walks the turn, K and V; of two consumers
    assert all(steps[i - 1] == "bar.sync" for i in arrivals)
