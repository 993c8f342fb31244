"""Prepared data: token ids in memory-mapped shards, described by a manifest, and the order in which they are read.

A prepared directory holds manifest.json, tokenizer.json and, for each split, files `<split>-00000.bin`, … of raw
little-endian uint16 ids (uint32 for vocabularies above 65,536). A split is a stream: an end-of-text id, then the ids of
the first document; an end-of-text id, then those of the second; and so on. Nothing but the pages that are read is in
memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlm.errors import DataError
from fastlm.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One file of a split."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds. `bytes` are of text: end-of-text ids stand for none."""

    version: int
    dtype: str  # "uint16" or "uint32"
    tokenizer_fingerprint: str
    eos_token_id: int
    sources: list[dict[str, Any]]  # file name, bytes, sha256, where validation starts
    splits: dict[str, dict[str, Any]]  # name -> bytes, tokens, shards

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @property
    def fingerprint(self) -> str:
        """Changes with any token, with the order of files and with the tokenizer."""
        content = [self.tokenizer_fingerprint, [[s["sha256"] for s in v["shards"]] for v in self.splits.values()]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class TokenSplit:
    """A stream of token ids over several memory-mapped files."""

    def __init__(self, arrays: list[np.ndarray], num_bytes: int) -> None:
        self._arrays = arrays
        self._starts = np.cumsum([0, *(len(a) for a in arrays)])
        self.num_bytes = num_bytes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` as int64. Raises IndexError outside the stream."""
        if start < 0 or start + count > len(self):
            raise IndexError(f"ids {start} to {start + count} of a split of {len(self)}")
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < count:
            offset = start + done - int(self._starts[shard])
            piece = self._arrays[shard][offset : offset + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return out


class TokenDataset:
    """A prepared directory, opened.

    Raises:
        DataError: it is not one, or a file of it is missing, truncated or corrupt.
        TokenizerError: its tokenizer.json is corrupt.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self.tokenizer = Tokenizer.from_file(self.directory / "tokenizer.json")
        if self.tokenizer.fingerprint() != self.manifest.tokenizer_fingerprint:
            raise DataError(
                f"{self.directory / 'tokenizer.json'} is not the tokenizer that made these tokens; "
                "prepare the data again"
            )
        self.train = self._open("train")
        self.valid = self._open("valid")

    @property
    def eos_token_id(self) -> int:
        return self.manifest.eos_token_id

    def _open(self, name: str) -> TokenSplit:
        split = self.manifest.splits[name]
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        arrays = []
        for shard in split["shards"]:
            path = self.directory / shard["file"]
            size = path.stat().st_size if path.is_file() else -1
            if size != shard["tokens"] * dtype.itemsize:
                state = (
                    "is missing" if size < 0 else f"is truncated: {size} bytes of {shard['tokens'] * dtype.itemsize}"
                )
                raise DataError(f"{path} {state}; prepare the data again")
            arrays.append(np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype))
        return TokenSplit(arrays, split["bytes"])


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"{directory} holds no {MANIFEST}: give text files, or a directory made by `fastlm prepare`")
    try:
        content = json.loads(path.read_bytes())
        manifest = Manifest(**content)
        for split in (manifest.splits["train"], manifest.splits["valid"]):
            split["shards"] = [asdict(Shard(**s)) for s in split["shards"]]
            if type(split["bytes"]) is not int or any(type(s["tokens"]) is not int for s in split["shards"]):
                raise ValueError("a count is not an integer")
            if any(Path(s["file"]).name != s["file"] for s in split["shards"]):
                raise ValueError("a shard lies outside the directory")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is corrupt ({error}); prepare the data again") from None
    if manifest.version != FORMAT_VERSION or manifest.dtype not in ("uint16", "uint32"):
        raise DataError(f"{path} is of another version; prepare the data again")
    return manifest


class WindowSampler:
    """Which windows of a split each training step reads. The answer depends on the seed and the step alone.

    An epoch shifts the grid of windows by a random offset and visits the windows in random order, each once, so the
    whole split is read before any of it is read again, and cut at other places each time.

    Raises:
        DataError: the split is shorter than one window.
    """

    def __init__(self, split: TokenSplit, context_length: int, batch_size: int, seed: int) -> None:
        targets = len(split) - 1
        if targets < context_length:
            raise DataError(
                f"the training data has {len(split)} tokens: too few for a context of {context_length}; "
                "give more text or a smaller --context-length"
            )
        self.split = split
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.windows = max(1, targets // context_length - 1)
        self._max_offset = min(context_length - 1, targets - self.windows * context_length)
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, counted from 0: two int64 tensors `(batch_size, context_length)`."""
        first = step * self.batch_size
        rows = [self.split.read(self._start(first + i), self.context_length + 1) for i in range(self.batch_size)]
        ids = torch.from_numpy(np.stack(rows))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = int(rng.integers(self._max_offset + 1))
            self._starts = offset + self.context_length * rng.permutation(self.windows)
            self._epoch = epoch
        return int(self._starts[place])


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
