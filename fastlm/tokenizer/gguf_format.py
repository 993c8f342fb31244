"""Vocabularies in GGUF files: the metadata under `tokenizer.ggml.`.

Only the metadata at the front of a file is read (`fastlm._gguf`), so the tensors behind it may be missing.

Read are the models "gpt2" (byte-level BPE), "llama" (SentencePiece's BPE with scores) and "gemma4" (the same with
merges). How a gpt2-like vocabulary splits text the file says by a name alone, `tokenizer.ggml.pre`; the names that are
known here stand for the pattern of the original tokenizer.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastlm._core import native
from fastlm._gguf import GgufArray, GgufFile
from fastlm.errors import CheckpointError, TokenizerError
from fastlm.tokenizer.added_tokens import AddedToken, Settings
from fastlm.tokenizer.byte_level import from_chars
from fastlm.tokenizer.huggingface_reader import MAX_ID, MAX_TOKEN_BYTES, merges_unless_implied
from fastlm.tokenizer.normalizers import Normalizer
from fastlm.tokenizer.patterns import Pattern
from fastlm.tokenizer.sentencepiece import META, SentencePieceTokenizer, SpaceRules
from fastlm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

PATTERN_OF = {
    "gpt-2": "gpt2",
    "phi-2": "gpt2",
    "olmo": "gpt2",
    "jais": "gpt2",
    "mpt": "gpt2",
    "trillion": "gpt2",
    "exaone4": "gpt2",
    "a.x-4.0": "gpt2",
    "roberta-bpe": "gpt2",
    "dbrx": "llama3",
    "smaug-bpe": "llama3",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "falcon3": "llama3",
    "midm-2.0": "llama3",
    "lfm2": "llama3",
    "pixtral": "tekken",
    "tekken": "tekken",
    "gpt-4o": "o200k",
    "llama4": "o200k",
    "kanana2": "o200k",
    "chatglm-bpe": "llama3",
    "glm4": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "kormo": "qwen2",
    "megrez": "qwen2",
    "hunyuan": "qwen2",
    "stablelm2": "qwen2",
    "solar-open": "qwen2",
    "qwen35": "qwen3.5",
    "starcoder": "starcoder",
    "refact": "starcoder",
    "command-r": "starcoder",
    "smollm": "starcoder",
    "codeshell": "starcoder",
    "exaone": "starcoder",
    "minerva-7b": "starcoder",
    "exaone-moe": "exaone-moe",
    "deepseek-llm": "deepseek-llm",
    "deepseek-coder": "deepseek-coder",
    "deepseek-v3": "deepseek-v3",
    "hunyuan-dense": "deepseek-v3",
}
"""`tokenizer.ggml.pre` -> pattern."""
_IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0", "lfm2", "pixtral", "tekken", "glm4"}
_NFC = {"qwen2", "deepseek-r1-qwen", "kormo", "megrez"}  # their tokenizer.json normalizes


def load_gguf(path: str | Path, *, pattern: Pattern | None = None) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Args:
        pattern: how a gpt2-like vocabulary splits text, for a file that does not say it.

    Raises:
        TokenizerError: the file is missing, cut short, corrupt, or of a kind that fastlm does not read (named).
    """
    try:
        file = GgufFile(path, metadata_only=True)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    tokenizer = _Vocabulary(file).tokenizer(pattern)
    native().give_back_memory()
    return tokenizer


