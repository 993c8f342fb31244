"""BPE training beside Hugging Face's tokenizers: the same text, pre-tokenizer and vocabulary size, equal merges.

Set FASTLM_BENCH_TEXT to a UTF-8 file of one text a line, without blank lines, to train on that from the disk; peers
read files by line. gigabpe, which reads files only, then joins if it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from fastlm.benchmarks.harness import Case

from fastlm.tokenizer.byte_level import from_chars
from fastlm.tokenizer.trainer import BpeTrainer

Merges = list[tuple[bytes, bytes]]
VOCAB_SIZE = 8000


def cases(device: str) -> Iterable[Case]:
    if device != "cpu":
        return
    peers: dict[str, Callable[[], Merges]]
    path = os.environ.get("FASTLM_BENCH_TEXT")
    if path:
        size = Path(path).stat().st_size
        peers = {"tokenizers": partial(_train_tokenizers, path)}
        if find_spec("gigabpe"):
            peers["gigabpe"] = partial(_train_gigabpe, path)
        yield _case(f"{Path(path).name} {size / 1e6:.0f} MB", size, partial(_train, path), peers)
    else:
        texts = list(topics.values())
        size = sum(len(text.encode()) for text in texts)
        peers = {"tokenizers": partial(_train_tokenizers, texts)}
        yield _case("Python documentation", size, partial(_train, texts), peers)


def _case(name: str, size: int, ours: Callable[[], Merges], peers: dict[str, Callable[[], Merges]]) -> Case:
    return Case(
        name=f"{name}, {VOCAB_SIZE} ids",
        ours=ours,
        peers=peers,
        check=_check,
        work=size,
        unit="bytes",
    )


def _train(source: str | list[str]) -> Merges:
    trainer = BpeTrainer(VOCAB_SIZE, pattern="gpt2")
    tokenizer = trainer.train(source) if isinstance(source, str) else trainer.train_from_iterator(source)
    return tokenizer.merges or []


def _train_tokenizers(source: str | list[str]) -> Merges:
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if isinstance(source, str):
        tokenizer.train([source], trainer)
    else:
        tokenizer.train_from_iterator(source, trainer)
    return _in_bytes(json.loads(tokenizer.to_str())["model"]["merges"])


def _train_gigabpe(path: str) -> Merges:
    _, merges = import_module("gigabpe").train_bpe(
        [path], VOCAB_SIZE, special_tokens=["<|endoftext|>"], pretokenizer="bytelevel"
    )
    # Bytes that the text lacks get no id, so that more merges fit.
    return _in_bytes(merges[: VOCAB_SIZE - 257])


def _in_bytes(merges: Iterable[Sequence[str]]) -> Merges:
    return [(from_chars(left), from_chars(right)) for left, right in merges]


def _check(ours: Merges, peer: Merges) -> None:
    assert len(ours) == len(peer) > 0, f"{len(ours)} merges against {len(peer)}"
    for i, (mine, theirs) in enumerate(zip(ours, peer, strict=True)):
        assert mine == theirs, f"merge {i} is {mine} against {theirs}"
