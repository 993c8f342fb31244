"""Vocabularies that merge characters, as SentencePiece trains them: Llama 2, Mistral 7B, Gemma, Phi 3.

A space is written "▁" and belongs to the word after it, and a character without a piece becomes the tokens of its bytes
(`<0xEA>`) or the unknown token. Files of several kinds hold such a vocabulary; each reader says which merges there are
and whether a text gets a space in front. The merging is csrc/tokenizer/sentencepiece.cpp.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fastlm._core import native
from fastlm.errors import TokenizerError
from fastlm.tokenizer.added_tokens import Section, Settings
from fastlm.tokenizer.merge_order import in_order
from fastlm.tokenizer.piece_table import PieceTable, ScoreTable
from fastlm.tokenizer.special_policy import MAX_ID
from fastlm.tokenizer.streaming import DecodeStream
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.tokenizer.unicode_text import is_unicode, utf8_runs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

META = "▁"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

Prefix: TypeAlias = Literal["never", "first", "always"]


@dataclass(frozen=True)
class SpaceRules:
    """What a vocabulary does with spaces."""

    prefix: Prefix = "never"
    """Where a space is put in front: nowhere, at the start of the text, or of every text between added tokens."""
    unless_space: bool = False
    """Not where there is one already."""
    split: bool = False
    """No merge crosses the place before a space."""
    strip: bool = False
    """Decoding takes one space off the front."""


class SentencePieceTokenizer(Tokenizer):
    """A vocabulary of pieces, strings in which "▁" stands for a space.

    Args:
        pieces: id of each piece. Those spelled `<0x00>` … `<0xFF>` stand for bytes.
        merges: pairs of pieces that merge, first first; or
        scores: the score of each piece: any two pieces whose concatenation is a piece merge, highest score first.
        unknown: the piece that stands for a character which has no piece and no bytes.
        fuse_unknown: neighbouring unknown characters make one token.
        special_tokens, name, settings: as for `Tokenizer`.

    Raises:
        TokenizerError: an empty piece, a merge that makes no piece, or neither tokens of all bytes nor an unknown one.
    """

    def __init__(
        self,
        pieces: dict[str, int],
        *,
        merges: list[tuple[str, str]] | None = None,
        scores: dict[str, float] | None = None,
        unknown: str | None = None,
        fuse_unknown: bool = False,
        spaces: SpaceRules | None = None,
        special_tokens: dict[str, int] | None = None,
        name: str = "",
        settings: Settings | None = None,
    ) -> None:
        surrogate = next((piece for piece in pieces if not is_unicode(piece)), None)
        if surrogate is not None:
            raise TokenizerError(f"{name}: the piece {surrogate!r:.60} holds surrogates, which no text does")
        wrong = next((item for item in pieces.items() if not 0 <= item[1] <= MAX_ID), None)
        if wrong is not None:
            raise TokenizerError(f"{name}: the piece {wrong[0]!r:.60} has the id {wrong[1]}, not in 0 … {MAX_ID}")
        self.piece_merges = merges
        self.unknown = unknown
        self.fuse_unknown = fuse_unknown
        self.spaces = spaces or SpaceRules()
        self.pattern = "sentencepiece"
        self.mergeable_ranks = {}
        self.merges = None
        self._set_up(name, pieces.values(), special_tokens or {}, settings or Settings())
        self._is_direct = False
        self._unencodable = None
        self._byte_ids = [pieces.get(token) for token in BYTE_TOKENS]
        self._native = self._encoder(pieces, scores)
        try:
            self.pieces = PieceTable(pieces)
        except ValueError as error:
            raise TokenizerError(f"{name}: this vocabulary cannot be used: {error}") from None
        self.piece_scores = None if scores is None else ScoreTable(self.pieces, pieces, scores)
        native().give_back_memory()
        self._bytes_of = _BytesOf(self.pieces)
        self._bytes_of |= {t.id: self.settings.found_as(t).replace(META, " ").encode() for t in self.added_tokens}
        self._bytes_of |= {i: bytes([byte]) for byte, i in enumerate(self._byte_ids) if i is not None}
        self._finds_spaces = any(
            " " in token.content and self.pieces.get(token.content.replace(" ", META)) == token.id
            for token in self.added_tokens
        ) and not any(META in token.content for token in self.added_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            dict(self.pieces),
            {
                "merges": self.piece_merges,
                "scores": None if self.piece_scores is None else dict(self.piece_scores),
                "unknown": self.unknown,
                "fuse_unknown": self.fuse_unknown,
                "spaces": self.spaces,
                "special_tokens": self._plain_special_tokens(),
                "name": self.name,
                "settings": self.settings,
            },
        )

    def reachable_merges(self) -> list[tuple[str, str]]:
        """The merges that can happen, first first: for each piece the one that makes it last.

        Raises:
            TokenizerError: pieces have the same score, and no order of merges says the same.
        """
        of: Any = self.pieces.piece
        merges = [(of(left), of(right), rank) for left, right, rank in self._native.merges()]
        return in_order(merges)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`: what was encoded, save that "▁" has become a space and unknown characters `<unk>`.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        out = []
        for position, value in enumerate(ids):
            i = operator.index(value)
            try:
                out.append(self._bytes_of[i])
            except KeyError:
                raise TokenizerError(f"id {i} at position {position} is not in the vocabulary") from None
        data = b"".join(out)
        return data[1:] if self.spaces.strip and data.startswith(b" ") else data

    def decode_stream(self) -> DecodeStream:
        """Decodes ids as they come, never giving half a character."""
        return DecodeStream(self.token_bytes, strip_space=self.spaces.strip)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        try:
            return self._bytes_of[operator.index(id)]
        except KeyError:
            raise TokenizerError(f"id {id} at position 0 is not in the vocabulary") from None

    def _encoder(self, ids: dict[str, int], all_scores: dict[str, float] | None) -> Any:
        pieces: Iterable[tuple[str, int]] = ids.items()
        merges = scores = None
        bytes_of_pieces = {i for i in self._byte_ids if i is not None}
        try:
            if self.piece_merges is not None:
                merges = [(ids[left], ids[right]) for left, right in self.piece_merges]
                wrong = next((pair for pair in merges if bytes_of_pieces.intersection(pair)), None)
                if wrong is not None:
                    raise TokenizerError(f"{self.name}: merges of a byte's token, {wrong}, are not supported")
            elif all_scores is not None:
                pieces = [(piece, i) for piece, i in pieces if i not in bytes_of_pieces and piece in all_scores]
                scores = [all_scores[piece] for piece, _ in pieces]
        except KeyError as error:
            raise TokenizerError(f"{self.name}: merges use {error}, which is no piece") from None
        unknown = None if self.unknown is None else ids.get(self.unknown)
        try:
            return native().SentencePieceEncoder(
                ((piece.encode(), i) for piece, i in pieces),
                merges,
                scores,
                self._byte_ids,
                unknown,
                self.fuse_unknown,
                True,
                self.spaces.split,
            )
        except (ValueError, TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"{self.name}: this vocabulary cannot be used: {error}") from None

    def _parts(self, text: str, finder: Any, refused: Any) -> list[str | int]:
        return super()._parts(self._with_plain_spaces(text), finder, refused)

    def encode_with_offsets(self, text: str, **policy: Any) -> tuple[list[int], list[int]]:
        """Ids, and for each the index in `text` of the character that it begins at. See `Tokenizer`."""
        return super().encode_with_offsets(self._with_plain_spaces(text), **policy)

    def _with_plain_spaces(self, text: str) -> str:
        """SentencePiece finds pieces of spaces in a text whose spaces are "▁" by then, be they written so or not."""
        return text.replace(META, " ") if self._finds_spaces else text

    def _encode_parts(self, parts: list[str | int]) -> list[int]:
        return self._native.encode(self._with_prefix(parts))

    def _encode_parts_to_numpy(self, parts: list[str | int]) -> npt.NDArray[np.uint32]:
        return self._native.encode_to_numpy(self._with_prefix(parts))

    def _encode_parts_batch(self, batch: list[list[str | int]], num_threads: int) -> list[list[int]]:
        return self._native.encode_batch([self._with_prefix(parts) for parts in batch], num_threads)

    def _with_prefix(self, parts: list[str | int]) -> list[str | int]:
        if self.spaces.prefix == "always":
            return [f" {part}" if self._gets_prefix(part) else part for part in parts]
        if self.spaces.prefix == "first" and parts and self._gets_prefix(parts[0]):
            return [f" {parts[0]}", *parts[1:]]
        return parts

    def _gets_prefix(self, part: str | int) -> bool:
        if not isinstance(part, str) or not part:
            return False
        return not (self.spaces.unless_space and part[0] in (" ", META))

    def _encode_with_offsets(self, section: Section) -> tuple[list[int], list[int]]:
        is_first = section.begin == 0 or self.spaces.prefix == "always"
        parts = self._with_prefix([section.text]) if is_first else [section.text]
        text = str(parts[0])
        ids = self._native.encode(parts)
        added = len(text) - len(section.text)
        byte_ids = {i for i in self._byte_ids if i is not None}
        offsets = []
        at = used = 0  # characters done, and bytes done of the next
        for i in ids:
            offsets.append(max(0, at - added))
            if i in byte_ids:
                used += 1
                if used == len((META if text[at] == " " else text[at]).encode()):
                    at, used = at + 1, 0
            elif self.unknown is not None and i == self.pieces[self.unknown]:
                at += 1
                while self.fuse_unknown and at < len(text) and self._is_unknown(text[at]):
                    at += 1
            else:
                at += len(self.pieces.piece(i) or "")
        return ids, offsets

    def _is_unknown(self, char: str) -> bool:
        char = META if char == " " else char
        return char not in self.pieces and any(self._byte_ids[byte] is None for byte in char.encode())

    def _encode_run(self, run: str | bytes) -> list[int]:
        if isinstance(run, str):
            return self.encode_ordinary(run)
        found = [self._byte_ids[byte] for byte in run]
        if None in found:
            raise TokenizerError(f"{self.name} has no tokens for bytes that are not UTF-8, such as {run!r}")
        return [i for i in found if i is not None]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that may not be UTF-8: text between invalid bytes on its own, those as the tokens of bytes."""
        try:
            return self.encode_ordinary(data.decode())
        except UnicodeDecodeError:
            return [i for run in utf8_runs(data) for i in self._encode_run(run)]


class _BytesOf(dict[int, bytes]):
    """The bytes of each id, made when they are first asked for: a quarter of a million would take 20 MB."""

    def __init__(self, pieces: PieceTable) -> None:
        super().__init__()
        self.pieces = pieces

    def __missing__(self, i: int) -> bytes:
        piece = self.pieces.piece(i)
        if piece is None:
            raise KeyError(i)
        found = self[i] = piece.replace(META, " ").encode()
        return found


def _rebuild(pieces: dict[str, int], arguments: dict[str, Any]) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(pieces, **arguments)
