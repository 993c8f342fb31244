"""What a caller may ask of generation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastlm.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How one continuation is drawn.

    Args:
        max_tokens: most tokens to generate.
        temperature: 0 takes the most probable token; above 1 flattens the distribution.
        top_k, top_p, min_p: filters on the distribution; None leaves it whole.
        repetition_penalty: above 1, makes tokens of the prompt and the continuation less probable (Keskar et al. 2019).
        seed: same seed, same text, whatever else is generated beside it.
        stop: strings at which generation ends; they are not part of the text.
        ignore_eos: go on after an end-of-text token instead of ending there.

    Raises ConfigError when a value is out of range.
    """

    max_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 0:
            raise ConfigError(f"max_tokens must be 0 or a positive integer, not {self.max_tokens!r}")
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature!r}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ConfigError(f"top_k must be a positive integer, not {self.top_k!r}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"min_p must be between 0 and 1, not {self.min_p!r}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be a positive number, not {self.repetition_penalty!r}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must lie between 0 and 2^63 - 1, not {self.seed!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError("stop must be a tuple of non-empty strings")
