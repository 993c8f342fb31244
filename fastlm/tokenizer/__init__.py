"""BPE tokenizers, byte-level and SentencePiece's, exact to the id, their training, and text at other granularities.

Names load on first use, so importing this package needs no native core.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.tokenizer.added_tokens import AddedToken, Settings
    from fastlm.tokenizer.granularity import (
        GRANULARITIES,
        characters,
        code_points,
        morphemes,
        paragraphs,
        sentences,
        subwords,
        words,
    )
    from fastlm.tokenizer.sentencepiece import SentencePieceTokenizer, SpaceRules
    from fastlm.tokenizer.streaming import DecodeStream
    from fastlm.tokenizer.tiktoken_adapter import as_tiktoken
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.tokenizer.trainer import BpeTrainer, TrainingProgress, TrainingReport
    from fastlm.tokenizer.transformers_adapter import as_transformers

_MODULE_OF = {
    "Tokenizer": "tokenizer",
    "AddedToken": "added_tokens",
    "Settings": "added_tokens",
    "SentencePieceTokenizer": "sentencepiece",
    "SpaceRules": "sentencepiece",
    "as_tiktoken": "tiktoken_adapter",
    "as_transformers": "transformers_adapter",
    "DecodeStream": "streaming",
    "BpeTrainer": "trainer",
    "TrainingProgress": "trainer",
    "TrainingReport": "trainer",
    "GRANULARITIES": "granularity",
    "characters": "granularity",
    "code_points": "granularity",
    "morphemes": "granularity",
    "paragraphs": "granularity",
    "sentences": "granularity",
    "subwords": "granularity",
    "words": "granularity",
}

__all__ = [
    "GRANULARITIES",
    "AddedToken",
    "BpeTrainer",
    "DecodeStream",
    "SentencePieceTokenizer",
    "Settings",
    "SpaceRules",
    "Tokenizer",
    "TrainingProgress",
    "TrainingReport",
    "as_tiktoken",
    "as_transformers",
    "characters",
    "code_points",
    "morphemes",
    "paragraphs",
    "sentences",
    "subwords",
    "words",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
