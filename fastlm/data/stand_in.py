"""A tokenizer for whoever has none."""

from __future__ import annotations

from fastlm.data import english_text, korean_text
from fastlm.tokenizer import BpeTrainer, Tokenizer

VOCAB_SIZE = 16384


def stand_in_tokenizer() -> Tokenizer:
    """Trained in a fraction of a second on the texts that come with fastlm.

    The Korean one is short, so it counts eightfold. The syllables in use, alone and after a space, are added, so that
    none falls to bytes.
    """
    # The 2,350 syllables of the standard KS X 1001, which EUC-KR keeps in rows 0xB0 to 0xC8.
    syllables = bytes(byte for row in range(0xB0, 0xC9) for cell in range(0xA1, 0xFF) for byte in (row, cell))
    spaced = [f"{syllable} {syllable}" for syllable in syllables.decode("euc_kr")]
    return BpeTrainer(VOCAB_SIZE).train_from_iterator([english_text(), *[korean_text()] * 8, *spaced * 10])
