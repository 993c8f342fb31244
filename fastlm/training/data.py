"""Prepared data: token ids in memory-mapped shards, described by a manifest, and the order in which they are read.

A prepared directory holds manifest.json, tokenizer.json and, for each split, files `<split>-00000.bin`, … of raw
little-endian uint16 ids (uint32 for vocabularies above 65,536). A split is a stream: an end-of-text id, then the ids of
the first document; an end-of-text id, then those of the second; and so on. Nothing but the pages that are read is in
memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastlm.errors import ConfigError, DataError
from fastlm.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKED_BYTES = 1 << 30  # shards of up to so much are hashed when they are opened, in about a second
MIX_ROWS = 1000  # rows over which a mixture holds its weights exactly


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
    splits: dict[str, dict[str, Any]]  # name -> bytes, tokens, documents, shards
    duplicates: int = 0  # documents that were left out because they had occurred before

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @property
    def fingerprint(self) -> str:
        """Changes with any token, with the order of files and with the tokenizer."""
        content = [self.tokenizer_fingerprint, [[s["sha256"] for s in v["shards"]] for v in self.splits.values()]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class TokenSplit:
    """A stream of token ids over several memory-mapped files."""

    def __init__(self, arrays: list[np.ndarray], num_bytes: int, vocab_size: int | None = None) -> None:
        self._arrays = arrays
        self._vocab_size = vocab_size
        self._starts = np.cumsum([0, *(len(a) for a in arrays)])
        self.num_bytes = num_bytes

    @classmethod
    def joined(cls, splits: Sequence[TokenSplit]) -> TokenSplit:
        """One after the other, as one."""
        arrays = [array for split in splits for array in split._arrays]
        return cls(arrays, sum(split.num_bytes for split in splits), splits[0]._vocab_size)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` as int64. Raises IndexError outside the stream, DataError for an id that no token
        has."""
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
        if self._vocab_size is not None and count and int(out.max()) >= self._vocab_size:
            raise DataError(
                f"the data holds the id {int(out.max())}, beyond the vocabulary of {self._vocab_size}; prepare it again"
            )
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
        shards = [shard for split in self.manifest.splits.values() for shard in split["shards"]]
        size = sum(shard["tokens"] for shard in shards) * np.dtype(self.manifest.dtype).itemsize
        self._hashed = size <= CHECKED_BYTES
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
            if self._hashed and sha256_file(path) != shard["sha256"]:
                raise DataError(f"{path} is not what {MANIFEST} says: its content has changed; prepare the data again")
            arrays.append(np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype))
        return TokenSplit(arrays, split["bytes"], self.tokenizer.vocab_size)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def sampler(self, context_length: int, batch_size: int, seed: int) -> Sampler:
        """Which windows each training step reads. Raises DataError when the data is shorter than one."""
        return WindowSampler(self.train, context_length, batch_size, seed)


class MixedDataset:
    """Several prepared directories of one tokenizer, read in the proportion of `weights`.

    Validation is all of theirs, one after the other.

    Raises:
        DataError: the datasets have different tokenizers.
        ConfigError: there are not as many weights as datasets, or one is not positive.
    """

    def __init__(self, datasets: Sequence[TokenDataset], weights: Sequence[float]) -> None:
        if len(weights) != len(datasets) or not all(0 < weight < float("inf") for weight in weights):
            raise ConfigError(f"a mixture needs a positive weight for each of {len(datasets)} datasets, not {weights}")
        self.datasets = list(datasets)
        self.weights = [float(weight) for weight in weights]
        self.tokenizer = datasets[0].tokenizer
        self.eos_token_id = datasets[0].eos_token_id
        for other in datasets[1:]:
            if other.manifest.tokenizer_fingerprint != datasets[0].manifest.tokenizer_fingerprint:
                raise DataError(
                    f"{other.directory} was made with another tokenizer than {datasets[0].directory}; "
                    "prepare both with the same --tokenizer"
                )
        self.train = TokenSplit.joined([d.train for d in datasets])
        self.valid = TokenSplit.joined([d.valid for d in datasets])

    @property
    def fingerprint(self) -> str:
        content = [[d.fingerprint, w] for d, w in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def sampler(self, context_length: int, batch_size: int, seed: int) -> Sampler:
        """As `TokenDataset.sampler`."""
        rows = [WindowSampler(d.train, context_length, 1, seed + i) for i, d in enumerate(self.datasets)]
        return MixtureSampler(rows, self.weights, batch_size, seed)


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


class Sampler(Protocol):
    """Which rows each training step reads."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, counted from 0: two int64 tensors `(batch_size, context_length)`."""


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


class MixtureSampler:
    """Rows of several samplers in fixed proportions: of any 1,000 rows in a row, each gives its share, to one row.

    The answer depends on the seed and the step alone.
    """

    def __init__(self, rows: Sequence[WindowSampler], weights: Sequence[float], batch_size: int, seed: int) -> None:
        self.rows = list(rows)
        self.batch_size = batch_size
        self.seed = seed
        exact = np.array(weights) / sum(weights) * MIX_ROWS
        self.counts = np.floor(exact).astype(np.int64)
        short = MIX_ROWS - int(self.counts.sum())
        self.counts[np.argsort(self.counts - exact, kind="stable")[:short]] += 1  # to those that lost most

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """As `WindowSampler.batch`."""
        pairs = [self._row(step * self.batch_size + i) for i in range(self.batch_size)]
        return torch.cat([inputs for inputs, _ in pairs]), torch.cat([targets for _, targets in pairs])

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        block, place = divmod(index, MIX_ROWS)
        order = np.random.default_rng([self.seed, block]).permutation(np.repeat(range(len(self.rows)), self.counts))
        which = int(order[place])
        before = block * int(self.counts[which]) + int((order[:place] == which).sum())
        return self.rows[which].batch(before)


def document_offsets(inputs: Tensor, eos_token_id: int) -> Tensor:
    """Where the documents in rows `(batch, seq)` of a stream begin and end, over all batch · seq tokens: int32 offsets.

    A document begins at its end-of-text id, and each row begins with what is left of one.
    """
    begins = inputs == eos_token_id
    begins[:, 0] = True
    end = torch.tensor([inputs.numel()], device=inputs.device)
    return torch.cat([begins.flatten().nonzero()[:, 0], end]).int()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
