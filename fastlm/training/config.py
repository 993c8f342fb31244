"""How a model is trained, and the sizes that are offered by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fastlm.errors import ConfigError
from fastlm.model.config import ModelConfig
from fastlm.model.rnn import RNNConfig


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that, with the model's config and the data, decides the weights after each step.

    Exactly one of `steps` and `minutes` is given. With `minutes`, the number of steps is fixed when the learning rate
    begins to decay, from the pace until then (see `Schedule`); from there the run equals one of that many `steps`.
    """

    steps: int | None = None
    minutes: float | None = None  # wall-clock, from `started_at` to the end of the final evaluation
    batch_size: int = 8  # sequences a step
    accumulation: int = 1  # parts that a step's batch is computed in
    optimizer: Literal["muon", "adamw"] = "muon"  # of the matrices of the blocks
    learning_rate: float = 0.04  # of those
    embedding_learning_rate: float = 0.008  # AdamW, for everything else
    weight_decay: float = 0.0  # of the matrices of the blocks
    schedule: Literal["linear", "cosine"] = "linear"  # how the rate falls
    warmup_steps: int = 20
    decay_fraction: float = 0.6  # last part of the run, over which the rate falls to zero
    ema: float | None = None  # decay of a moving average of the weights, which then is the model: 0.999
    patience: int | None = None  # evaluations without a better one after which the run ends with the best weights
    activation_checkpointing: bool = False  # less memory, a third more work
    gradient_clip: float = 1.0  # largest norm of all gradients together
    separate_documents: bool = False  # no token sees another document that shares its row
    dtype: Literal["float32", "bfloat16"] = "float32"  # what layers compute in; weights are always float32
    seed: int = 0
    evaluations: int = 10  # partial evaluations during the run, evenly spread
    keep_best: int = 1  # of those, how many of the best keep their weights
    checkpoint_seconds: float = 20.0
    max_skipped_steps: int = 10  # non-finite steps in a row before training stops

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError("give either steps or minutes")
        for name in ("steps", "batch_size", "accumulation", "keep_best", "max_skipped_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        for name in ("minutes", "learning_rate", "embedding_learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} must be a positive number, not {value!r}")
        for name in ("warmup_steps", "weight_decay", "evaluations", "checkpoint_seconds", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        if not 0.0 < self.decay_fraction <= 1.0:
            raise ConfigError(f"decay_fraction must be above 0 and at most 1, not {self.decay_fraction}")
        if self.batch_size % self.accumulation:
            raise ConfigError(f"accumulation must divide batch_size ({self.batch_size}); {self.accumulation} does not")
        if self.schedule not in ("linear", "cosine"):
            raise ConfigError(f"schedule must be linear or cosine, not {self.schedule!r}")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ConfigError(f"ema must lie between 0 and 1, not {self.ema!r}")
        if self.patience is not None and (type(self.patience) is not int or self.patience < 1):
            raise ConfigError(f"patience must be a positive integer, not {self.patience!r}")
        if self.optimizer not in ("muon", "adamw"):
            raise ConfigError(f"optimizer must be muon or adamw, not {self.optimizer!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")


@dataclass(frozen=True)
class Preset:
    """A model size by name."""

    hidden_size: int
    num_layers: int
    head_dim: int
    context_length: int
    batch_size: int


PRESETS = {
    "tiny": Preset(hidden_size=192, num_layers=4, head_dim=64, context_length=256, batch_size=8),
    "small": Preset(hidden_size=384, num_layers=6, head_dim=64, context_length=256, batch_size=16),
    "base": Preset(hidden_size=768, num_layers=12, head_dim=64, context_length=512, batch_size=32),
}


def preset_for(train_bytes: int, minutes: float | None) -> str:
    """A name in PRESETS: a larger model pays when there is time for it and text that it does not learn by heart."""
    if train_bytes < 8 << 20 or minutes is None or minutes < 20:
        return "tiny"
    return "small" if train_bytes < 256 << 20 or minutes < 600 else "base"


def fast_dtype() -> Literal["float32", "bfloat16"]:
    """What layers compute in fastest on this machine's CPU: bfloat16 where it has instructions for it."""
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if has_bfloat16() else "float32"


def embedding_learning_rate(hidden_size: int) -> float:
    """AdamW's rate for a transformer's embeddings and output layer: what suits "tiny", in proportion to 1 / width.

    A step moves each weight of the output layer by about the rate, and so a logit by the rate times the width. See
    Yang et al., "Tensor Programs V", 2022 (arXiv 2203.03466), table 3.
    """
    return TrainingConfig.embedding_learning_rate * PRESETS["tiny"].hidden_size / hidden_size


def adamw_learning_rate(hidden_size: int) -> float:
    """AdamW's rate for the matrices of the blocks, where it takes Muon's place. It too falls as the width grows."""
    return 0.002 * PRESETS["tiny"].hidden_size / hidden_size


def transformer_config(
    vocab_size: int, preset: Preset, *, num_kv_heads: int | None = None, qk_norm: bool = True
) -> ModelConfig:
    """The transformer of a preset; its feed-forward layer is 8/3 as wide as it, in steps of 32."""
    if preset.hidden_size % preset.head_dim:
        raise ConfigError(f"hidden_size must be a multiple of head_dim {preset.head_dim}, not {preset.hidden_size}")
    num_heads = preset.hidden_size // preset.head_dim
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=preset.hidden_size,
        num_layers=preset.num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=preset.head_dim,
        intermediate_size=math.ceil(preset.hidden_size * 8 / 3 / 32) * 32,
        context_length=preset.context_length,
        qk_norm=qk_norm,
    )


def rnn_config(vocab_size: int, preset: Preset, cell: str) -> RNNConfig:
    return RNNConfig(vocab_size, preset.hidden_size, preset.num_layers, preset.context_length, cell)
