"""tiktoken's vocabularies: the `.tiktoken` file format and OpenAI's published encodings.

A `.tiktoken` file has one line for each token: its bytes in base64, a space, its rank (github.com/openai/tiktoken,
tiktoken/load.py). tiktoken keeps the files that it downloads in a cache directory, each under the SHA-1 of its
address; they are found there by that name, and used only if their SHA-256 is the published one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastlm.errors import TokenizerError

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

MAX_FILE_BYTES = 256 << 20  # the largest published file (200,000 tokens) has 3.6 MB


@dataclass(frozen=True)
class Encoding:
    """One published encoding: which file it reads, the pattern and the special tokens that it adds."""

    file: str
    cache_name: str  # SHA-1 of the address that tiktoken downloads the file from
    sha256: str
    pattern: str
    special_tokens: dict[str, int]


_R50K = (
    "r50k_base",
    "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4",
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "gpt2",
)
_P50K = (
    "p50k_base",
    "ec7223a39ce59f226a68acc30dc1af2788490e15",
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
    "gpt2",
)
_CL100K = (
    "cl100k_base",
    "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "cl100k",
)
_O200K = (
    "o200k_base",
    "fb374d419588a4632f3f557e76b4b70aebbca790",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "o200k",
)

_CL100K_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
_O200K_SPECIAL = {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}
_HARMONY_SPECIAL = (
    _O200K_SPECIAL
    | {
        "<|startoftext|>": 199998,
        "<|return|>": 200002,
        "<|constrain|>": 200003,
        "<|channel|>": 200005,
        "<|start|>": 200006,
        "<|end|>": 200007,
        "<|message|>": 200008,
        "<|call|>": 200012,
    }
    | {f"<|reserved_{i}|>": i for i in (200000, 200001, 200004, 200009, 200010, 200011, *range(200013, 201088))}
)

# GPT-2's vocabulary is r50k_base's.
ENCODINGS = {
    "gpt2": Encoding(*_R50K, {"<|endoftext|>": 50256}),
    "r50k_base": Encoding(*_R50K, {"<|endoftext|>": 50256}),
    "p50k_base": Encoding(*_P50K, {"<|endoftext|>": 50256}),
    "p50k_edit": Encoding(
        *_P50K,
        {"<|endoftext|>": 50256, "<|fim_prefix|>": 50281, "<|fim_middle|>": 50282, "<|fim_suffix|>": 50283},
    ),
    "cl100k_base": Encoding(*_CL100K, _CL100K_SPECIAL),
    "o200k_base": Encoding(*_O200K, _O200K_SPECIAL),
    "o200k_harmony": Encoding(*_O200K, _HARMONY_SPECIAL),
}


def load_tiktoken(
    name_or_path: str | Path,
    *,
    pattern: str | None = None,
    special_tokens: dict[str, int] | None = None,
    download: bool = False,
) -> Tokenizer:
    """An encoding by name (`ENCODINGS` lists them) or a `.tiktoken` file.

    Args:
        pattern: how a file's vocabulary splits text; needed for a path, and fixed for a name.
        special_tokens: for a path, its special tokens; for a name, others in place of the published ones.
        download: for a name that is not in the cache, let the tiktoken package download it there.

    Raises:
        TokenizerError: an unknown name, a file that is missing, corrupt or not the published one.
    """
    from fastlm.tokenizer.tokenizer import Tokenizer

    encoding = ENCODINGS.get(name_or_path) if isinstance(name_or_path, str) else None
    if encoding is not None:
        if pattern is not None:
            raise TokenizerError(f"{name_or_path} has the pattern {encoding.pattern}; leave `pattern` out")
        data = _published_file(encoding, download)
        specials = encoding.special_tokens if special_tokens is None else special_tokens
        ranks = parse_ranks(data, encoding.file)
        return Tokenizer(ranks, pattern=encoding.pattern, special_tokens=specials, name=str(name_or_path))

    path = Path(name_or_path)
    if not path.is_file():
        raise TokenizerError(
            f"{name_or_path}: neither a file nor the name of an encoding; names are {', '.join(ENCODINGS)}"
        )
    if pattern is None:
        raise TokenizerError(
            f"{path}: a .tiktoken file does not say how text is split; pass pattern=, such as 'cl100k'"
        )
    ranks = parse_ranks(_read(path), str(path))
    try:
        return Tokenizer(ranks, pattern=pattern, special_tokens=special_tokens, name=path.stem)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def parse_ranks(data: bytes, source: str) -> dict[bytes, int]:
    """Ranks of the content of a `.tiktoken` file. `source` names it in messages.

    Raises:
        TokenizerError: a line is not a base64 token and a rank, or a token or rank is there twice.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not rank.isdigit() or len(rank) > 9:
                raise ValueError("no rank")
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{source}: line {number} is {line[:60]!r}, not a token in base64 and a rank"
            ) from None
        if token in ranks:
            raise TokenizerError(f"{source}: line {number}: the token {token[:60]!r} is there twice")
        ranks[token] = int(rank)
    if not ranks:
        raise TokenizerError(f"{source}: holds no token")
    if len(set(ranks.values())) != len(ranks):
        raise TokenizerError(f"{source}: two tokens have the same rank")
    return ranks


def cache_directory() -> Path:
    """Where tiktoken keeps its files."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _published_file(encoding: Encoding, download: bool) -> bytes:
    path = cache_directory() / encoding.cache_name
    if download and not path.is_file():
        _download(encoding)
    if not path.is_file():
        raise TokenizerError(
            f"{encoding.file} is not in tiktoken's cache: there is no {path}. Set TIKTOKEN_CACHE_DIR to a directory "
            "that holds it, or pass download=True to let the tiktoken package download it"
        )
    data = _read(path)
    found = hashlib.sha256(data).hexdigest()
    if found != encoding.sha256:
        raise TokenizerError(
            f"{path}: SHA-256 is {found}, not {encoding.sha256} as published for {encoding.file}; delete the file and "
            "download it again"
        )
    return data


def _download(encoding: Encoding) -> None:
    try:
        import tiktoken
    except ImportError:
        raise TokenizerError("download=True needs the tiktoken package: pip install tiktoken") from None
    try:
        tiktoken.get_encoding(encoding.file)
    except Exception as error:
        raise TokenizerError(f"tiktoken could not download {encoding.file}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so no vocabulary")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}") from None
