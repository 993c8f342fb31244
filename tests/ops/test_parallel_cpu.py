"""The threads of the C++ kernels: equal bits at every number of them, and calls from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlm.ops import linear_cross_entropy, rms_norm, rotary, sample, swiglu


@pytest.fixture(autouse=True)
def on_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTLM_BACKEND", "cpu")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def with_gradients(function: Callable, *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return (*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs]))


def work() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A call of each op, on inputs large enough to be shared out."""
    x, residual, gate, up = (torch.randn(700, 1030) for _ in range(4))
    weight = torch.randn(1030)
    q, k = torch.randn(2, 130, 8, 64), torch.randn(2, 130, 4, 64)
    cos, sin = torch.randn(130, 32), torch.randn(130, 32)
    hidden, vocabulary, targets = torch.randn(200, 64), torch.randn(2050, 64), torch.randint(2050, (200,))
    logits, ids = torch.randn(7, 50_001), torch.randint(50_001, (7, 400))
    draws = {"seed": torch.arange(7), "position": torch.arange(7), "frequency_penalty": 0.5, "output_ids": ids}
    return {
        "rms_norm": lambda: with_gradients(lambda x, w, r: rms_norm(x, w, residual=r), x, weight, residual),
        "rms_norm in bf16": lambda: with_gradients(rms_norm, x.bfloat16(), weight.bfloat16()),
        "swiglu": lambda: with_gradients(swiglu, gate, up),
        "rotary": lambda: with_gradients(lambda q, k: rotary(q, k, cos, sin), q, k),
        "linear_cross_entropy": lambda: with_gradients(
            lambda h, w: linear_cross_entropy(h, w, targets), hidden, vocabulary
        ),
        "sample with top_p": lambda: sample(logits, top_p=0.9, return_logprobs=True, num_logprobs=5, **draws),
        "sample with top_k": lambda: sample(logits, top_k=50, top_p=0.9, return_logprobs=True, num_logprobs=5, **draws),
        "sample of one row": lambda: sample(logits[:1], seed=1, position=2, return_logprobs=True, num_logprobs=5),
    }


def assert_same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("op", work())
def test_every_number_of_threads_gives_the_same_bits(op: str) -> None:
    call = work()[op]
    if op == "linear_cross_entropy":  # torch's matrix products round otherwise with another number of threads
        call = cross_entropy_kernel()
    torch.set_num_threads(1)
    alone = call()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert_same_bits(call(), alone)


def cross_entropy_kernel() -> Callable[[], tuple[Tensor, ...]]:
    from fastlm.ops.linear_cross_entropy.cpu import _kernel

    logits, targets, scale = torch.randn(200, 2050), torch.randint(2050, (200,)), torch.rand(200)

    def call() -> tuple[Tensor, ...]:
        gradient, outputs = logits.clone(), torch.empty(3, 200)
        _kernel(-100, 0.1, 1e-4, 0.0, gradient, targets, scale, *outputs)
        return gradient, outputs

    return call


def test_calls_from_many_python_threads_at_once_give_the_same_bits() -> None:
    torch.set_num_threads(3)
    calls = {op: call for op, call in work().items() if op != "linear_cross_entropy"}
    expected = {op: call() for op, call in calls.items()}

    def repeat(op: str) -> None:
        for _ in range(8):
            assert_same_bits(calls[op](), expected[op])

    with ThreadPoolExecutor(len(calls) * 2) as pool:
        for future in [pool.submit(repeat, op) for op in list(calls) * 2]:
            future.result(timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_fork_computes_the_same_and_so_does_its_child() -> None:
    torch.set_num_threads(3)
    gate, up = torch.randn(2, 600, 1030)

    def compute() -> bytes:  # compared as bytes, for torch's own threads hang in a child
        return swiglu(gate, up).numpy().tobytes()

    expected = compute()  # the parent's threads exist now; the child has none of them

    def check(depth: int) -> int:
        same = all(compute() == expected for _ in range(20))
        return 0 if same and (depth == 0 or status_of_child(lambda: check(depth - 1)) == 0) else 1

    assert status_of_child(lambda: check(1)) == 0
    assert compute() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_computes_though_its_parent_ran_torch_alone() -> None:
    """OpenMP's runtime, whose threads torch has started, would wait for ever in a child."""
    script = """
import os, torch
from fastlm.ops import swiglu
torch.set_num_threads(3)
x = torch.randn(600, 1030)
(x @ x.T).sum()
child = os.fork()
if child == 0:
    import signal
    signal.alarm(20)
    os._exit(0 if swiglu(x, x).numpy().any() else 1)
print(os.waitpid(child, 0)[1])
"""
    assert in_a_new_interpreter(script) == "0\n"


def status_of_child(run: Callable[[], int]) -> int:
    """The exit status of a forked child that runs `run`, or -1 when it hangs."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(run())
        finally:
            os._exit(2)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def in_a_new_interpreter(script: str) -> str:
    environment = os.environ | {"FASTLM_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_ends_with_the_threads_asleep_or_not() -> None:
    script = """
import threading, torch
from fastlm.ops import swiglu
torch.set_num_threads(3)
x = torch.randn(600, 1030)
calls = threading.Thread(target=lambda: [swiglu(x, x) for _ in range(100)])
calls.start()
swiglu(x, x)
print("end")
"""
    for pause in ("", "calls.join()", "import time; calls.join(); time.sleep(0.1)"):
        assert in_a_new_interpreter(script + pause) == "end\n"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_there_are_as_many_threads_as_torch_is_told_to_use() -> None:
    script = """
import os, time, torch
from fastlm.ops import swiglu
x = torch.randn(600, 1030)
torch.set_num_threads(1)
swiglu(x, x)
before = len(os.listdir("/proc/self/task"))
def others(threads):
    torch.set_num_threads(threads)
    swiglu(x, x)
    for _ in range(200):  # a thread that ends is listed for a moment more
        found = len(os.listdir("/proc/self/task")) - before
        if found == threads - 1:
            break
        time.sleep(0.01)
    return found
print([others(threads) for threads in (1, 3, 2, 3, 4)])
"""
    assert in_a_new_interpreter(script) == "[0, 2, 1, 2, 3]\n"
