"""What a transformer is made of, and how that is written in a Hugging Face config.json."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fastlm.errors import ConfigError

SUPPORTED_MODEL_TYPES = ("llama", "qwen3")
MAX_SIZE = 1 << 24  # of any dimension: a corrupt file must not make us ask for absurd memory


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

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

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        require_positive(self, "intermediate_size", "context_length", "rope_theta", "norm_eps")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads must divide num_heads ({self.num_heads}); {self.num_kv_heads} does not")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, not {self.head_dim}")

    def to_huggingface(self, eos_token_id: int | None = None) -> dict[str, Any]:
        """The config.json with which `transformers.AutoModelForCausalLM` builds the same model."""
        model_type, architecture = ("qwen3", "Qwen3ForCausalLM") if self.qk_norm else ("llama", "LlamaForCausalLM")
        return {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context_length,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": eos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": None,
            "dtype": "float32",
        }

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads a Llama or Qwen 3 config.json.

        Raises:
            ConfigError: a key is missing or of the wrong type, or the model has a feature that this one lacks.
        """
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ConfigError(f"model_type {model_type!r} is not supported; it must be one of {SUPPORTED_MODEL_TYPES}")
        _reject_unsupported(config)
        rope = config.get("rope_parameters") or config
        hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
        require_positive_values(hidden_size=hidden_size, num_attention_heads=num_heads)
        return cls(
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", default=num_heads),
            head_dim=_integer(config, "head_dim", default=hidden_size // num_heads),
            intermediate_size=_integer(config, "intermediate_size"),
            context_length=_integer(config, "max_position_embeddings"),
            rope_theta=_number(rope, "rope_theta", default=10_000.0),
            norm_eps=_number(config, "rms_norm_eps", default=1e-6),
            qk_norm=model_type == "qwen3",
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _reject_unsupported(config: dict[str, Any]) -> None:
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    wrong = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "rope_scaling": config.get("rope_scaling") is not None or rope_type != "default",
        "use_sliding_window": bool(config.get("use_sliding_window", False)),
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"the model's config.json sets {key}={config.get(key)!r}, which is not supported")


def _integer(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    value = default if value is None else value
    if type(value) is not int:
        raise ConfigError(f"config.json: {key} must be an integer, not {value!r}")
    return value


def _number(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float):
        raise ConfigError(f"config.json: {key} must be a number, not {value!r}")
    return float(value)


def require_positive(config: Any, *names: str) -> None:
    """Raises ConfigError unless each named field is a number above zero, and an integer if declared so."""
    require_positive_values(**{name: getattr(config, name) for name in names})
    declared = {f.name: f.type for f in fields(config)}
    for name in names:
        if declared[name] in ("int", int) and type(getattr(config, name)) is not int:
            raise ConfigError(f"{name} must be an integer, not {getattr(config, name)!r}")
        if getattr(config, name) > MAX_SIZE:
            raise ConfigError(f"{name} is {getattr(config, name)}, above the limit of {MAX_SIZE}")


def require_positive_values(**values: float) -> None:
    for name, value in values.items():
        if type(value) not in (int, float) or not value > 0:
            raise ConfigError(f"{name} must be a positive number, not {value!r}")
