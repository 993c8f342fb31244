"""Text from a model."""

from fastlm.inference.generation import Completion, Piece, generate, stream
from fastlm.inference.sampling_params import SamplingParams

__all__ = ["Completion", "Piece", "SamplingParams", "generate", "stream"]
