from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastlm.ops import OPS, swiglu
from tests.ops.helpers import assert_as_exact_as, compile_for_chips, poisoned_memory

SHAPES = [(1, 24), (3, 7), (2, 5, 64), (33, 129), (3, 1, 1030)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_tanh"]


@pytest.fixture(params=OPS["swiglu"].backends)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    return request.param


def skip_what_it_does_not_serve(backend, device, dtype):
    """Some backends serve one kind of device, or not every dtype; `fastlm.explain` says so, and so does the test."""
    if (backend == "cpu" and device == "cuda") or (backend == "cpu" and dtype == torch.float16):
        assert OPS["swiglu"].explain(*[torch.empty(2, dtype=dtype, device=device)] * 2).chosen is None
        return True
    return False


def plain(gate, up, *, activation):
    act = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    return act * up


def run(function, tensors, grad, activation):
    gate, up = (t.detach().requires_grad_() for t in tensors)
    y = function(gate, up, activation=activation)
    return [y, *torch.autograd.grad(y, (gate, up), grad.to(y.dtype))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_match_float64(backend, device, shape, dtype, activation):
    if skip_what_it_does_not_serve(backend, device, dtype):
        return
    tensors = [torch.randn(shape, device=device).mul_(3).to(dtype) for _ in range(2)]
    grad = torch.randn(shape, device=device).to(dtype)
    with poisoned_memory():
        ours = run(swiglu, tensors, grad, activation)
    plain_outputs = run(plain, tensors, grad, activation)
    exact = run(plain, [t.double() for t in tensors], grad, activation)
    # Triton's interpreter truncates to bf16 where a chip rounds: twice the error.
    factor = 4.0 if backend == "triton" and device == "cpu" and dtype == torch.bfloat16 else 2.0
    for a, b, c in zip(ours, plain_outputs, exact, strict=True):
        assert_as_exact_as(a, b, c, factor)


def test_halves_of_a_fused_projection_are_read_where_they_lie(backend, device):
    fused = torch.randn(6, 5, 2 * 70, device=device, requires_grad=True)
    gate, up = fused.chunk(2, -1)
    y = swiglu(gate, up)
    torch.testing.assert_close(y, functional.silu(gate) * up)
    grad = torch.randn(5, 6, 70, device=device).transpose(0, 1)
    expected = torch.autograd.grad(functional.silu(gate) * up, fused, grad)
    torch.testing.assert_close(torch.autograd.grad(y, fused, grad), expected)
    crossed = torch.randn(70, 8, device=device).t()
    torch.testing.assert_close(swiglu(crossed, crossed), functional.silu(crossed) * crossed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates_stay_finite(backend, device, activation):
    gate = torch.tensor([-1e30, -1e4, -100.0, -89.0, -0.0, 0.0, 1e-30, 89.0, 100.0, 1e4], device=device)
    gate = (gate if activation == "silu" else gate.clamp(-1e4, 1e4)).requires_grad_()
    y = swiglu(gate, torch.ones_like(gate), activation=activation)
    (grad,) = torch.autograd.grad(y.sum(), gate)
    exact = gate.detach().double().requires_grad_()
    expected = plain(exact, torch.ones_like(exact), activation=activation)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected.sum(), exact)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_gate_gives_nan_where_the_exponential_overflows(backend, device, activation):
    gate = torch.linspace(-100, 100, 20_001, device=device)
    gate = torch.cat([gate, -torch.linspace(88, 89, 1001, device=device), -torch.linspace(10, 10.1, 1001).to(device)])
    ours = run(swiglu, [gate, torch.ones_like(gate)], torch.ones_like(gate), activation)
    exact = run(plain, [gate.double(), torch.ones_like(gate).double()], torch.ones_like(gate), activation)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_nan_stays_nan_and_touches_no_neighbour(backend, device):
    gate = torch.randn(40, device=device)
    gate[17] = float("nan")
    y = swiglu(gate, torch.ones_like(gate))
    assert y.isnan().nonzero().flatten().tolist() == [17]


def test_one_element(backend, device):
    gate, up = (torch.randn((), device=device) for _ in range(2))
    torch.testing.assert_close(swiglu(gate[None], up[None]), functional.silu(gate[None]) * up)


def test_no_elements_give_no_elements(backend, device):
    gate = torch.empty(0, 16, device=device, requires_grad=True)
    swiglu(gate, gate).sum().backward()
    assert gate.grad.shape == (0, 16)


def test_torch_accepts_the_registration(device):
    gate, up = (torch.randn(2, 3, 32, device=device, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.fastlm.swiglu.default, (gate, up, "silu"))


def test_traces_into_one_graph(device):
    gate, up = (torch.randn(2, 3, 32, device=device, requires_grad=True) for _ in range(2))
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, up), swiglu(gate, up))


def test_second_derivative_is_refused_rather_than_wrong(device):
    gate = torch.randn(4, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(gate, gate).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="gate and up must be alike"):
        swiglu(torch.randn(4), torch.randn(5))
    with pytest.raises(ValueError, match="gate and up must be alike"):
        swiglu(torch.randn(4), torch.randn(4).bfloat16())
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, not 'relu'"):
        swiglu(torch.randn(4), torch.randn(4), activation="relu")


@pytest.mark.aot
@pytest.mark.parametrize("gelu", [False, True])
def test_kernels_compile_for_each_chip_without_spills(gelu):
    from fastlm.ops.swiglu import triton as kernels

    constants = {"GELU": gelu, "BLOCK": kernels.BLOCK}
    pointers = dict.fromkeys(["gate_ptr", "up_ptr", "y_ptr"], "*bf16")
    scalars = dict.fromkeys(["gate_stride", "up_stride", "columns", "column_blocks"], "i32")
    for compiled in compile_for_chips(kernels._forward_kernel, pointers | scalars, constants):
        assert compiled.spill_bytes == 0, compiled.chip
    pointers = dict.fromkeys(["grad_y_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr"], "*bf16")
    for compiled in compile_for_chips(
        kernels._backward_kernel, pointers | scalars | {"grad_y_stride": "i32"}, constants
    ):
        assert compiled.spill_bytes == 0, compiled.chip