class _Vocabulary:
    """The `tokenizer.` metadata of one file on its way to a Tokenizer."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.path = file.path

    def fail(self, message: str) -> NoReturn:
        raise TokenizerError(f"{self.path}: {message}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value under `tokenizer.ggml.`; strings of a list come as bytes."""
        value = self.file.metadata.get(f"tokenizer.ggml.{key}", default)
        if isinstance(value, GgufArray):
            value = self.file.array(f"tokenizer.ggml.{key}")
        if value is not default and type(value) is not kind:
            self.fail(f"tokenizer.ggml.{key} is a {type(value).__name__}, where a {kind.__name__} belongs")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        if not values:
            self.fail(f"has no tokenizer.ggml.{key}")
        try:
            return [value.decode() for value in values]
        except (AttributeError, UnicodeDecodeError):
            self.fail(f"tokenizer.ggml.{key} holds something that is no UTF-8 string")

    def name(self, key: str) -> str:
        return self.get(key, str, "")

    def tokenizer(self, pattern: Pattern | None) -> Tokenizer:
        model = self.name("model")
        readers: dict[str, Callable[[], Tokenizer]] = {
            "gpt2": lambda: self.byte_level(pattern),
            "llama": self.sentencepiece,
            "gemma4": self.sentencepiece,
        }
        if model not in readers:
            self.fail(
                f"tokenizer.ggml.model {model!r} is not supported; fastlm reads {', '.join(readers)}"
                if model
                else "holds no vocabulary: there is no tokenizer.ggml.model"
            )
        self.tokens = self.strings("tokens")
        if len(self.tokens) > MAX_ID:
            self.fail(f"has {len(self.tokens)} tokens; fastlm reads {MAX_ID}")
        self.types = self.get("token_type", list, [_NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens) or not set(self.types) <= set(range(1, 7)):
            self.fail("tokenizer.ggml.token_type does not give each token a type from 1 to 6")
        try:
            return readers[model]()
        except TokenizerError as error:
            if str(error).startswith(str(self.path)):
                raise
            self.fail(str(error))

    def of_types(self, *types: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind not in types:
                continue
            if token in found or not token:
                self.fail(f"token {i} is empty or there twice: {token!r:.60}")
            found[token] = i
        return found

    def byte_level(self, pattern: Pattern | None) -> Tokenizer:
        pre = self.name("pre")
        if pattern is None:
            pattern = PATTERN_OF.get(pre)
        if pattern is None:
            said = f"tokenizer.ggml.pre {pre!r} is not supported" if pre else "the file does not say how text is split"
            self.fail(f"{said}; pass pattern=, such as 'gpt2', if you know it")
        ranks: dict[bytes, int] = {}
        unreachable: list[tuple[str, int]] = []
        for token, i in self.of_types(_NORMAL).items():
            try:
                data = from_chars(token)
            except ValueError:  # a character that stands for no byte, so no text makes it
                unreachable.append((token, i))
                continue
            if len(data) > MAX_TOKEN_BYTES:
                self.fail(f"token {i} is longer than {MAX_TOKEN_BYTES} bytes")
            ranks[data] = i
        merges = []
        for number, entry in enumerate(self.strings("merges")):
            left, _, right = entry.partition(" ")
            try:
                pair = from_chars(left), from_chars(right)
            except ValueError:
                self.fail(f"merge {number} is {entry!r:.60}, not a pair of tokens")
            lacking = next((part for part in (*pair, pair[0] + pair[1]) if part not in ranks), None)
            if lacking is not None:
                self.fail(f"merge {number} needs the token {lacking!r:.60}, which is not there")
            merges.append(pair)
        if len(set(merges)) != len(merges):
            self.fail("a merge is there twice")
        ignore_merges = pre in _IGNORE_MERGES
        implied = merges_unless_implied(ranks, merges, ignore_merges)
        if implied is not None and ignore_merges:
            self.fail(f"tokenizer.ggml.pre {pre!r} with merges in another order than the ids is not supported")
        return Tokenizer(
            ranks,
            pattern=pattern,
            special_tokens=self.special_tokens(),
            merges=implied,
            name=self.path.stem,
            settings=self.settings(Normalizer({"type": "NFC"}) if pre in _NFC else None, tuple(unreachable)),
        )

    def sentencepiece(self) -> Tokenizer:
        if _UNUSED in self.types:
            self.fail("tokens of the type unused are not supported")
        if self.get("remove_extra_whitespaces", bool, False) or self.get("precompiled_charsmap", list, []):
            self.fail("a SentencePiece vocabulary that normalizes text is not supported")
        pieces = self.of_types(_NORMAL, _UNKNOWN, _BYTE)
        control = self.of_types(_CONTROL, _USER_DEFINED)
        pieces |= {token.replace(" ", META): i for token, i in control.items() if token not in pieces}
        merges = scores = None
        if "tokenizer.ggml.merges" in self.file.metadata:
            merges = [_halves(entry) for entry in self.strings("merges")]
            lacking = next((pair for pair in merges if not {*pair, "".join(pair)} <= pieces.keys()), None)
            if lacking is not None:
                self.fail(f"the merge of {lacking!r:.60} takes in a token that is not there")
            if len(set(merges)) != len(merges):
                self.fail("a merge is there twice")
        else:
            values = self.get("scores", list)
            if values is None or len(values) != len(self.tokens) or not all(type(v) is float for v in values):
                self.fail("tokenizer.ggml.scores does not give each token a score")
            in_use = self.of_types(_NORMAL) | {t.replace(" ", META): i for t, i in self.of_types(_USER_DEFINED).items()}
            scores = {token: values[i] for token, i in in_use.items()}
        unknown = self.get("unknown_token_id", int)
        unknown_pieces = self.of_types(_UNKNOWN)
        if unknown is not None and unknown < len(self.tokens):
            unknown_piece: str | None = self.tokens[unknown]
        else:
            unknown_piece = next(iter(unknown_pieces), None)
        prefix = self.get("add_space_prefix", bool, self.name("model") == "llama")
        return SentencePieceTokenizer(
            pieces,
            merges=merges,
            scores=scores,
            unknown=unknown_piece,
            fuse_unknown=True,
            spaces=SpaceRules(prefix="always" if prefix else "never", strip=prefix),
            special_tokens=self.special_tokens(),
            name=self.path.stem,
            settings=self.settings(None),
        )

    def special_tokens(self) -> dict[str, int]:
        return self.of_types(_CONTROL) | {t: i for t, i in self.of_types(_UNKNOWN).items() if t.startswith("<")}

    def settings(self, normalizer: Normalizer | None, unreachable: tuple[tuple[str, int], ...] = ()) -> Settings:
        added = self.of_types(_USER_DEFINED)

        def ends(role: str) -> tuple[int, ...]:
            i = self.get(f"{role}_token_id", int)
            return (i,) if i is not None and self.get(f"add_{role}_token", bool, default_bos(role)) else ()

        def default_bos(role: str) -> bool:
            """llama.cpp adds a bos to a text of these models when the file does not say."""
            return role == "bos" and (self.name("model") == "llama" or self.name("pre") in ("llama-bpe", "llama3"))

        def token(role: str) -> str | None:
            i = self.get(f"{role}_token_id", int)
            return self.tokens[i] if i is not None and i < len(self.tokens) else None

        for role in ("bos", "eos"):
            if any(i >= len(self.tokens) for i in ends(role)):
                self.fail(f"tokenizer.ggml.{role}_token_id is outside the vocabulary")
        template = self.file.metadata.get("tokenizer.chat_template")
        return Settings(
            added_tokens=tuple(AddedToken(content, i, special=False) for content, i in added.items()),
            normalizer=normalizer,
            unreachable=unreachable,
            prefix_ids=ends("bos"),
            suffix_ids=ends("eos"),
            bos_token=token("bos"),
            eos_token=token("eos"),
            pad_token=token("padding"),
            unk_token=token("unknown"),
            chat_template=template if isinstance(template, str) else None,
        )


def _halves(entry: str) -> tuple[str, str]:
    left, _, right = entry.partition(" ")
    return left, right
