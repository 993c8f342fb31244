"""From text files to a prepared directory: tokenizer, token shards of both splits, manifest.

Validation is the last tenth of each file by bytes: from the line that begins at or before 90 % of it (from the
character there, when no line begins in the last 64 KiB before). The tokenizer is trained on the training part alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm._files import write_atomic
from fastlm.errors import ConfigError, DataError
from fastlm.tokenizer import BpeTrainer, Tokenizer
from fastlm.training.data import FORMAT_VERSION, MANIFEST, Manifest, TokenDataset, sha256_file

CHUNK_BYTES = 4 << 20  # text encoded at once; bounds memory
LINE_SEARCH_BYTES = 64 << 10  # how far back from 90 % a line start is looked for
SHARD_TOKENS = 1 << 27
EOS_TOKEN = "<|endoftext|>"


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
    on_progress: Callable[[str, int, int], None] | None = None,
) -> TokenDataset:
    """Writes a prepared directory, whole or not at all, and opens it.

    Args:
        files: UTF-8 text files; each is one document.
        out: the directory to write; must not exist, or be empty.
        tokenizer: encodes the text; by default one is trained on the training part.
        vocab_size: of the trained tokenizer; by default chosen by the amount of text.
        valid_fraction: share of each file, at its end, that is kept for validation.
        on_progress: called with (stage, bytes done, bytes in all).

    Raises:
        DataError: a file is missing, empty, too short to split, or not UTF-8 (with the byte offset); `out` is taken.
        ConfigError: an option makes no sense.
    """
    out = Path(out)
    paths = [Path(f) for f in files]
    if not paths:
        raise DataError("no text file was given")
    if tokenizer is not None and vocab_size is not None:
        raise ConfigError("give a tokenizer or a vocabulary size, not both")
    if not 0.0 < valid_fraction < 1.0:
        raise ConfigError(f"valid_fraction must lie between 0 and 1, not {valid_fraction}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already; give another directory")
    cuts = [_split_point(path, valid_fraction) for path in paths]
    sizes = [path.stat().st_size for path in paths]
    if tokenizer is None:
        trainer = BpeTrainer(
            default_vocab_size(sum(cuts)) if vocab_size is None else vocab_size, special_tokens=[EOS_TOKEN]
        )
        texts = (text for path, cut in zip(paths, cuts, strict=True) for text in read_text(path, 0, cut))
        tokenizer = trainer.train_from_iterator(texts)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer has no end-of-text token; it needs a special token such as {EOS_TOKEN}")

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        tokenizer.save(temporary / "tokenizer.json")
        tokenizer = Tokenizer.from_file(temporary / "tokenizer.json")  # what will be read: same ids, same fingerprint
        assert tokenizer.eos_token_id is not None
        writer = _Writer(temporary, tokenizer, sum(sizes), on_progress)
        splits = {
            "train": writer.write("train", [(p, 0, cut) for p, cut in zip(paths, cuts, strict=True)]),
            "valid": writer.write("valid", [(p, cut, n) for p, cut, n in zip(paths, cuts, sizes, strict=True)]),
        }
        manifest = Manifest(
            version=FORMAT_VERSION,
            dtype=writer.dtype.name,
            tokenizer_fingerprint=tokenizer.fingerprint(),
            eos_token_id=tokenizer.eos_token_id,
            sources=[
                {"file": str(p), "bytes": n, "sha256": sha256_file(p), "valid_from": cut}
                for p, cut, n in zip(paths, cuts, sizes, strict=True)
            ],
            splits=splits,
        )
        write_atomic(temporary / MANIFEST, manifest.to_json())
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return TokenDataset(out)


class _Writer:
    """Encodes ranges of files into the shards of one split after the other."""

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        total_bytes: int,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.directory = directory
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.on_progress = on_progress

    def write(self, name: str, ranges: list[tuple[Path, int, int]]) -> dict[str, Any]:
        shards: list[dict[str, Any]] = []
        buffer: list[np.ndarray] = []
        buffered = 0
        num_bytes = 0

        def flush() -> None:
            nonlocal buffer, buffered
            ids = np.concatenate(buffer)
            file = f"{name}-{len(shards):05d}.bin"
            data = ids.astype(self.dtype.newbyteorder("<")).tobytes()
            write_atomic(self.directory / file, data)
            shards.append({"file": file, "tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()})
            buffer, buffered = [], 0

        for path, start, stop in ranges:
            buffer.append(np.array([self.tokenizer.eos_token_id], dtype=self.dtype))
            for text in read_text(path, start, stop):
                ids = self.tokenizer.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
                buffer.append(ids)
                buffered += len(ids)
                num_bytes += len(text.encode())
                self.done_bytes += len(text.encode())
                if self.on_progress is not None:
                    self.on_progress("encoding", self.done_bytes, self.total_bytes)
                if buffered >= SHARD_TOKENS:
                    flush()
        if buffer:
            flush()
        return {"bytes": num_bytes, "tokens": sum(s["tokens"] for s in shards), "shards": shards}


def read_text(path: Path, start: int, stop: int) -> Iterator[str]:
    """The bytes from `start` to `stop` as text, in pieces that end at a line end, or a character's where a line is
    long.

    Raises:
        DataError: the bytes are not UTF-8; names the offset in the file.
    """
    with path.open("rb") as file:
        file.seek(start)
        position, rest = start, b""
        while position + len(rest) < stop or rest:
            new = file.read(min(CHUNK_BYTES, stop - position - len(rest)))
            chunk = rest + new
            last = position + len(chunk) >= stop or not new
            end = len(chunk) if last else (chunk.rfind(b"\n") + 1 or _character_end(chunk))
            try:
                yield chunk[:end].decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is not UTF-8: byte {chunk[error.start]:#04x} at offset {position + error.start}; "
                    "convert it, for example by `iconv -t UTF-8`"
                ) from None
            position, rest = position + end, chunk[end:]
            if last:
                return


def _character_end(chunk: bytes) -> int:
    """The end of the last whole character, looking at no more than the four bytes that one can have."""
    for back in range(1, min(4, len(chunk)) + 1):
        byte = chunk[-back]
        if byte & 0xC0 != 0x80:  # not a continuation byte: a character begins here
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(chunk) if length <= back else len(chunk) - back
    return len(chunk)


def _split_point(path: Path, valid_fraction: float) -> int:
    """The byte at which validation starts. Raises DataError for a missing, empty or too short file."""
    if not path.is_file():
        raise DataError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; give a text file")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path} is empty; give a file with text")
    target = int(size * (1.0 - valid_fraction))
    begin = max(0, target - LINE_SEARCH_BYTES)
    with path.open("rb") as file:
        file.seek(begin)
        before = file.read(target - begin)
    cut = begin + (before.rfind(b"\n") + 1 or _character_end(before))
    if not 0 < cut < size:
        raise DataError(f"{path} has {size} bytes: too short to split into training and validation; give more text")
    return cut
