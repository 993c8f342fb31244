from __future__ import annotations

import pytest
import torch

from fastlm.ops import OPS, rms_norm
from fastlm.ops.rms_norm import reference
from tests.ops.helpers import assert_as_exact_as, compile_for_chips, poisoned_memory

SHAPES = [(1, 24), (3, 7), (2, 5, 64), (33, 129), (4, 1, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    return request.param


def inputs(shape, dtype, device, residual):
    x = torch.randn(shape, device=device).mul_(3).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], device=device).to(dtype).requires_grad_()
    r = torch.randn(shape, device=device).to(dtype).requires_grad_() if residual else None
    return x, weight, r


def run(function, tensors, grads):
    x, weight, r = (t if t is None else t.detach().requires_grad_() for t in tensors)
    out = function(x, weight, residual=r, eps=1e-5, weight_offset=1.0)
    out = out if isinstance(out, tuple) else (out,)
    out = out if r is not None else out[:1]
    torch.autograd.backward(out, [g.to(out[0].dtype) for g in grads[: len(out)]])
    return [*out, x.grad, weight.grad] + ([r.grad] if r is not None else [])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_forward_and_backward_match_float64(backend, device, shape, dtype, residual):
    if backend == "cpu" and dtype == torch.float16:
        x = torch.empty(shape, dtype=dtype)
        assert OPS["rms_norm"].explain(x, x[0, 0]).chosen is None
        return
    tensors = inputs(shape, dtype, device, residual)
    grads = [torch.randn(shape, device=device), torch.randn(shape, device=device)]
    with poisoned_memory():
        ours = run(rms_norm, tensors, grads)
    plain = run(plain_rms_norm, tensors, grads)
    grads = [g.to(dtype) for g in grads]
    exact = run(reference.rms_norm, [t if t is None else t.double() for t in tensors], grads)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_as_exact_as(a, b, c)


def plain_rms_norm(x, weight, *, residual, eps, weight_offset):
    h = x if residual is None else x + residual
    return torch.nn.functional.rms_norm(h, (h.shape[-1],), weight + weight_offset, eps), h


def test_rows_with_strides_are_read_without_a_wrong_element(backend, device):
    wide = torch.randn(6, 4, 200, device=device)
    x = wide[::2, :, 10:110]
    weight = torch.randn(100, device=device)
    expected = reference.rms_norm(x.double(), weight.double())[0]
    torch.testing.assert_close(rms_norm(x, weight).double(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(100, 8, device=device).t()
    expected = reference.rms_norm(x.double(), weight.double())[0]
    torch.testing.assert_close(rms_norm(x, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_no_rows_gives_no_rows_and_a_zero_weight_gradient(backend, device):
    x = torch.empty(0, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    y = rms_norm(x, weight)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_backward_gives_the_same_bits_at_every_run(backend, device):
    tensors = inputs((37, 96), torch.bfloat16, device, True)
    grads = [torch.randn(37, 96, device=device), torch.randn(37, 96, device=device)]
    first, second = run(rms_norm, tensors, grads), run(rms_norm, tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("residual", [False, True])
def test_torch_accepts_the_registration(device, residual):
    x, weight, r = inputs((2, 3, 32), torch.float32, device, residual)
    torch.library.opcheck(torch.ops.fastlm.rms_norm.default, (x, weight, r, 1e-6, 0.0))


def test_traces_into_one_graph(device):
    x, weight, r = inputs((2, 3, 32), torch.float32, device, True)
    compiled = torch.compile(lambda *t: rms_norm(t[0], t[1], residual=t[2]), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, weight, r), rms_norm(x, weight, residual=r), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_is_refused_rather_than_wrong(device):
    x, weight, _ = inputs((2, 32), torch.float32, device, False)
    (grad,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_shapes_that_do_not_fit_are_named(device):
    with pytest.raises(ValueError, match=r"weight must be \(8,\)"):
        rms_norm(torch.randn(2, 8, device=device), torch.randn(7, device=device))
    with pytest.raises(ValueError, match="residual must be like x"):
        rms_norm(torch.randn(2, 8), torch.randn(8), residual=torch.randn(2, 8, dtype=torch.bfloat16))


@pytest.mark.aot
@pytest.mark.parametrize("hidden_size", [1024, 8192])
def test_kernels_compile_for_each_chip_and_only_the_widest_backward_spills(hidden_size):
    from fastlm.ops.rms_norm import triton as kernels

    pointers = dict.fromkeys(["x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "h_ptr"], "*bf16") | {"rstd_ptr": "*fp32"}
    scalars = {
        "x_stride": "i32",
        "residual_stride": "i32",
        "hidden_size": "i32",
        "eps": "fp32",
        "weight_offset": "fp32",
    }
    constants = {"HAS_RESIDUAL": True, "BLOCK": hidden_size}
    warps = kernels._num_warps(hidden_size)
    for compiled in compile_for_chips(kernels._forward_kernel, pointers | scalars, constants, num_warps=warps):
        assert compiled.spill_bytes == 0, compiled.chip

    pointers = dict.fromkeys(["grad_y_ptr", "grad_h_ptr", "h_ptr", "weight_ptr", "grad_x_ptr"], "*bf16")
    pointers |= {"rstd_ptr": "*fp32", "partial_ptr": "*fp32"}
    scalars = dict.fromkeys(["grad_y_stride", "grad_h_stride", "h_stride", "rows", "hidden_size"], "i32")
    scalars |= {"weight_offset": "fp32"}
    constants = {"HAS_GRAD_H": True, "BLOCK": hidden_size}
    for compiled in compile_for_chips(kernels._backward_kernel, pointers | scalars, constants, num_warps=warps):
        # A row of 8192 takes 16 of 128 registers three times over; of the rest ptxas puts up to 21 aside.
        most = 84 if hidden_size == 8192 else 0
        assert compiled.spill_bytes <= most, compiled.chip
