"""A small call for each feature of each op. `features` asks the backends about them; its tests run them all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import rotary_tables

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Feature(NamedTuple):
    """What the tables call it in both languages, and the call that uses it."""

    english: str
    korean: str
    call: Callable[[], Call]
    gradient: bool = False  # the feature is that the outputs can be differentiated


def _normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def _attention(
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    head_dim: int = 16,
    grad: bool = False,
    packed: bool = False,
    sinks: bool = False,
    bias: bool = False,
    **options: Any,
) -> Call:
    def draw(heads: int) -> Tensor:
        return _normal(*(() if packed else (1,)), 5, heads, head_dim, dtype=dtype, grad=grad)

    if packed:
        options["cu_seqlens_q"] = torch.tensor([0, 2, 5], dtype=torch.int32)
    if sinks:
        options["sinks"] = _normal(2, dtype=dtype, grad=grad)
    if bias:
        options["bias"] = _normal(1, 2, 5, 5, dtype=dtype, grad=grad)
    return (draw(2), draw(kv_heads), draw(kv_heads)), options


def _decode(
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    heads: int = 2,
    head_dim: int = 16,
    query_len: int = 1,
    grad: bool = False,
    sinks: bool = False,
    shared: bool = False,
    **options: Any,
) -> Call:
    q = _normal(2, query_len, heads, head_dim, dtype=dtype, grad=grad)
    k, v = (_normal(4, 4, 2, head_dim).to(cache or dtype) for _ in range(2))
    if cache in (torch.int8, torch.float8_e4m3fn):
        options |= {"k_scale": torch.tensor([0.5, 0.25]), "v_scale": torch.tensor([0.5, 0.25])}
    if sinks:
        options["sinks"] = _normal(heads, dtype=dtype)
    table = torch.tensor([[2, 0, 1], [3, 1, 2]], dtype=torch.int32)
    if shared:
        table[1, 0] = 2
        options["num_shared_tokens"] = torch.tensor(4, dtype=torch.int32)
    return (q, k, v, table, torch.tensor([10, 9], dtype=torch.int32)), options


def _sample(dtype: torch.dtype = torch.float32, penalty: bool = False, **options: Any) -> Call:
    if penalty:
        options |= {"prompt_ids": torch.tensor([[1, 2], [3, -1]]), "output_ids": torch.tensor([[1], [5]])}
    return (_normal(2, 40, dtype=dtype),), {"seed": 3, "position": 0} | options


def _linear_sample(dtype: torch.dtype = torch.float32, penalty: bool = False, **options: Any) -> Call:
    _, options = _sample(penalty=penalty, **options)
    return (_normal(2, 8, dtype=dtype), _normal(40, 8, dtype=dtype)), options


def _cross_entropy(dtype: torch.dtype = torch.float32, grad: bool = False, **options: Any) -> Call:
    hidden, weight = _normal(4, 8, dtype=dtype, grad=grad), _normal(20, 8, dtype=dtype, grad=grad)
    return (hidden, weight, torch.tensor([3, 0, -100, 19])), options


def _norm(
    dtype: torch.dtype = torch.float32, size: int = 16, grad: bool = False, residual: bool = False, **options: Any
) -> Call:
    if residual:
        options["residual"] = _normal(3, size, dtype=dtype, grad=grad)
    return (_normal(3, size, dtype=dtype, grad=grad), _normal(size, grad=grad)), options


def _rotary(
    dtype: torch.dtype = torch.float32, grad: bool = False, rotary_dim: int = 16, packed: bool = False, **options: Any
) -> Call:
    def draw(heads: int) -> Tensor:
        return _normal(*(() if packed else (1,)), 4, heads, 16, dtype=dtype, grad=grad)

    return (draw(2), draw(1), *rotary_tables(rotary_dim, 8)), options


def _swiglu(dtype: torch.dtype = torch.float32, grad: bool = False, strided: bool = False, **options: Any) -> Call:
    if strided:
        gate, up = _normal(3, 32, dtype=dtype).chunk(2, -1)
        return (gate, up), options
    return (_normal(3, 16, dtype=dtype, grad=grad), _normal(3, 16, dtype=dtype, grad=grad)), options


def _quantized(quantization: str, dtype: torch.dtype = torch.float32, grad: bool = False) -> Call:
    from fastlm.ops.quantized_linear import FORMATS, in_features

    row_bytes = FORMATS[quantization].block_bytes
    weight = torch.zeros(4, row_bytes, dtype=torch.uint8)
    return (_normal(3, in_features(quantization, row_bytes), dtype=dtype, grad=grad), weight, quantization), {}


def _dtypes(call: Callable[..., Call], dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp64")) -> list[Feature]:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    return [Feature(name, name, partial(call, dtype=names[name])) for name in dtypes]


FEATURES: dict[str, list[Feature]] = {
    "attention": [
        *_dtypes(_attention),
        *(Feature(f"head_dim {d}", f"head_dim {d}", partial(_attention, head_dim=d)) for d in (16, 80, 128, 256)),
        Feature("head_dim 512, bf16", "head_dim 512, bf16", partial(_attention, head_dim=512, dtype=torch.bfloat16)),
        Feature("head_dim 512, fp32", "head_dim 512, fp32", partial(_attention, head_dim=512)),
        Feature("head_dim not a multiple of 8", "8의 배수가 아닌 head_dim", partial(_attention, head_dim=20)),
        Feature("grouped heads (GQA, MQA)", "헤드 묶음 (GQA, MQA)", partial(_attention, kv_heads=1)),
        Feature("causal", "인과 마스크", partial(_attention, causal=True)),
        Feature("window", "창(window)", partial(_attention, causal=True, window=2)),
        Feature("softcap", "softcap", partial(_attention, softcap=2.0)),
        Feature("sinks", "sinks", partial(_attention, sinks=True)),
        Feature("additive bias", "더하는 bias", partial(_attention, bias=True)),
        Feature("packed sequences", "이어 붙인 문장", partial(_attention, packed=True)),
        Feature("scale below 0", "음수 scale", partial(_attention, scale=-0.5)),
        Feature("dropout", "드롭아웃", partial(_attention, dropout=0.3, seed=5)),
        Feature("log-sum-exp", "log-sum-exp", partial(_attention, return_lse=True)),
        Feature("gradients", "기울기", partial(_attention, grad=True), True),
        Feature("gradient of sinks", "sinks의 기울기", partial(_attention, grad=True, sinks=True), True),
        Feature("gradient of bias", "bias의 기울기", partial(_attention, grad=True, bias=True), True),
        Feature(
            "gradient through log-sum-exp",
            "log-sum-exp를 거친 기울기",
            partial(_attention, grad=True, return_lse=True),
            True,
        ),
    ],
    "decode_attention": [
        *_dtypes(_decode),
        Feature("int8 cache with scales", "int8 캐시와 scale", partial(_decode, cache=torch.int8)),
        Feature("fp8 cache with scales", "fp8 캐시와 scale", partial(_decode, cache=torch.float8_e4m3fn)),
        Feature("cache of another dtype", "자료형이 다른 캐시", partial(_decode, cache=torch.bfloat16)),
        *(Feature(f"head_dim {d}", f"head_dim {d}", partial(_decode, head_dim=d)) for d in (64, 80, 128, 256, 512)),
        Feature("head_dim not a multiple of 8", "8의 배수가 아닌 head_dim", partial(_decode, head_dim=20)),
        Feature("grouped heads (GQA, MQA)", "헤드 묶음 (GQA, MQA)", partial(_decode, heads=6)),
        Feature("2 to 8 queries (speculative)", "질의 2~8개 (추측 디코딩)", partial(_decode, query_len=8)),
        Feature("window", "창(window)", partial(_decode, window=3)),
        Feature("softcap", "softcap", partial(_decode, softcap=2.0)),
        Feature("sinks", "sinks", partial(_decode, sinks=True)),
        Feature(
            "shared prefix (triton alone reads it once)",
            "공유하는 앞부분 (한 번만 읽는 것은 triton)",
            partial(_decode, shared=True),
        ),
        Feature("gradients", "기울기", partial(_decode, grad=True), True),
    ],
    "sampling": [
        *_dtypes(_sample),
        Feature("temperature", "온도", partial(_sample, temperature=0.7)),
        Feature("greedy (temperature 0)", "탐욕 선택 (온도 0)", partial(_sample, temperature=0.0)),
        Feature("top-k", "top-k", partial(_sample, top_k=5)),
        Feature("top-p", "top-p", partial(_sample, top_p=0.8)),
        Feature("min-p", "min-p", partial(_sample, min_p=0.1)),
        Feature("typical", "typical", partial(_sample, typical_p=0.9)),
        Feature("order of transformers", "transformers의 순서", partial(_sample, top_k=9, top_p=0.8, min_p=0.1)),
        Feature("order of vLLM", "vLLM의 순서", partial(_sample, top_k=9, top_p=0.8, min_p=0.1, order="vllm")),
        Feature(
            "repetition, presence, frequency penalties",
            "반복·존재·빈도 벌점",
            partial(_sample, penalty=True, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2),
        ),
        Feature(
            "a setting for each row",
            "행마다 다른 설정",
            lambda: _sample(temperature=torch.tensor([0.5, 1.0]), top_k=torch.tensor([0, 5])),
        ),
        Feature("logit bias", "로짓 bias", partial(_sample, logit_bias=torch.zeros(2, 40))),
        Feature(
            "grammar mask", "문법 마스크", partial(_sample, mask=torch.tensor([[5, 1], [7, 0]], dtype=torch.int32))
        ),
        Feature("log-probabilities", "로그 확률", partial(_sample, return_logprobs=True)),
        Feature("most probable tokens", "가장 유력한 토큰들", partial(_sample, num_logprobs=3)),
    ],
    "fused_linear_sample": [
        *_dtypes(_linear_sample),
        Feature("temperature", "온도", partial(_linear_sample, temperature=0.7)),
        Feature("greedy (temperature 0)", "탐욕 선택 (온도 0)", partial(_linear_sample, temperature=0.0)),
        Feature("top-k, top-p, min-p", "top-k, top-p, min-p", partial(_linear_sample, top_k=9, top_p=0.8, min_p=0.1)),
        Feature("penalties", "벌점", partial(_linear_sample, penalty=True, repetition_penalty=1.2)),
        Feature("logit bias", "로짓 bias", partial(_linear_sample, logit_bias=torch.zeros(40))),
        Feature("softcap", "softcap", partial(_linear_sample, softcap=3.0)),
        Feature("log-probabilities", "로그 확률", partial(_linear_sample, return_logprobs=True)),
        Feature("most probable tokens", "가장 유력한 토큰들", partial(_linear_sample, num_logprobs=3)),
    ],
    "linear_cross_entropy": [
        *_dtypes(_cross_entropy),
        Feature("label smoothing", "레이블 스무딩", partial(_cross_entropy, label_smoothing=0.1)),
        Feature("z-loss", "z-loss", partial(_cross_entropy, z_loss=1e-3)),
        Feature("softcap", "softcap", partial(_cross_entropy, softcap=3.0)),
        Feature("a loss for each token", "토큰마다의 손실", partial(_cross_entropy, reduction="none")),
        Feature("log-probabilities and entropy", "로그 확률과 엔트로피", partial(_cross_entropy, return_metrics=True)),
        Feature("gradients", "기울기", partial(_cross_entropy, grad=True), True),
        Feature(
            "gradients of log-probabilities and entropy",
            "로그 확률과 엔트로피의 기울기",
            partial(_cross_entropy, grad=True, return_metrics=True),
            True,
        ),
    ],
    "rms_norm": [
        *_dtypes(_norm),
        Feature("residual addition", "잔차 덧셈", partial(_norm, residual=True)),
        Feature("weight offset (Gemma)", "가중치 오프셋 (Gemma)", partial(_norm, weight_offset=1.0)),
        Feature("gradients", "기울기", partial(_norm, grad=True, residual=True), True),
    ],
    "rotary": [
        *_dtypes(_rotary),
        Feature("interleaved pairs (GPT-J)", "교차 짝 (GPT-J)", partial(_rotary, interleaved=True)),
        Feature("part of the head", "헤드의 일부만", partial(_rotary, rotary_dim=8)),
        Feature("positions", "위치 지정", lambda: _rotary(positions=torch.tensor([3, 0, 7, 2]))),
        Feature("packed sequences", "이어 붙인 문장", partial(_rotary, packed=True)),
        Feature("gradients", "기울기", partial(_rotary, grad=True), True),
    ],
    "swiglu": [
        *_dtypes(_swiglu),
        Feature("GELU (GeGLU)", "GELU (GeGLU)", partial(_swiglu, activation="gelu_tanh")),
        Feature("halves of one projection", "한 투영의 두 반쪽", partial(_swiglu, strided=True)),
        Feature("gradients", "기울기", partial(_swiglu, grad=True), True),
    ],
    "quantized_linear": [
        *_dtypes(partial(_quantized, "q8_0")),
        *(
            Feature(f.upper(), f.upper(), partial(_quantized, f))
            for f in ("q8_0", "q5_0", "q4_0", "q4_k", "q5_k", "q6_k")
        ),
        Feature("gradients", "기울기", partial(_quantized, "q8_0", grad=True), True),
    ],
}
