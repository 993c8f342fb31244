"""Text from a model."""

from fastlm.inference.beam_search import Beam
from fastlm.inference.engine import Engine, Stats
from fastlm.inference.generation import generate, stream
from fastlm.inference.llm import LLM, Score
from fastlm.inference.outputs import Completion, Piece, TokenLogprob
from fastlm.inference.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "Beam",
    "Completion",
    "Engine",
    "Piece",
    "SamplingParams",
    "Score",
    "Stats",
    "TokenLogprob",
    "generate",
    "stream",
]
