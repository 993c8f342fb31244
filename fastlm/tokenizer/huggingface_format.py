"""Hugging Face's `tokenizer.json` for byte-level BPE: written so that `tokenizers` gives equal ids, and read back.

The format has no written specification; its reader is the `tokenizers` library (huggingface.co/docs/tokenizers).
Read are files whose pre-tokenizer is one of the patterns below. What fastlm does not do, such as a normalizer, is
refused by name, because ids would differ in silence. Two things are read and not applied, since `encode` never adds or
hides tokens on its own: a post-processor that adds special tokens (Llama 3's `<|begin_of_text|>`), and whether an added
token counts as special when decoding.

Equal ids hold for every character that the regular-expression engine of `tokenizers` knows. It follows an older
Unicode: letters and digits added since, most of them rare Han characters, it takes for punctuation.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastlm._core import native
from fastlm._files import write_atomic
from fastlm.errors import TokenizerError
from fastlm.tokenizer.byte_level import from_chars, to_chars
from fastlm.tokenizer.patterns import REGEXES as PUBLISHED_REGEXES

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

MAX_FILE_BYTES = 256 << 20  # the largest published file (262,144 tokens) has 33 MB
MAX_ID = 1 << 24
MAX_TOKEN_BYTES = 8192  # recovering merges takes quadratic time in this

# How the patterns are written in files. tiktoken's cl100k goes without possessive repeats, since Oniguruma, the engine
# of `tokenizers`, reads {1,3}+ as one or more times {1,3}, and with \z, since its $ ends a line.
REGEXES = {name: PUBLISHED_REGEXES[name] for name in ("o200k", "llama3", "qwen2")} | {
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PATTERN_OF_REGEX = {regex: name for name, regex in REGEXES.items()} | {_GPT2: "gpt2"}

_BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def save_tokenizer_json(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes `path`, all or nothing. `tokenizers.Tokenizer.from_file` then gives equal ids.

    Merges of a vocabulary that came as ranks only (tiktoken) are recovered from the ranks. A token that merging never
    makes needs `ignore_merges`, which is set when there is one.

    Raises:
        TokenizerError: the pattern has no form in this format.
    """
    if tokenizer.merges is not None:
        merges, ignore_merges = tokenizer.merges, False
    else:
        by_rank = sorted(tokenizer.mergeable_ranks.items(), key=lambda item: item[1])
        canonical = _canonical_merges([token for token, _ in by_rank])
        merges = list(canonical.values())
        ignore_merges = any(len(token) > 1 and token not in canonical for token, _ in by_rank)
    vocab = {to_chars(token): i for token, i in tokenizer.mergeable_ranks.items()}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for content, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer_of(tokenizer.pattern),
        "post_processor": None,
        "decoder": _BYTE_LEVEL_DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(sorted((vocab | tokenizer.special_tokens).items(), key=lambda item: item[1])),
            "merges": [[to_chars(left), to_chars(right)] for left, right in merges],
        },
    }
    write_atomic(path, json.dumps(document, ensure_ascii=False, separators=(",", ":")))


def load_tokenizer_json(path: str | Path) -> Tokenizer:
    """Reads a byte-level BPE `tokenizer.json` of fastlm or Hugging Face.

    Raises:
        TokenizerError: the file is missing, corrupt, or asks for something that fastlm does not do (named).
    """
    path = Path(path)
    try:
        return _Reader(path, _parse(path)).tokenizer()
    except RecursionError:
        raise TokenizerError(f"{path}: nested too deeply for a tokenizer.json") from None


def _parse(path: Path) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise TokenizerError(f"{path}: {max(counts, key=counts.__getitem__)!r:.60} is there twice")
        return result

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so no tokenizer.json")
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}; give the path of a tokenizer.json") from None
    try:
        document = json.loads(data.decode(), object_pairs_hook=without_duplicates)
    except TokenizerError:
        raise
    except ValueError as error:
        raise TokenizerError(f"{path}: no valid JSON, perhaps cut short: {error}") from None
    if not isinstance(document, dict):
        raise TokenizerError(f"{path}: a JSON {type(document).__name__}, where a tokenizer.json has an object")
    return document


