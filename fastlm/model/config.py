"""What a transformer is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from fastlm.errors import ConfigError

MAX_SIZE = 1 << 24  # of any dimension: a corrupt file must not make us ask for absurd memory
MAX_LAYERS = 1 << 12

NormKind = Literal["rms_norm", "layer_norm"]
NormPlacement = Literal["before", "after", "around"]
Positions = Literal["rotary", "learned"]
Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to reach a longer context than the model was first trained on.

    "linear" divides every frequency by `factor` (Chen et al., arXiv 2306.15595). "llama3" divides those whose
    wavelength is above original_context_length / low_freq_factor, keeps those below original_context_length /
    high_freq_factor, and blends between (Llama 3.1). "factors" divides each frequency by its own of `factors`.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    factors: tuple[float, ...] = ()  # head_dim / 2 of them

    def __post_init__(self) -> None:
        if isinstance(self.factors, list):
            object.__setattr__(self, "factors", tuple(self.factors))
        require_one_of("rope scaling", self.kind, ("linear", "llama3", "factors"))
        require_positive_values(**{f"factors[{i}]": factor for i, factor in enumerate(self.factors)})
        require_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_context_length")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor must be above low_freq_factor ({self.low_freq_factor}), not {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are Llama's: RMSNorm before each part, rotary positions, SwiGLU, no biases.

    Raises ConfigError when a value makes no sense, alone or beside another.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int  # tokens, the longest sequence
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False  # RMSNorm over each head's query and key, as in Qwen 3
    tie_embeddings: bool = True  # the output layer is the embedding table
    positions: Positions = "rotary"  # or a learned table, added to the embeddings, as in GPT-2
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None  # for layers with a window, unscaled, as in Gemma 3; None: as the others
    norm: NormKind = "rms_norm"
    norm_placement: NormPlacement = "before"  # of attention and MLP each: Llama "before", Gemma 2 "around"
    norm_weight_offset: float = 0.0  # 1.0 in Gemma, whose checkpoints store weight - 1
    activation: Activation = "silu"
    gated_mlp: bool = True  # act(gate(x)) · up(x), else act(up(x))
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    query_pre_attn_scalar: float | None = None  # logits are q · k over its root; None: head_dim
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embeddings: bool = False  # times the root of hidden_size, as in Gemma
    sliding_window: int | None = None  # tokens that a query sees, itself included
    full_attention_layers: tuple[int, ...] = ()  # layers without the window

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # read from JSON
            object.__setattr__(self, "rope_scaling", _rope_scaling(self.rope_scaling))
        if isinstance(self.full_attention_layers, list):
            object.__setattr__(self, "full_attention_layers", tuple(self.full_attention_layers))
        require_positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        require_positive(self, "intermediate_size", "context_length", "rope_theta", "norm_eps")
        for name in ("rope_local_theta", "query_pre_attn_scalar", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        for name, kind in (
            ("positions", Positions),
            ("norm", NormKind),
            ("norm_placement", NormPlacement),
            ("activation", Activation),
        ):
            require_one_of(name, getattr(self, name), get_args(kind))
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(f"num_layers is {self.num_layers}, above the limit of {MAX_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads must divide num_heads ({self.num_heads}); {self.num_kv_heads} does not")
        if self.head_dim % 2 and self.positions == "rotary":
            raise ConfigError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise ConfigError(f"rope_scaling must have {self.head_dim // 2} factors, not {len(scaling.factors)}")
        if self.gated_mlp and self.activation == "gelu":
            raise ConfigError('a gated MLP has activation "silu" or "gelu_tanh", not "gelu"')
        if self.norm == "layer_norm" and self.norm_weight_offset:
            raise ConfigError("norm_weight_offset is for rms_norm; layer_norm has none")
        self._check_window()

    def _check_window(self) -> None:
        if self.sliding_window is None:
            if self.full_attention_layers or self.rope_local_theta is not None:
                raise ConfigError("full_attention_layers and rope_local_theta need a sliding_window")
            return
        require_positive(self, "sliding_window")
        layers = self.full_attention_layers
        if any(type(i) is not int for i in layers) or list(layers) != sorted(set(layers) & set(range(self.num_layers))):
            raise ConfigError(f"full_attention_layers must be ascending and below {self.num_layers}, not {layers}")

    def window(self, layer: int) -> int | None:
        """How many tokens a query of this layer sees, itself included; None: all before it."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them; `ModelConfig(**fields)` reads them back."""
        return asdict(self)


def _rope_scaling(values: dict[str, Any]) -> RopeScaling:
    try:
        return RopeScaling(**values)
    except TypeError as error:
        raise ConfigError(f"rope_scaling is not complete: {error}") from None


def require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def require_positive(config: Any, *names: str) -> None:
    """Raises ConfigError unless each named field is a number above zero, and an integer if declared so."""
    require_positive_values(**{name: getattr(config, name) for name in names})
    declared = {f.name: str(f.type) for f in fields(config)}
    for name in names:
        value = getattr(config, name)
        if declared[name].startswith("int"):
            if type(value) is not int:
                raise ConfigError(f"{name} must be an integer, not {value!r}")
            if value > MAX_SIZE:
                raise ConfigError(f"{name} is {value}, above the limit of {MAX_SIZE}")


def require_positive_values(**values: float) -> None:
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be a positive number, not {value!r}")
