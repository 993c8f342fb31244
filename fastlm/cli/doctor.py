"""`fastlm doctor`: what this machine has, and which backend each op would use on it, and why."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from typing import TYPE_CHECKING, Any

import typer

from fastlm._version import __version__
from fastlm.cli.output import JsonFlag, console, print_json

if TYPE_CHECKING:
    import torch

OPTIONAL_PACKAGES = {
    "kiwipiepy": "Korean morphemes and sentences: pip install kiwipiepy",
    "transformers": "Hugging Face models as peers in benchmarks: pip install transformers",
    "tiktoken": "a peer in benchmarks: pip install tiktoken",
    "tokenizers": "a peer in benchmarks: pip install tokenizers",
}


def command(as_json: JsonFlag = False) -> None:
    """Show what this machine has, and which backend each op would use on it, and why.

    Exits with 1, and a line that says what to do, when something that fastlm needs is missing.

    Example: fastlm doctor
    """
    facts = machine()
    ops = backends()
    problems = find_problems(facts)
    if as_json:
        print_json({"usable": not problems, "problems": problems, "machine": facts, "ops": ops})
    else:
        _print(facts, ops, problems)
    if problems:
        raise typer.Exit(1)


def machine() -> dict[str, Any]:
    """Facts about the interpreter, the hardware and the packages, each a string, number, list or mapping."""
    import torch

    return {
        "fastlm": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gpus": gpus(),
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "native_core": _problem_of_core("native") or "built",
        "cuda_core": _problem_of_core("cuda") or "built",
        "compiler": next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None),
        "optional": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "FASTLM_BACKEND": os.environ.get("FASTLM_BACKEND"),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of each CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return []
    all_properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
        }
        for p in all_properties
    ]


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            names = [line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Instruction sets that the native core may use here; empty without a native core."""
    from fastlm._core import native
    from fastlm.errors import NativeCoreError

    try:
        return [name for name, present in native().cpu_features().items() if present]
    except NativeCoreError:
        return []


def _problem_of_core(name: str) -> str | None:
    from fastlm import _core
    from fastlm.errors import NativeCoreError

    try:
        getattr(_core, name)()
    except NativeCoreError as error:
        return str(error)
    return None


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "present"


def find_problems(facts: dict[str, Any]) -> list[str]:
    """What keeps fastlm from working here, each with what to do; empty when it works."""
    problems = []
    if facts["native_core"] != "built":
        install = "" if facts["compiler"] else "install a C++20 compiler (apt install g++), then "
        problems.append(
            "no native core, so no tokenizer and no C++ CPU kernels: "
            f"{install}run: pip install --force-reinstall --no-deps . (in fastlm's source directory)"
        )
    if facts["gpus"] and facts["triton"] is None:
        problems.append("a GPU but no Triton, so ops on it run in plain PyTorch: pip install triton")
    return problems


def backends() -> dict[str, dict[str, Any]]:
    """For each op, for a typical call on CPU and on GPU tensors: the backend, and why not the others.

    Where there is no GPU, the answer for GPU tensors is that of an H100.
    """
    import torch

    from fastlm.ops import OPS, explain

    answers: dict[str, dict[str, Any]] = {}
    for name in sorted(OPS):
        answers[name] = {}
        for device in ("cpu", "cuda"):
            with _pretended_gpu() if device == "cuda" and not torch.cuda.is_available() else nullcontext():
                args, kwargs = typical_call(name, torch.device(device))
                explanation = explain(name, *args, **kwargs)
            answers[name][device] = {"backend": explanation.chosen, "not": explanation.reasons}
    return answers


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    """Tensors made on "cuda" are fake ones, shapes and dtypes only, on a chip of compute capability 9.0."""
    from unittest import mock

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)):
        yield


def typical_call(op: str, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a usual call of `op`: fp32 on a CPU, bf16 on a GPU; small, since nothing runs."""
    import torch

    default = torch.float32 if device.type == "cpu" else torch.bfloat16

    def tensor(*shape: int, dtype: torch.dtype = default) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def ids(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    calls: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "attention": lambda: ((tensor(1, 32, 4, 64), tensor(1, 32, 2, 64), tensor(1, 32, 2, 64)), {"causal": True}),
        "decode_attention": lambda: (
            (
                tensor(2, 1, 4, 64),
                *(tensor(8, 16, 2, 64) for _ in range(2)),
                *(ids(*shape, dtype=torch.int32) for shape in ((2, 4), (2,))),
            ),
            {},
        ),
        "fused_linear_sample": lambda: ((tensor(2, 64), tensor(128, 64)), {"seed": 0, "position": 0}),
        "linear_cross_entropy": lambda: ((tensor(4, 64), tensor(128, 64), ids(4)), {}),
        "quantized_linear": lambda: ((tensor(4, 64), ids(8, 68, dtype=torch.uint8), "q8_0"), {}),
        "rms_norm": lambda: ((tensor(4, 64), tensor(64)), {}),
        "rotary": lambda: (
            (tensor(1, 4, 4, 64), tensor(1, 4, 2, 64), *(tensor(8, 32, dtype=torch.float32) for _ in range(2))),
            {},
        ),
        "sampling": lambda: ((tensor(2, 128),), {"top_p": 0.9, "seed": 0, "position": 0}),
        "swiglu": lambda: ((tensor(4, 64), tensor(4, 64)), {}),
    }
    return calls[op]()


def _print(facts: dict[str, Any], ops: dict[str, dict[str, Any]], problems: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    gpu_names = [f"{g['name']} (sm_{g['capability'].replace('.', '')}, {g['memory_gib']} GiB)" for g in facts["gpus"]]
    rows = {
        "fastlm": f"{facts['fastlm']} on Python {facts['python']}, {facts['platform']}",
        "torch": facts["torch"],
        "Triton": facts["triton"] or "not installed; GPU ops would run in plain PyTorch",
        "GPU": ", ".join(gpu_names) or "none that torch sees",
        "CPU": f"{facts['cpu']}, {facts['threads']} torch threads",
        "instruction sets": ", ".join(facts["cpu_features"]) or "portable code only",
        "native core": facts["native_core"],
        "CUDA core": facts["cuda_core"],
    }
    for name, version in facts["optional"].items():
        rows[name] = version or f"not installed; {OPTIONAL_PACKAGES[name]}"
    if facts["FASTLM_BACKEND"]:
        rows["FASTLM_BACKEND"] = facts["FASTLM_BACKEND"]
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    console.print(table)
    console.print()

    table = Table("op", "on", "backend", "and why not the others", box=None, pad_edge=False, header_style="bold")
    for name, by_device in ops.items():
        for device, answer in by_device.items():
            on = device if device == "cpu" or facts["gpus"] else "H100 (none here)"
            chosen = Text(answer["backend"], "green") if answer["backend"] else Text("none", "red")
            reasons = "\n".join(f"{backend}: {reason}" for backend, reason in answer["not"].items())
            table.add_row(name, on, chosen, Text(reasons, "dim"))
    console.print(table)
    for problem in problems:
        console.print(Text(f"\nproblem: {problem}", "bold red"), soft_wrap=True)
    if not problems:
        console.print("\n[green]fastlm is usable here.[/]")
    sys.stdout.flush()