class _Reader:
    """One file's content on its way to a Tokenizer; every method checks what it takes."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document
        self.bytes_of: dict[str, bytes] = {}

    def tokenizer(self) -> Tokenizer:
        from fastlm.tokenizer.tokenizer import Tokenizer

        model = self.model()
        for key in ("normalizer", "truncation", "padding"):
            if (value := self.document.get(key)) is not None:
                self.refuse(f"{key} {_type_of(value)}")
        self.check_post_processor(self.document.get("post_processor"))
        self.check_decoder(self.document.get("decoder"))
        pattern = self.pattern(self.document.get("pre_tokenizer"))
        special_tokens = self.added_tokens()
        ranks = self.ranks(model, special_tokens)
        merges = self.merges(model, ranks)
        return Tokenizer(
            ranks,
            pattern=pattern,
            special_tokens=special_tokens,
            merges=self.merges_unless_implied(ranks, merges, model.get("ignore_merges", False)),
            name=self.path.stem,
        )

    def fail(self, message: str) -> NoReturn:
        raise TokenizerError(f"{self.path}: {message}")

    def refuse(self, what: str) -> NoReturn:
        self.fail(
            f"{what} is not supported; fastlm reads byte-level BPE with a GPT-2, GPT-4, Llama 3 or Qwen 2 pattern"
        )

    def check_post_processor(self, value: Any) -> None:
        if value is None or _type_of(value) in ("ByteLevel", "TemplateProcessing"):
            return
        if _type_of(value) == "Sequence" and isinstance(value.get("processors"), list):
            for processor in value["processors"]:
                self.check_post_processor(processor)
            return
        self.refuse(f"post_processor {_type_of(value)}")

    def check_decoder(self, value: Any) -> None:
        if value is not None and _type_of(value) != "ByteLevel":
            self.refuse(f"decoder {_type_of(value)}")

    def pattern(self, value: Any) -> str:
        steps = value.get("pretokenizers") if _type_of(value) == "Sequence" else [value]
        if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
            self.refuse(f"pre_tokenizer {_type_of(value)}")
        *splits, byte_level = steps
        for step in steps:
            if _type_of(step) not in ("Split", "ByteLevel"):
                self.refuse(f"pre_tokenizer {_type_of(step)}")
        if _type_of(byte_level) != "ByteLevel":
            self.refuse("a pre_tokenizer without ByteLevel at its end")
        if byte_level.get("add_prefix_space", True) is not False:
            self.refuse("ByteLevel with add_prefix_space")
        use_regex = byte_level.get("use_regex", True)
        if not splits and use_regex is True:
            return "gpt2"
        if len(splits) != 1 or use_regex is not False or _type_of(splits[0]) != "Split":
            self.refuse("a pre_tokenizer that splits more than once, or not at all,")
        split = splits[0]
        regex = split.get("pattern", {}).get("Regex") if isinstance(split.get("pattern"), dict) else None
        behavior = split.get("behavior")
        # Every character belongs to some match of these patterns, so what is removed is what lies between: nothing.
        if behavior == "Removed" and split.get("invert") is True:
            behavior = "Isolated"
        elif split.get("invert", False) is not False:
            self.refuse("Split with invert")
        if behavior != "Isolated":
            self.refuse(f"Split with behavior {behavior!r:.40}")
        if not isinstance(regex, str) or regex not in _PATTERN_OF_REGEX:
            self.refuse(f"Split with the pattern {regex!r:.60}")
        return _PATTERN_OF_REGEX[regex]

    def model(self) -> dict[str, Any]:
        model = self.document.get("model")
        if not isinstance(model, dict):
            self.fail("has no model")
        # Files of before 2021 do not name the type.
        if model.get("type", "BPE") != "BPE":
            self.refuse(f"model {model.get('type')!r:.40}")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                self.refuse(f"{key} {model[key]!r:.40} of the BPE model")
        if not isinstance(model.get("ignore_merges", False), bool):
            self.fail("ignore_merges is neither true nor false")
        return model

    def check_id(self, value: Any, token: str) -> int:
        if type(value) is not int or not 0 <= value < MAX_ID:
            self.fail(f"token {token!r:.60} has id {value!r:.40}, which is not in 0 … {MAX_ID - 1}")
        return value

    def added_tokens(self) -> dict[str, int]:
        entries = self.document.get("added_tokens") or []
        if not isinstance(entries, list):
            self.fail("added_tokens is not a list")
        tokens: dict[str, int] = {}
        for entry in entries:
            content = entry.get("content") if isinstance(entry, dict) else None
            if not isinstance(content, str) or not content or not _is_unicode(content):
                self.fail(f"added token {entry!r:.60} has no valid content")
            for option in ("single_word", "lstrip", "rstrip"):
                if entry.get(option, False) is not False:
                    self.refuse(f"{option} of the added token {content!r:.60}")
            if content in tokens:
                self.fail(f"added token {content!r:.60} is there twice")
            tokens[content] = self.check_id(entry.get("id"), content)
        return tokens

    def ranks(self, model: dict[str, Any], special_tokens: dict[str, int]) -> dict[bytes, int]:
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or not vocab:
            self.fail("the model has no vocab")
        ranks: dict[bytes, int] = {}
        for token, i in vocab.items():
            self.check_id(i, token)
            if token in special_tokens:
                if special_tokens[token] != i:
                    self.fail(f"{token!r:.60} has id {i} in the vocab and {special_tokens[token]} as an added token")
                continue
            try:
                self.bytes_of[token] = data = from_chars(token)
            except ValueError:
                self.fail(f"token {token!r:.60} holds a character that stands for no byte; is this byte-level BPE?")
            ranks[data] = i
        if b"" in ranks or max(map(len, ranks), default=0) > MAX_TOKEN_BYTES:
            self.fail(f"a token is empty or longer than {MAX_TOKEN_BYTES} bytes")
        ids = [*ranks.values(), *special_tokens.values()]
        if len(set(ids)) != len(ids):
            self.fail("two tokens have the same id")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            self.fail(
                f"{len(missing)} of the 256 bytes have no token, the first is 0x{missing[0]:02x}; "
                "train with initial_alphabet=ByteLevel.alphabet()"
            )
        return ranks

    def merges(self, model: dict[str, Any], ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
        entries = model.get("merges")
        if not isinstance(entries, list):
            self.fail("the model has no merges")
        merges = []
        for number, entry in enumerate(entries):
            parts = entry.split(" ") if isinstance(entry, str) else entry
            if not isinstance(parts, list) or list(map(type, parts)) != [str, str]:
                self.fail(f"merge {number} is {entry!r:.60}, not a pair of tokens")
            left, right = map(self.bytes_of.get, parts)
            if left is None or right is None or left + right not in ranks:
                lacking = next(text for text in (*parts, "".join(parts)) if text not in self.bytes_of)
                self.fail(f"merge {number} needs the token {lacking!r:.60}, which the vocab lacks")
            merges.append((left, right))
        if len(set(merges)) != len(merges):
            self.fail("a merge is there twice")
        return merges

    def merges_unless_implied(
        self, ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], ignore_merges: bool
    ) -> list[tuple[bytes, bytes]] | None:
        """None when merging by the rank of the result, as tiktoken does, gives the same ids.

        It does when merges come in order of their result's rank and hold, for each token, the pair that merging the
        lower ranks leaves of it: at the moment that a token's rank is the lowest, no other pair spells it (Llama 3's
        file lists all ways to split a token). Whole tokens are looked up first by tiktoken; without `ignore_merges`
        that is the same only if merging makes every token.
        """
        results = [ranks[left + right] for left, right in merges]
        by_rank = sorted(ranks, key=ranks.__getitem__)
        canonical = _canonical_merges(by_rank)
        in_order = all(a <= b for a, b in pairwise(results))
        complete = set(canonical.values()) <= set(merges)
        if in_order and complete and (ignore_merges or all(len(t) == 1 or t in canonical for t in by_rank)):
            return None
        if ignore_merges:
            self.refuse("ignore_merges with merges in another order than the ids")
        return merges


def _canonical_merges(tokens_by_rank: list[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
    """For each token that merging makes: the two tokens it is last made of."""
    pairs = native().recover_merges(tokens_by_rank)
    return {
        token: (tokens_by_rank[pair[0]], tokens_by_rank[pair[1]])
        for token, pair in zip(tokens_by_rank, pairs, strict=True)
        if pair is not None
    }


def _pre_tokenizer_of(pattern: str) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if pattern == "gpt2":
        return byte_level
    if pattern not in REGEXES:
        raise TokenizerError(
            f"the pattern {pattern!r:.60} cannot be written to tokenizer.json; it has {', '.join(['gpt2', *REGEXES])}"
        )
    split = {"type": "Split", "pattern": {"Regex": REGEXES[pattern]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}


def _type_of(value: Any) -> str:
    """The type that a part of the file names; for what names none, how it looks."""
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else f"{value!r:.40}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
