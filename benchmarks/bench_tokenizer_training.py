"""BPE training beside gigabpe, rustbpe and Hugging Face's tokenizers: the same files, words and vocabulary size.

The merges of gigabpe and tokenizers must equal ours; rustbpe breaks ties otherwise, so only their number must. The
texts are the standard library's code and, where they lie beside the checkout, Korean reviews. FASTLM_BENCH_TEXT names
another UTF-8 file of one text a line, without blank lines and indents, as the peers read files by line. All use every
processor; run it by itself, as the benchmark of encoding holds the peers to one thread.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from fastlm.benchmarks.bench_tokenizer import REVIEWS, check_items
from fastlm.benchmarks.harness import Case, optional

from fastlm.tokenizer.byte_level import from_chars
from fastlm.tokenizer.patterns import REGEXES
from fastlm.tokenizer.trainer import BpeTrainer

Merges = list[tuple[bytes, bytes]]
CODE_BYTES = 19_000_000


@dataclass(frozen=True)
class MergeCount:
    """What a peer gives whose merges are others where pairs are equally frequent."""

    merges: int


def cases(device: str) -> Iterable[Case]:
    if device != "cpu":
        return
    if path := os.environ.get("FASTLM_BENCH_TEXT"):
        for vocab_size in (8_000, 32_000):
            yield _case(Path(path).name, path, vocab_size, _train)
        return
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.txt"
        code.write_text(_code(), "utf-8")
        yield _case("code", str(code), 32_000, _train_by_line)
        if REVIEWS.is_file():
            for vocab_size in (8_000, 32_000):
                yield _case("Korean", str(REVIEWS), vocab_size, _train)


def _case(name: str, path: str, vocab_size: int, train: Callable[[str, int], Merges]) -> Case:
    size = Path(path).stat().st_size
    peers: dict[str, Callable[[], Merges | MergeCount]] = {
        "tokenizers": partial(_train_tokenizers, path, vocab_size),
    }
    if optional("gigabpe"):
        peers["gigabpe"] = partial(_train_gigabpe, path, vocab_size)
    if optional("rustbpe"):
        peers["rustbpe"] = partial(_train_rustbpe, path, vocab_size)
    return Case(
        name=f"{name} {size / 1e6:.0f} MB, {vocab_size} ids",
        ours=partial(train, path, vocab_size),
        peers=peers,
        check=_check,
        work=size,
        unit="bytes",
    )


def _code() -> str:
    """Lines of the standard library, its tests included, that are not blank."""
    lines: list[str] = []
    size = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        for line in file.read_text(encoding="utf-8", errors="ignore").split("\n"):
            if line.strip():
                lines.append(line + "\n")
                size += len(line.encode()) + 1
        if size >= CODE_BYTES:
            break
    return "".join(lines)


def _train(path: str, vocab_size: int) -> Merges:
    return BpeTrainer(vocab_size, pattern="gpt2").train(path).merges or []


def _train_by_line(path: str, vocab_size: int) -> Merges:
    """Each line as a text of its own, as the peers read files: a line end and the next line's indent are one word."""
    return BpeTrainer(vocab_size, pattern="gpt2").train(path, by_line=True).merges or []


def _train_tokenizers(path: str, vocab_size: int) -> Merges:
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([path], trainer)
    return _in_bytes(json.loads(tokenizer.to_str())["model"]["merges"])


def _train_gigabpe(path: str, vocab_size: int) -> Merges:
    _, merges = import_module("gigabpe").train_bpe(
        [path], vocab_size, special_tokens=["<|endoftext|>"], pretokenizer="bytelevel"
    )
    # Bytes that the text lacks get no id, so that more merges fit.
    return _in_bytes(merges[: vocab_size - 257])


def _train_rustbpe(path: str, vocab_size: int) -> MergeCount:
    tokenizer = import_module("rustbpe").Tokenizer()
    with open(path, encoding="utf-8", newline="\n") as lines:
        tokenizer.train_from_iterator(lines, vocab_size - 1, pattern=REGEXES["gpt2"])
    return MergeCount(tokenizer.vocab_size - 256)


def _in_bytes(merges: Iterable[Sequence[str]]) -> Merges:
    return [(from_chars(left), from_chars(right)) for left, right in merges]


def _check(ours: Merges, peer: Merges | MergeCount) -> None:
    if isinstance(peer, MergeCount):
        assert len(ours) == peer.merges > 0, f"{len(ours)} merges against {peer.merges}"
        return
    check_items(ours, peer)
