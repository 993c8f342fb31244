"""One way to measure everything: outputs compared first, then peer and ours interleaved, medians, beside the bound.

A benchmark is a module `bench_<name>.py` with `cases(device) -> Iterable[Case]`. `fastlm bench <name>` runs it, and so
does `pytest benchmarks --benchmark-only`, which times each side of each case by pytest-benchmark. A benchmark asks
`optional("tiktoken")` for a peer that may not be installed, and leaves the peer out when it gets None.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import pkgutil
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from fastlm.errors import ConfigError, FastlmError
from fastlm.ops._products import linear


class OutputMismatchError(FastlmError):
    """Ours and the peer's outputs differ, so timing them would compare two different things."""


@dataclass(frozen=True)
class Bound:
    """What the hardware cannot go under: bytes that must move and operations that must be done, for one call."""

    bytes: float = 0.0
    flops: float = 0.0
    dtype: torch.dtype = torch.float32  # which arithmetic rate the flops are done at


@dataclass(frozen=True)
class Case:
    """One comparison. `ours` and each peer take no argument and do the same work on the same inputs.

    `check(ours_output, peer_output)` raises AssertionError when they differ; it runs once for each peer before anything
    is timed. Outputs are what the callables return. `work` is how much one call does, in `unit`s ("bytes", "tokens").
    `peak(side)`, of "ours" or a peer's name, measures the most memory that it takes, in a process of its own.
    """

    name: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    check: Callable[[Any, Any], None]
    bound: Bound | None = None
    work: float = 0.0
    unit: str = ""
    peak: Callable[[str], float | None] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, and the quartiles' distance as a share of it."""

    median: float
    spread: float
    runs: int


