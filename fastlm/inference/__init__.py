"""Text from a model."""

from fastlm.inference.engine import Engine, Stats
from fastlm.inference.generation import generate, stream
from fastlm.inference.outputs import Completion, Piece, TokenLogprob
from fastlm.inference.sampling_params import SamplingParams

__all__ = ["Completion", "Engine", "Piece", "SamplingParams", "Stats", "TokenLogprob", "generate", "stream"]
