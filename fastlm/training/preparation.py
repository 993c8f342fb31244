"""From sources, files or data sets, to a prepared directory: tokenizer, token shards of both splits, manifest.

Each source is encoded by itself, in a process of its own where several workers are asked for, into shards and a record
of them in `<out>.partial`. What was interrupted goes on with the sources that have no record yet. At the end the shards
are numbered in the order of the sources, so the result does not depend on the workers. The tokenizer is trained on the
training part alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastlm._files import write_atomic
from fastlm.errors import ConfigError, DataError, FastlmError
from fastlm.tokenizer import BpeTrainer, Tokenizer
from fastlm.training.data import FORMAT_VERSION, MANIFEST, Manifest, TokenDataset
from fastlm.training.documents import FileSource, Source, open_source
from fastlm.training.hub_datasets import is_dataset, open_dataset
from fastlm.training.preparation_workers import check_ray, for_each

SHARD_TOKENS = 1 << 27
EOS_TOKEN = "<|endoftext|>"
SPLITS = ("train", "valid")

OnProgress = Callable[[str, int, int], None]


def default_vocab_size(train_bytes: int) -> int:
    """Small texts cannot teach many tokens, and a small model spends itself on a large output layer."""
    for limit, size in ((4 << 20, 1024), (64 << 20, 8192), (1 << 30, 16384)):
        if train_bytes < limit:
            return size
    return 32768


def prepare(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    valid_fraction: float = 0.1,
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    by_line: bool = False,
    deduplicate: bool = False,
    workers: int = 1,
    ray: bool = False,
    on_progress: OnProgress | None = None,
) -> TokenDataset:
    """Writes a prepared directory, whole or not at all, and opens it.

    Args:
        files: UTF-8 text, each a document; or JSON lines, CSV, TSV and Parquet, each row a document. Also .gz and .zst.
            Or data sets of Hugging Face, by their id or the directory they were saved to; each row is a document.
        out: the directory to write; must not exist, or be empty. `.<out>.partial` beside it holds what is done; the
            same call goes on from there after an interruption.
        tokenizer: encodes the text; by default one is trained on the training part.
        vocab_size: of the trained tokenizer; by default chosen by the amount of text.
        valid_fraction: share that is kept for validation: of each text at its end, of rows by a hash of their text.
        column: of rows, the one that holds the text.
        subset, split: of a Hugging Face data set.
        by_line: each line of a text file is a document.
        deduplicate: leaves out documents whose text has occurred before, spaces around it aside.
        workers: processes that encode, each a source at a time. The result does not depend on it.
        ray: tasks of Ray encode instead, on the cluster that the environment's RAY_ADDRESS names, else on this machine.
            All machines must share the directories. The result does not depend on it.
        on_progress: called with (stage, bytes done, bytes in all); of compressed files, bytes of the file.

    Raises:
        DataError: a file is missing, empty, too short to split, damaged or not UTF-8 (with the place); `out` is taken.
        ConfigError: an option makes no sense.
    """
    out = Path(out)
    if not files:
        raise DataError("no text file was given")
    if tokenizer is not None and vocab_size is not None:
        raise ConfigError("give a tokenizer or a vocabulary size, not both")
    if not 0.0 < valid_fraction < 1.0:
        raise ConfigError(f"valid_fraction must lie between 0 and 1, not {valid_fraction}")
    if workers < 1:
        raise ConfigError(f"workers must be 1 or more, not {workers}")
    if ray:
        check_ray()
        if workers != 1:
            raise ConfigError("give workers or ray, not both: Ray runs as many tasks as its cluster has CPUs")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already; give another directory")
    sources: list[Source] = []
    for file in map(Path, files):
        if is_dataset(file):
            sources += open_dataset(file, subset=subset, split=split, column=column, valid_fraction=valid_fraction)
        else:
            sources.append(open_source(file, column=column, by_line=by_line, valid_fraction=valid_fraction))
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer has no end-of-text token; it needs a special token such as {EOS_TOKEN}")
    trainer = None if tokenizer is not None else _trainer(sources, vocab_size)

    out.parent.mkdir(parents=True, exist_ok=True)
    partial_directory = out.with_name(f".{out.name}.partial")
    with _locked(partial_directory):
        try:
            _begin(partial_directory, sources, tokenizer, vocab_size, deduplicate)
            kept = partial_directory / "tokenizer.json"
            if not kept.exists():
                if trainer is not None:
                    tokenizer = trainer.train_from_iterator(_training_texts(sources))
                assert tokenizer is not None
                tokenizer.save(kept)
            jobs = [_Job(i, source, partial_directory, SHARD_TOKENS) for i, source in enumerate(sources)]
            duplicates = _mark_duplicates(jobs, workers, ray, on_progress) if deduplicate else 0
            _encode_all(jobs, workers, ray, on_progress)
            _assemble(partial_directory, jobs, duplicates)
        except FastlmError:
            shutil.rmtree(partial_directory, ignore_errors=True)
            raise
        if out.exists():
            out.rmdir()
        os.replace(partial_directory, out)
    (out / "lock").unlink(missing_ok=True)
    return TokenDataset(out)


@dataclass(frozen=True)
class _Job:
    """The encoding of one source."""

    index: int
    source: Source
    directory: Path
    shard_tokens: int

    @property
    def record(self) -> Path:
        return self.directory / f"part-{self.index:05d}.json"

    @property
    def hashes(self) -> Path:
        return self.directory / f"part-{self.index:05d}-hashes.npy"

    @property
    def repeated(self) -> Path:
        """Numbers of the documents to leave out."""
        return self.directory / f"part-{self.index:05d}-repeated.npy"


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds a directory that is being prepared; a second process that prepares the same is refused."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process is preparing {directory}; wait for it, or give another --out") from None
        yield


def _begin(
    directory: Path, sources: list[Source], tokenizer: Tokenizer | None, vocab_size: int | None, deduplicate: bool
) -> None:
    """Keeps what an interrupted call with the same sources and options has done; else starts anew."""
    facts = [
        FORMAT_VERSION, SHARD_TOKENS, vocab_size, deduplicate, tokenizer and tokenizer.fingerprint(),
        [source.identity() for source in sources],
    ]  # fmt: skip
    plan = json.dumps(facts)
    path = directory / "plan.json"
    if path.exists() and path.read_text() == plan:
        return
    for old in directory.iterdir():
        if old.name != "lock":
            old.unlink()
    write_atomic(path, plan)


def _trainer(sources: list[Source], vocab_size: int | None) -> BpeTrainer:
    if vocab_size is None:
        vocab_size = default_vocab_size(sum(source.train_bytes for source in sources))
    return BpeTrainer(vocab_size, special_tokens=[EOS_TOKEN])


def _training_texts(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for split, pieces in source.documents():
            if split == "train":
                yield from pieces


def _encode_all(jobs: list[_Job], workers: int, ray: bool, on_progress: OnProgress | None) -> None:
    todo = [job for job in jobs if not job.record.exists()]
    tokenizer = Tokenizer.from_file(jobs[0].directory / "tokenizer.json")
    _each("encoding", todo, partial(_encode, tokenizer), workers, ray, on_progress)


def _each(
    stage: str,
    jobs: list[_Job],
    work: Callable[[_Job], object],
    workers: int,
    ray: bool,
    on_progress: OnProgress | None,
) -> None:
    total = sum(job.source.num_bytes for job in jobs)
    done = 0
    for job in for_each(jobs, work, workers=workers, ray=ray):
        done += job.source.num_bytes
        if on_progress is not None:
            on_progress(stage, done, total)


def _mark_duplicates(jobs: list[_Job], workers: int, ray: bool, on_progress: OnProgress | None) -> int:
    """Writes which documents of each source have occurred before; returns how many."""
    _each("comparing", [job for job in jobs if not job.hashes.exists()], _hash, workers, ray, on_progress)
    seen: set[bytes] = set()
    count = 0
    for job in jobs:
        repeated = []
        for number, row in enumerate(np.load(job.hashes, allow_pickle=False)):
            digest = row.tobytes()
            if digest in seen:
                repeated.append(number)
            seen.add(digest)
        np.save(job.repeated, np.array(repeated, dtype=np.int64))
        count += len(repeated)
    return count


def _hash(job: _Job) -> None:
    digests = bytearray()
    for _, pieces in job.source.documents():
        text = "".join(pieces).strip()
        digests += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    temporary = job.hashes.with_suffix(".tmp.npy")
    np.save(temporary, np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16))
    os.replace(temporary, job.hashes)


def _encode(tokenizer: Tokenizer, job: _Job) -> None:
    repeated = set(np.load(job.repeated, allow_pickle=False).tolist()) if job.repeated.exists() else set()
    writers = {split: _Writer(job, split, tokenizer) for split in SPLITS}
    for number, (split, pieces) in enumerate(job.source.documents()):
        if number not in repeated:
            writers[split].add(pieces)
    splits = {split: writer.close() for split, writer in writers.items()}
    write_atomic(job.record, json.dumps({"sha256": job.source.sha256(), "splits": splits}))


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


class _Writer:
    """Encodes the documents of one split of a source into shards."""

    def __init__(self, job: _Job, split: str, tokenizer: Tokenizer) -> None:
        self.job = job
        self.split = split
        self.tokenizer = tokenizer
        self.dtype = dtype_of(tokenizer)
        self.shards: list[dict[str, Any]] = []
        self.buffer: list[np.ndarray] = []
        self.buffered = self.num_bytes = self.documents = 0

    def add(self, pieces: Iterator[str]) -> None:
        self.documents += 1
        self.buffer.append(np.array([self.tokenizer.eos_token_id], dtype=self.dtype))
        for text in pieces:
            ids = self.tokenizer.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
            self.buffer.append(ids)
            self.buffered += len(ids)
            self.num_bytes += len(text.encode())
            if self.buffered >= self.job.shard_tokens:
                self._flush()

    def close(self) -> dict[str, Any]:
        if self.buffer:
            self._flush()
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {"bytes": self.num_bytes, "tokens": tokens, "documents": self.documents, "shards": self.shards}

    def _flush(self) -> None:
        ids = np.concatenate(self.buffer)
        file = f"part-{self.job.index:05d}-{self.split}-{len(self.shards):05d}.bin"
        data = ids.astype(self.dtype.newbyteorder("<")).tobytes()
        write_atomic(self.job.directory / file, data)
        self.shards.append({"file": file, "tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()})
        self.buffer, self.buffered = [], 0


def _assemble(directory: Path, jobs: list[_Job], duplicates: int) -> None:
    """Numbers the shards through, writes the manifest, and removes what was only for the way."""
    records = [json.loads(job.record.read_bytes()) for job in jobs]
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        parts = [record["splits"][split] for record in records]
        shards = [dict(shard) for part in parts for shard in part["shards"]]
        counts = {key: sum(part[key] for part in parts) for key in ("bytes", "tokens", "documents")}
        if not counts["tokens"]:
            raise DataError(f"no document is left for the {split} split; give more text, or another --valid-fraction")
        splits[split] = {**counts, "shards": shards}
    sources = [
        {
            "file": job.source.name,
            "bytes": job.source.num_bytes,
            "sha256": record["sha256"],
            "valid_from": job.source.cut if isinstance(job.source, FileSource) else None,
            "documents": sum(record["splits"][split]["documents"] for split in SPLITS),
        }
        for job, record in zip(jobs, records, strict=True)
    ]
    renamed: list[tuple[str, str]] = []
    for split in SPLITS:
        for number, shard in enumerate(splits[split]["shards"]):
            renamed.append((shard["file"], f"{split}-{number:05d}.bin"))
            shard["file"] = renamed[-1][1]
    assert tokenizer.eos_token_id is not None
    manifest = Manifest(
        version=FORMAT_VERSION,
        dtype=dtype_of(tokenizer).name,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        eos_token_id=tokenizer.eos_token_id,
        sources=sources,
        splits=splits,
        duplicates=duplicates,
    )
    for old, new in renamed:
        if (directory / old).exists():  # an interrupted call may have got this far
            os.replace(directory / old, directory / new)
    write_atomic(directory / MANIFEST, manifest.to_json())
    kept = {MANIFEST, "tokenizer.json", "lock", *(new for _, new in renamed)}
    for path in directory.iterdir():
        if path.name not in kept:
            path.unlink()