@dataclass(frozen=True)
class Result:
    """One peer of one case, beside ours. `ratio` is the peer's median over ours: above 1, we are faster.

    Peaks are of memory, in bytes, where they were measured.
    """

    benchmark: str
    case: str
    peer: str
    ours_seconds: float
    peer_seconds: float
    ratio: float
    spread: float
    bound_seconds: float | None
    rate: float | None  # work a second, ours
    unit: str
    runs: int
    ours_peak: float | None = None
    peer_peak: float | None = None

    @property
    def memory_ratio(self) -> float | None:
        """Our peak over the peer's: below 1, we take less."""
        return self.ours_peak / self.peer_peak if self.ours_peak and self.peer_peak else None

    @property
    def share_of_bound(self) -> float | None:
        """1 when ours runs as fast as the hardware allows."""
        return self.bound_seconds / self.ours_seconds if self.bound_seconds else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """A case that was not timed, because the outputs differ or one side raised."""

    benchmark: str
    case: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this device: bytes a second of a large copy, flops a second of a large matrix product."""

    bytes_per_second: float
    flops_per_second: dict[torch.dtype, float]

    def to_json(self) -> dict[str, Any]:
        flops = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.flops_per_second.items()}
        return {"bytes_per_second": self.bytes_per_second, "flops_per_second": flops}

    def seconds(self, bound: Bound) -> float:
        flops = self.flops_per_second.get(bound.dtype) or max(self.flops_per_second.values())
        return max(bound.bytes / self.bytes_per_second, bound.flops / flops)


def available() -> list[str]:
    """Names of the benchmarks, as `fastlm bench` takes them."""
    import fastlm.benchmarks as package

    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name.removeprefix("bench_") for name in names if name.startswith("bench_"))


def load(name: str, device: str) -> Iterator[Case]:
    """The cases of one benchmark. Raises ConfigError when there is none of that name."""
    if name not in available():
        raise ConfigError(f"no benchmark named {name!r}; there are {', '.join(available())}")
    return iter(importlib.import_module(f"fastlm.benchmarks.bench_{name}").cases(device))


_left_out: list[str] = []


def optional(package: str) -> ModuleType | None:
    """The package, or None where it is not installed, which is then told to the reader of the results."""
    if importlib.util.find_spec(package) is None:
        leave_out(f"{package} is not installed, so it is left out")
        return None
    return importlib.import_module(package)


def leave_out(note: str) -> None:
    """Tells the reader of the results, once, what was not measured and why."""
    if note not in _left_out:
        _left_out.append(note)


def left_out() -> list[str]:
    """What was left out so far, one line each."""
    return list(_left_out)


def measure_ceilings(device: str) -> Ceilings:
    """Copies 256 MiB (counting bytes read and written) and multiplies matrices; takes about a second."""
    size = 256 * 1024 * 1024 if device == "cpu" else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = min(_times([lambda: target.copy_(source)], device, seconds=0.3)[0])
    flops = {}
    for dtype, n in (
        ((torch.float32, 1024), (torch.bfloat16, 1024))
        if device == "cpu"
        else (
            (torch.float32, 4096),
            (torch.bfloat16, 8192),
            (torch.float16, 8192),
        )
    ):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        # The faster of torch's product and of oneDNN's, which some processors run at twice the rate.
        products: list[Callable[[], Any]] = [partial(torch.matmul, a, b), partial(linear, a, b)]
        flops[dtype] = 2 * n**3 / min(min(times) for times in _times(products, device, seconds=0.4))
    return Ceilings(2 * size / copy, flops)


def _times(functions: list[Callable[[], Any]], device: str, seconds: float, min_runs: int = 3) -> list[list[float]]:
    """Times of each function, called in turn, so that a slow spell of the machine falls on all alike.

    The order changes at random: what one leaves in the processor's caches falls on all alike too.
    """
    clock = _cuda_seconds if device.startswith("cuda") else _cpu_seconds
    for function in functions:
        clock(function)  # warm: caches, compilation, allocator
    times: list[list[float]] = [[] for _ in functions]
    gc.collect()
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds * len(functions)
        order = list(zip(functions, times, strict=True))
        shuffle = random.Random(0).shuffle
        while time.perf_counter() < end or len(times[0]) < min_runs:
            shuffle(order)
            for function, its_times in order:
                its_times.append(clock(function))
            if len(times[0]) >= 1000:
                break
    finally:
        if gc_was_enabled:
            gc.enable()
    return times


def _cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_seconds(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _l2_flusher().zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


_flusher: torch.Tensor | None = None


def _l2_flusher() -> torch.Tensor:
    global _flusher
    if _flusher is None:  # larger than any L2, so that every call reads its inputs from memory
        _flusher = torch.empty(256 * 1024 * 1024, dtype=torch.uint8, device="cuda")
    return _flusher


def run_case(benchmark: str, case: Case, device: str, ceilings: Ceilings, seconds: float = 1.0) -> list[Result]:
    """Compares, then times `case`, about `seconds` for each callable. One result for each peer.

    Raises OutputMismatchError when an output differs.
    """
    ours_output = case.ours()
    for peer, function in case.peers.items():
        try:
            case.check(ours_output, function())
        except AssertionError as error:
            raise OutputMismatchError(f"ours differs from {peer}: {_first_lines(error)}") from error
    del ours_output
    names, functions = list(case.peers), [case.ours, *case.peers.values()]
    all_times = _times(functions, device, seconds)
    timings = [_summary(times) for times in all_times]
    ours = timings[0]
    peaks = {side: case.peak(side) if case.peak else None for side in ("ours", *names)}
    return [
        Result(
            benchmark=benchmark,
            case=case.name,
            peer=peer,
            ours_seconds=ours.median,
            peer_seconds=timing.median,
            ratio=timing.median / ours.median,
            spread=max(ours.spread, timing.spread),
            bound_seconds=ceilings.seconds(case.bound) if case.bound else None,
            rate=case.work / ours.median if case.work else None,
            unit=case.unit,
            runs=ours.runs,
            ours_peak=peaks["ours"],
            peer_peak=peaks[peer],
        )
        for peer, timing in zip(names, timings[1:], strict=True)
    ]


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split()[:60]) or type(error).__name__


def _summary(times: list[float]) -> Timing:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median, median, median)
    return Timing(median, (high - low) / median, len(times))


def run(name: str, device: str, ceilings: Ceilings, seconds: float = 1.0) -> Iterator[Result | Failure]:
    """Runs one benchmark, yielding results as they come. A case that fails is a Failure; the rest still run."""
    cases = load(name, device)
    while True:
        try:
            case = next(cases)
        except StopIteration:
            return
        except Exception as error:  # inputs could not be made: whatever it was, other benchmarks can still run
            yield Failure(name, "setting up", f"{type(error).__name__}: {error}")
            return
        try:
            yield from run_case(name, case, device, ceilings, seconds)
        except OutputMismatchError as error:
            yield Failure(name, case.name, str(error))
        except Exception as error:
            yield Failure(name, case.name, f"{type(error).__name__}: {error}")
