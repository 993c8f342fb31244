"""Encoding beside tiktoken and Hugging Face's tokenizers: the same vocabulary, equal ids.

The vocabulary is cl100k_base where tiktoken's cache holds it, else one of 16,000 ids trained on the spot.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from fastlm.benchmarks.harness import Case

from fastlm.data import english_text, korean_text
from fastlm.errors import TokenizerError
from fastlm.tokenizer import BpeTrainer, Tokenizer
from fastlm.tokenizer.patterns import REGEXES

TEXT_BYTES = 1_000_000
REVIEWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "nsmc" / "reviews.txt"

Encode = Callable[[str], list[int]]
EncodeBatch = Callable[[list[str]], list[list[int]]]


def cases(device: str) -> Iterable[Case]:
    if device != "cpu":
        return
    texts = {"English": _head(english_text()), "code": _head(_code()), "Korean": _head(_korean())}
    ours = _vocabulary(texts)
    peers = _peers(ours)
    for kind, text in texts.items():
        yield _case(f"{kind}, 1 thread", ours.encode_ordinary, {n: encode for n, (encode, _) in peers.items()}, text)
    sentence = texts["English"][5000:5080]
    yield Case(
        name="80 characters, 1000 calls",
        ours=partial(_repeat, ours.encode_ordinary, sentence),
        peers={name: partial(_repeat, encode, sentence) for name, (encode, _) in peers.items()},
        check=_check,
        work=1000,
        unit="calls",
    )
    yield _case("100,000 × a", ours.encode_ordinary, {n: encode for n, (encode, _) in peers.items()}, "a" * 100_000)
    lines = texts["English"].splitlines(keepends=True) + texts["Korean"].splitlines(keepends=True)
    yield Case(
        name=f"{len(lines)} lines, {os.cpu_count()} threads",
        ours=partial(ours.encode_batch, lines, disallowed_special=()),
        peers={name: partial(encode_batch, lines) for name, (_, encode_batch) in peers.items()},
        check=_check,
        work=sum(len(line.encode()) for line in lines),
        unit="bytes",
    )


def _case(name: str, ours: Encode, peers: dict[str, Encode], text: str) -> Case:
    return Case(
        name=name,
        ours=partial(ours, text),
        peers={peer: partial(encode, text) for peer, encode in peers.items()},
        check=_check,
        work=len(text.encode()),
        unit="bytes",
    )


def _repeat(encode: Encode, text: str) -> list[int]:
    for _ in range(999):
        encode(text)
    return encode(text)


def _vocabulary(texts: dict[str, str]) -> Tokenizer:
    try:
        return Tokenizer.from_tiktoken("cl100k_base")
    except TokenizerError:
        return BpeTrainer(16_000, pattern="cl100k").train_from_iterator(texts.values())


def _peers(ours: Tokenizer) -> dict[str, tuple[Encode, EncodeBatch]]:
    import tiktoken
    import tokenizers

    theirs = tiktoken.Encoding(
        "bench",
        pat_str=REGEXES[str(ours.pattern)],
        mergeable_ranks=ours.mergeable_ranks,
        special_tokens=ours.special_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder) / "tokenizer.json")
        hugging_face = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    return {
        "tiktoken": (
            theirs.encode_ordinary,
            partial(theirs.encode_ordinary_batch, num_threads=os.cpu_count() or 1),
        ),
        "tokenizers": (
            lambda text: hugging_face.encode(text).ids,
            lambda batch: [encoding.ids for encoding in hugging_face.encode_batch(batch)],
        ),
    }


def _head(text: str) -> str:
    return text.encode()[:TEXT_BYTES].decode(errors="ignore")


def _code() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files[:40])


def _korean() -> str:
    return REVIEWS.read_text(encoding="utf-8") if REVIEWS.is_file() else korean_text()


def _check(ours: list, peer: list) -> None:
    assert len(ours) == len(peer) > 0, f"{len(ours)} against {len(peer)}"
    for i, (mine, theirs) in enumerate(zip(ours, peer, strict=True)):
        assert mine == theirs, f"item {i} is {mine} against {theirs}"
