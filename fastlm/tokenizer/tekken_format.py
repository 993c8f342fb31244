"""Mistral's `tekken.json`: a tiktoken vocabulary with its pattern and special tokens.

The format is that of github.com/mistralai/mistral-common, tokens/tokenizers/tekken.py. Special tokens have the first
ids, and the id of any other token is its rank plus their number. A file holds more ranks than its model uses; those
past `default_vocab_size` are cut.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastlm.errors import TokenizerError
from fastlm.tokenizer.added_tokens import Settings
from fastlm.tokenizer.huggingface_reader import MAX_ID

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

MAX_FILE_BYTES = 256 << 20  # the largest published file has 20 MB

# Of files that list none (Mistral NeMo, Pixtral), as mistral-common has them.
_SPECIAL_TOKENS = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
]


def load_tekken(path: str | Path) -> Tokenizer:
    """Reads a `tekken.json`. Ids equal those of mistral-common's `Tekkenizer`.

    Raises:
        TokenizerError: the file is missing or corrupt.
    """
    from fastlm.tokenizer.tokenizer import Tokenizer

    path = Path(path)

    def fail(message: str) -> NoReturn:
        raise TokenizerError(f"{path}: {message}")

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            fail(f"larger than {MAX_FILE_BYTES >> 20} MiB, so no tekken.json")
        document = json.loads(path.read_bytes())
    except TokenizerError:
        raise
    except OSError as error:
        fail(f"{error.strerror}; give the path of a tekken.json")
    except (ValueError, RecursionError) as error:
        fail(f"no valid JSON, perhaps cut short: {error}")
    config = document.get("config") if isinstance(document, dict) else None
    vocab = document.get("vocab") if isinstance(document, dict) else None
    if not isinstance(config, dict) or not isinstance(vocab, list):
        fail("has no config and vocab, as a tekken.json has")
    pattern = config.get("pattern")
    size, num_special = (config.get(key) for key in ("default_vocab_size", "default_num_special_tokens"))
    if not isinstance(pattern, str) or type(size) is not int or type(num_special) is not int:
        fail("its config lacks the pattern, default_vocab_size or default_num_special_tokens")
    if not 0 <= num_special <= size <= MAX_ID or len(vocab) < size - num_special:
        fail(f"its config asks for {size!r:.40} ids, {num_special!r:.40} of them special, of {len(vocab)} ranks")

    ranks: dict[bytes, int] = {}
    for number, entry in enumerate(vocab[: size - num_special]):
        token = _decode(entry.get("token_bytes")) if isinstance(entry, dict) and entry.get("rank") == number else None
        if not token or token in ranks:
            fail(f"vocab entry {number} is {entry!r:.80}, not a new token of that rank")
        ranks[token] = number + num_special

    specials = {f"<SPECIAL_{i}>": i for i in range(num_special)}
    listed = document.get("special_tokens")
    if not listed:
        listed = [{"rank": i, "token_str": token} for i, token in enumerate(_SPECIAL_TOKENS[:num_special])]
    name_of = {i: name for name, i in specials.items()}
    for entry in listed if isinstance(listed, list) else [None]:
        rank, token = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, dict) else (None, None)
        if type(rank) is not int or not 0 <= rank < num_special or not isinstance(token, str) or not token:
            fail(f"special token {entry!r:.80} has no valid rank and token_str")
        name_of[rank] = token
    specials = {name: i for i, name in name_of.items()}
    if len(specials) != num_special:
        fail("two special tokens are spelled alike")
    bos, eos, pad = (token if token in specials else None for token in ("<s>", "</s>", "<pad>"))
    settings = Settings(prefix_ids=(specials[bos],) if bos else (), bos_token=bos, eos_token=eos, pad_token=pad)
    try:
        return Tokenizer(ranks, pattern=pattern, special_tokens=specials, name=path.stem, settings=settings)
    except TokenizerError as error:
        fail(str(error))


def _decode(value: Any) -> bytes | None:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (ValueError, binascii.Error):
        return None
