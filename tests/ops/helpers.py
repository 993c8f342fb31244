"""What the tests of every op share: the error rule, poisoned memory, compiling kernels for chips that are not here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def assert_as_exact_as(ours: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0, floor: float = 1e-6) -> None:
    """Our relative error against `exact` (fp32 or fp64) is at most `factor` times that of `plain`, the same formula in
    plain low-precision PyTorch. `floor` is the error below which fp32 arithmetic in another order cannot be told apart.
    A ratio of two errors over a handful of elements is noise, so tensors under 256 elements may also differ by the
    rounding of the result itself.
    """
    if exact.numel() < 256:
        floor = max(floor, torch.finfo(ours.dtype).eps / 2)
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    assert torch.isfinite(ours).all(), "output has NaN or infinity: perhaps an element was never written"
    scale = exact.double().norm().clamp_min(1e-30)
    our_error = ((ours.double() - exact.double()).norm() / scale).item()
    plain_error = ((plain.double() - exact.double()).norm() / scale).item()
    assert our_error <= factor * plain_error + floor, f"our error {our_error:.2e}, plain PyTorch's {plain_error:.2e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor from torch.empty and its kin starts as NaN (integers as their maximum): unwritten outputs show."""

    def poison(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return t.fill_(float("nan"))
        return t if t.dtype == torch.bool or t.numel() == 0 else t.fill_(torch.iinfo(t.dtype).max)

    def wrapped(function: Any) -> Any:
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", wrapped(empty)),
        mock.patch.object(torch, "empty_like", wrapped(empty_like)),
        mock.patch.object(Tensor, "new_empty", wrapped(new_empty)),
    ):
        yield


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of one kernel on one chip."""

    chip: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str
    messages: str  # all that ptxas printed
    sass: str  # the machine code, as nvdisasm prints it

    @property
    def tensor_core_instructions(self) -> int:
        return len(re.findall(r"^\s*(?:@\S+ )?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", self.ptx, re.MULTILINE))


def compile_for_chips(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    divisible_by_16: Collection[str] = (),
    capabilities: Collection[int] = (80, 90, 100),
    source: Any = None,
) -> list[Compiled]:
    """Compiles `kernel` ahead of time for chips by compute capability; no GPU is needed. Needs TRITON_INTERPRET unset.

    `signature` gives each run-time argument's type as Triton writes it ("*bf16", "i32", "fp32"); `constants` the
    constexprs. Pointers, and the integers named in `divisible_by_16`, are taken as divisible by 16. `source`: Triton's
    class of what is compiled, ASTSource by default.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name, kind in full.items() if kind == "constexpr" and name not in constants]
    assert not missing, f"no type or value given for {missing}"
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if full[name].startswith("*") or name in divisible_by_16
    }
    results = []
    for capability in capabilities:
        compiled = triton.compile(
            (source or ASTSource)(fn=kernel, signature=full, constexprs=constants, attrs=attrs),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        results.append(_resources(capability, compiled.asm["ptx"], compiled.metadata.shared))
    return results


def _resources(capability: int, ptx: str, shared_bytes: int) -> Compiled:
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(capability)
    chip = re.search(r"\.target (sm_\w+)", ptx)
    assert chip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(ptx)
        run = subprocess.run(
            [
                getattr(ptxas, "path", ptxas),
                "-v",
                f"-arch={chip[1]}",
                str(path),
                "-o",
                str(path.with_suffix(".cubin")),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        disassembler = Path(getattr(ptxas, "path", ptxas)).with_name("nvdisasm")
        sass = ""
        if disassembler.is_file():
            command = [str(disassembler), "-c", str(path.with_suffix(".cubin"))]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", run.stderr)
    spills = re.findall(r"(\d+) bytes spill", run.stderr)
    assert registers, run.stderr
    return Compiled(chip[1], int(registers[1]), sum(map(int, spills)), shared_bytes, ptx, run.stderr, sass)
