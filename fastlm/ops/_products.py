"""The three matrix products of a linear layer in training, in fp32 by whichever library in torch is the faster.

torch multiplies fp32 matrices by MKL, which on AMD's processors uses AVX2 and leaves half of an AVX-512 unit idle: 100
GFLOP/s on a core of a Zen 5, where oneDNN, which torch carries too, reaches 230. Both compute in fp32. Elsewhere, and
for other dtypes, these are torch's own products. `torch.backends.mkldnn.flags(enabled=False)` leaves oneDNN unused.

oneDNN sums a dot product in one go, so the gradient of a weight, a sum over every token, is made in parts whose sums
are added: its error is then at most 1.5 times that of MKL, which also adds parts.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_PRODUCTS = 2**21  # multiplications; of fewer, starting oneDNN takes more time than it saves
ROWS_AT_ONCE = 1024  # of the sum that is the gradient of a weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: `(..., in_features)` and `(out_features, in_features)` -> `(..., out_features)`."""
    if by_onednn(x, weight, weight.shape[0]):
        return _onednn(x, weight)
    return functional.linear(x, weight)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad @ weight: `(..., out_features)` and `(out_features, in_features)` -> `(..., in_features)`."""
    if by_onednn(grad, weight, weight.shape[1]):
        return _onednn(grad, weight.t())
    return grad @ weight


def add_input_gradient(total: Tensor | None, grad: Tensor, weight: Tensor) -> Tensor:
    """total + grad @ weight, in place; grad is `(rows, out_features)`. None counts as zero."""
    if total is None:
        return input_gradient(grad, weight)
    if by_onednn(grad, weight, weight.shape[1]):
        return total.add_(_onednn(grad, weight.t()))
    return total.addmm_(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x: `(rows, out_features)` and `(rows, in_features)` -> `(out_features, in_features)`."""
    if not by_onednn(grad, x, x.shape[1]):
        return grad.t() @ x
    swapped = grad.shape[1] > x.shape[1]  # the first operand is copied, so it is the narrower one
    narrow, wide = (x, grad) if swapped else (grad, x)
    total = None
    for a, b in zip(narrow.split(ROWS_AT_ONCE), wide.split(ROWS_AT_ONCE), strict=True):
        part = _onednn(a.t(), b.t())
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.t().contiguous() if swapped else total


def prefers_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether large products of this dtype are made by oneDNN here where torch would not."""
    is_on = bool(torch.backends.mkldnn.enabled)
    return dtype == torch.float32 and device.type == "cpu" and is_on and _has_slow_mkl()


def by_onednn(a: Tensor, b: Tensor, columns: int) -> bool:
    """Whether oneDNN makes the product of `a` and `b`, which has `columns` numbers for each row of `a`."""
    plain = type(a) in (Tensor, nn.Parameter) and type(b) in (Tensor, nn.Parameter)  # no DTensor
    large = a.numel() * columns >= MIN_PRODUCTS
    return large and plain and a.dtype == b.dtype and prefers_onednn(a.dtype, a.device)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


@cache
def _has_slow_mkl() -> bool:
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _cpu_vendor()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _cpu_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # Windows names the vendor here
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "")
