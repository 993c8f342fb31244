"""ggml's own matrix product, through the libraries that llama-cpp-python brings."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from fastlm.benchmarks.harness import optional
from torch import Tensor

TYPES = {"float32": 0, "q4_0": 2, "q5_0": 6, "q8_0": 8, "q4_k": 12, "q5_k": 13, "q6_k": 14}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def matrix_product(x: Tensor, weight: Tensor, quantization: str) -> Callable[[], Tensor] | None:
    """A function that returns x · Wᵀ as ggml computes it with torch's number of threads; None without llama-cpp-python.

    x: `(rows, in_features)` fp32; weight as in `quantized_linear`. Both are copied, as ggml keeps its own.
    """
    package = optional("llama_cpp")
    if package is None:
        return None
    folder = Path(str(package.__file__)).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so"), ctypes.RTLD_GLOBAL) for name in ("base", "cpu"))
    base.ggml_init.argtypes = [_InitParams]
    for function in (
        base.ggml_init,
        base.ggml_new_tensor_2d,
        base.ggml_mul_mat,
        base.ggml_new_graph,
        base.ggml_get_data,
    ):
        function.restype = ctypes.c_void_p
    base.ggml_new_tensor_2d.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    base.ggml_mul_mat.argtypes = [ctypes.c_void_p] * 3
    base.ggml_new_graph.argtypes = base.ggml_get_data.argtypes = base.ggml_free.argtypes = [ctypes.c_void_p]
    base.ggml_build_forward_expand.argtypes = [ctypes.c_void_p] * 2
    cpu.ggml_graph_compute_with_ctx.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]

    (rows, columns), out_features = x.shape, weight.shape[0]
    size = weight.numel() + 4 * (2 * x.numel() + 2 * rows * out_features) + (64 << 20)
    context = base.ggml_init(_InitParams(size, None, False))
    w = base.ggml_new_tensor_2d(context, TYPES[quantization], columns, out_features)
    a = base.ggml_new_tensor_2d(context, TYPES["float32"], columns, rows)
    product = base.ggml_mul_mat(context, w, a)
    ctypes.memmove(base.ggml_get_data(w), weight.data_ptr(), weight.numel())
    ctypes.memmove(base.ggml_get_data(a), x.data_ptr(), 4 * x.numel())
    graph = base.ggml_new_graph(context)
    base.ggml_build_forward_expand(graph, product)
    # Each computation takes its scratch memory from the context, so a second, emptied at each call, serves for it.
    scratch = base.ggml_init(_InitParams(8 * x.numel() + (1 << 20), None, False))
    base.ggml_reset.argtypes = [ctypes.c_void_p]
    result = torch.frombuffer(
        (ctypes.c_float * (rows * out_features)).from_address(base.ggml_get_data(product)), dtype=torch.float32
    ).view(rows, out_features)

    def run() -> Tensor:
        base.ggml_reset(scratch)
        cpu.ggml_graph_compute_with_ctx(scratch, graph, torch.get_num_threads())
        return result

    return run
