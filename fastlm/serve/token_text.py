"""How single tokens are written, which may be parts of characters."""

from __future__ import annotations

from fastlm.errors import TokenizerError
from fastlm.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # OpenAI's word for minus infinity, which JSON cannot say


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Nothing for a hole in the vocabulary, which a model may draw and which spells nothing."""
    try:
        return tokenizer.token_bytes(token)
    except TokenizerError:
        return b""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The token's text or, when it is no whole text, its bytes as OpenAI writes them: bytes:\\xec\\x98."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
