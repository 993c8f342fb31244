"""The content of a `tokenizer.json` on its way to a Tokenizer. Every method checks what it takes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from fastlm._core import native
from fastlm.errors import TokenizerError
from fastlm.tokenizer.added_tokens import AddedToken, Settings
from fastlm.tokenizer.byte_level import from_chars
from fastlm.tokenizer.huggingface_steps import pattern_of, spaces_of, type_of
from fastlm.tokenizer.normalizers import Normalizer
from fastlm.tokenizer.sentencepiece import SentencePieceTokenizer
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.tokenizer.unicode_text import is_unicode

MAX_ID = 1 << 24
NEEDED_BYTES = [*range(0xC0), *range(0xC2, 0xF1)]  # no text holds the others, or only in private characters
MAX_TOKEN_BYTES = 8192  # recovering merges takes quadratic time in this


class Reader:
    """One file's `document`; `config` is what the tokenizer_config.json beside it says, {} without one."""

    def __init__(self, path: Path, document: dict[str, Any], config: dict[str, Any]) -> None:
        self.path = path
        self.document = document
        self.config = config
        self.bytes_of: dict[str, bytes] = {}

    def tokenizer(self) -> Tokenizer:
        model = self.model()
        for key in ("truncation", "padding"):
            if (value := self.document.get(key)) is not None:
                self.refuse(f"{key} {type_of(value)}")
        added_tokens = self.added_tokens()
        try:
            if not self.is_byte_level() and (model.get("byte_fallback") or spaces_of(self.document, added_tokens)):
                return self.sentencepiece(model, added_tokens)
            return self.byte_level(model, added_tokens)
        except TokenizerError as error:
            if str(error).startswith(str(self.path)):
                raise
            self.fail(str(error))

    def fail(self, message: str) -> NoReturn:
        raise TokenizerError(f"{self.path}: {message}")

    def refuse(self, what: str) -> NoReturn:
        self.fail(f"{what} is not supported; fastlm reads byte-level and SentencePiece BPE")

    def is_byte_level(self) -> bool:
        value: Any = self.document.get("pre_tokenizer")
        steps = value.get("pretokenizers") if type_of(value) == "Sequence" else [value]
        return isinstance(steps, list) and any(type_of(step) == "ByteLevel" for step in steps)

    def byte_level(self, model: dict[str, Any], added_tokens: list[AddedToken]) -> Tokenizer:
        decoder = self.document.get("decoder")
        if decoder is not None and type_of(decoder) != "ByteLevel":
            self.refuse(f"decoder {type_of(decoder)}")
        pattern = pattern_of(self.document.get("pre_tokenizer"))
        normalizer = self.document.get("normalizer")
        used = {part for entry in self.list_of_merges(model) for part in _parts(entry)} if added_tokens else set()
        ranks = self.ranks(model, added_tokens, used)
        merges = self.merges(model, ranks)
        plain = {t.content: t.id for t in added_tokens if t == AddedToken(t.content, t.id)}
        return Tokenizer(
            ranks,
            pattern=pattern,
            special_tokens=plain,
            merges=self.merges_unless_implied(ranks, merges, model.get("ignore_merges", False)),
            name=self.path.stem,
            settings=self.settings(added_tokens, None if normalizer is None else Normalizer(normalizer)),
        )

    def sentencepiece(self, model: dict[str, Any], added_tokens: list[AddedToken]) -> Tokenizer:
        if model.get("ignore_merges"):
            self.refuse("ignore_merges of a SentencePiece model")
        found = spaces_of(self.document, added_tokens)
        if found is None:
            self.refuse(f"byte_fallback with the normalizer {type_of(self.document.get('normalizer'))}")
        spaces, normalizer = found
        vocab = self.vocab(model)
        for piece, i in vocab.items():
            self.check_id(i, piece)
            if not piece or not is_unicode(piece):
                self.fail(f"the piece {piece!r:.60} is empty or holds half a character")
        self.check_ids({t.content: t.id for t in added_tokens} | vocab)
        for token in added_tokens:
            if vocab.get(token.content, token.id) != token.id:
                self.conflict(token, vocab)
        merges = [tuple(_parts(entry)) for entry in self.list_of_merges(model)]
        for number, pair in enumerate(merges):
            lacking = next((text for text in (*pair, "".join(pair)) if text not in vocab), None)
            if len(pair) != 2:
                self.fail(f"merge {number} is {pair!r:.60}, not a pair of tokens")
            if lacking is not None:
                self.fail(f"merge {number} needs the token {lacking!r:.60}, which the vocab lacks")
        if len(set(merges)) != len(merges):
            self.fail("a merge is there twice")
        unknown = model.get("unk_token")
        if unknown is not None and unknown not in vocab:
            self.fail(f"unk_token {unknown!r:.60} is not in the vocab")
        return SentencePieceTokenizer(
            vocab,
            merges=[(left, right) for left, right in merges],
            unknown=unknown,
            fuse_unknown=bool(model.get("fuse_unk")),
            spaces=spaces,
            special_tokens={t.content: t.id for t in added_tokens if t == AddedToken(t.content, t.id)},
            name=self.path.stem,
            settings=self.settings(added_tokens, normalizer),
        )

    def settings(self, added_tokens: list[AddedToken], normalizer: Normalizer | None) -> Settings:
        prefix, suffix = self.template(self.document.get("post_processor"))
        contents = {token.id: token.content for token in added_tokens}

        def role(key: str) -> str | None:
            value = self.config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            return value if isinstance(value, str) and value in contents.values() else None

        chat_template = self.config.get("chat_template")
        return Settings(
            added_tokens=tuple(t for t in added_tokens if t != AddedToken(t.content, t.id)),
            normalizer=normalizer or None,
            prefix_ids=prefix,
            suffix_ids=suffix,
            bos_token=role("bos_token") or (contents.get(prefix[0]) if prefix else None),
            eos_token=role("eos_token"),
            pad_token=role("pad_token"),
            unk_token=role("unk_token"),
            chat_template=chat_template if isinstance(chat_template, str) else None,
        )

    def template(self, value: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the post-processor puts before and after those of a text."""
        kind = type_of(value)
        if value is None or kind == "ByteLevel":  # which changes offsets alone
            return (), ()
        if kind == "Sequence" and isinstance(value.get("processors"), list):
            found = [self.template(processor) for processor in value["processors"]]
            if sum(part != ((), ()) for part in found) > 1:
                self.refuse("a post_processor that adds tokens more than once")
            return next((part for part in found if part != ((), ())), ((), ()))
        if kind == "RobertaProcessing":
            ends = [value.get(key) for key in ("cls", "sep")]
            if all(isinstance(end, list) and len(end) == 2 for end in ends):
                (cls_token, cls_id), (sep_token, sep_id) = ends
                return (self.check_id(cls_id, cls_token),), (self.check_id(sep_id, sep_token),)
        if kind != "TemplateProcessing":
            self.refuse(f"post_processor {kind}")
        single, tokens = value.get("single"), value.get("special_tokens")
        if not isinstance(single, list) or not isinstance(tokens, dict):
            self.fail("post_processor TemplateProcessing has no single template or no special_tokens")
        sides: list[list[int]] = [[]]
        for part in single:
            part_kind, inner = next(iter(part.items())) if isinstance(part, dict) and len(part) == 1 else (None, None)
            name = inner.get("id") if isinstance(inner, dict) else None
            if part_kind == "Sequence" and name == "A":
                sides.append([])
                continue
            token = tokens.get(name) if part_kind == "SpecialToken" and isinstance(name, str) else None
            ids = token.get("ids") if isinstance(token, dict) else None
            if not isinstance(ids, list):
                self.fail(f"post_processor TemplateProcessing has the part {part!r:.60}, which is not understood")
            sides[-1] += [self.check_id(i, name) for i in ids]
        if len(sides) != 2:
            self.refuse(f"post_processor TemplateProcessing with {len(sides) - 1} texts in its single template")
        return tuple(sides[0]), tuple(sides[1])

    def model(self) -> dict[str, Any]:
        model = self.document.get("model")
        if not isinstance(model, dict):
            self.fail("has no model")
        # Files of before 2021 do not name the type.
        if model.get("type", "BPE") != "BPE":
            self.refuse(f"model {model.get('type')!r:.40}")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                self.refuse(f"{key} {model[key]!r:.40} of the BPE model")
        for key in ("ignore_merges", "byte_fallback", "fuse_unk"):
            if not isinstance(model.get(key, False), bool):
                self.fail(f"{key} is neither true nor false")
        if not isinstance(model.get("unk_token"), str | None):
            self.fail("unk_token is no string")
        return model

    def vocab(self, model: dict[str, Any]) -> dict[str, Any]:
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or not vocab:
            self.fail("the model has no vocab")
        return vocab

    def check_id(self, value: Any, token: Any) -> int:
        if type(value) is not int or not 0 <= value < MAX_ID:
            self.fail(f"token {token!r:.60} has id {value!r:.40}, which is not in 0 … {MAX_ID - 1}")
        return value

    def check_ids(self, ids: dict[Any, int]) -> None:
        if len(set(ids.values())) != len(ids):
            self.fail("two tokens have the same id")

    def conflict(self, token: AddedToken, vocab: dict[str, int]) -> NoReturn:
        self.fail(f"{token.content!r:.60} has id {vocab[token.content]} in the vocab and {token.id} as an added token")

    def added_tokens(self) -> list[AddedToken]:
        entries = self.document.get("added_tokens") or []
        if not isinstance(entries, list):
            self.fail("added_tokens is not a list")
        tokens: dict[str, AddedToken] = {}
        for entry in entries:
            content = entry.get("content") if isinstance(entry, dict) else None
            if not isinstance(content, str) or not content or not is_unicode(content):
                self.fail(f"added token {entry!r:.60} has no valid content")
            # `tokenizers` takes each of these as false when it is missing.
            names = ("special", "single_word", "lstrip", "rstrip", "normalized")
            options = {key: entry.get(key, False) for key in names}
            if not all(isinstance(option, bool) for option in options.values()):
                self.fail(f"an option of the added token {content!r:.60} is neither true nor false")
            if content in tokens:
                self.fail(f"added token {content!r:.60} is there twice")
            tokens[content] = AddedToken(content, self.check_id(entry.get("id"), content), **options)
        return list(tokens.values())

    def ranks(self, model: dict[str, Any], added_tokens: list[AddedToken], used: set[str]) -> dict[bytes, int]:
        added = {token.content: token for token in added_tokens}
        ranks: dict[bytes, int] = {}
        ids: dict[Any, int] = {token.content: token.id for token in added_tokens}
        for token, i in self.vocab(model).items():
            self.check_id(i, token)
            if token in added:
                if added[token].id != i:
                    self.conflict(added[token], self.vocab(model))
                if added[token].special or token not in used:
                    continue
            try:
                self.bytes_of[token] = data = from_chars(token)
            except ValueError:
                self.fail(f"token {token!r:.60} holds a character that stands for no byte; is this byte-level BPE?")
            ranks[data] = i
            ids[token] = i
        if b"" in ranks or max(map(len, ranks), default=0) > MAX_TOKEN_BYTES:
            self.fail(f"a token is empty or longer than {MAX_TOKEN_BYTES} bytes")
        self.check_ids(ids)
        missing = [byte for byte in NEEDED_BYTES if bytes([byte]) not in ranks]
        if missing:
            self.fail(
                f"{len(missing)} of the bytes of text have no token, the first is 0x{missing[0]:02x}; "
                "train with initial_alphabet=ByteLevel.alphabet()"
            )
        return ranks

    def list_of_merges(self, model: dict[str, Any]) -> list[Any]:
        entries = model.get("merges")
        if not isinstance(entries, list):
            self.fail("the model has no merges")
        for number, entry in enumerate(entries):
            if len(_parts(entry)) != 2:
                self.fail(f"merge {number} is {entry!r:.60}, not a pair of tokens")
        return entries

    def merges(self, model: dict[str, Any], ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
        merges = []
        for number, entry in enumerate(self.list_of_merges(model)):
            parts = _parts(entry)
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
        implied = merges_unless_implied(ranks, merges, ignore_merges)
        if implied is not None and ignore_merges:
            self.refuse("ignore_merges with merges in another order than the ids")
        return implied


def merges_unless_implied(
    ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], ignore_merges: bool
) -> list[tuple[bytes, bytes]] | None:
    """None when merging by the rank of the result, as tiktoken does, gives the same ids; else `merges`.

    It does when merges come in order of their result's rank and hold, for each token, the pair that merging the
    lower ranks leaves of it: at the moment that a token's rank is the lowest, no other pair spells it (Llama 3's
    file lists all ways to split a token). Whole tokens are looked up first by tiktoken; without `ignore_merges`
    that is the same only if merging makes every token.
    """
    results = [ranks[left + right] for left, right in merges]
    by_rank = sorted(ranks, key=ranks.__getitem__)
    canonical = canonical_merges(by_rank)
    in_order = all(a <= b for a, b in pairwise(results))
    complete = set(canonical.values()) <= set(merges)
    if in_order and complete and (ignore_merges or all(len(t) == 1 or t in canonical for t in by_rank)):
        return None
    return merges


def canonical_merges(tokens_by_rank: list[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
    """For each token that merging makes: the two tokens it is last made of."""
    pairs = native().recover_merges(tokens_by_rank)
    return {
        token: (tokens_by_rank[pair[0]], tokens_by_rank[pair[1]])
        for token, pair in zip(tokens_by_rank, pairs, strict=True)
        if pair is not None
    }


def _parts(entry: Any) -> list[str]:
    """The two tokens of a merge, [] for what is none. Files of before 2024 write them as one string."""
    parts = entry.split(" ") if isinstance(entry, str) else entry
    return parts if isinstance(parts, list) and list(map(type, parts)) == [str, str] else []
