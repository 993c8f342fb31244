"""Encoding beside every exact BPE tokenizer that is installed: tiktoken's vocabularies, equal ids, one thread, lists.

The vocabularies are cl100k_base and o200k_base where tiktoken's cache, `.test-data/tiktoken` or llama-index-core holds
them; without them there is one of 16,000 ids trained on the spot, which only tiktoken and Hugging Face can load. A peer
whose ids differ from tiktoken's is not timed but named. Run it alone on the machine: the peers allocate much.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastlm.benchmarks.harness import Case, leave_out, optional
from fastlm.benchmarks.tokenizer_peers import Encode, gigatoken_arrays, load_peers, one_thread, without_inexact

from fastlm.data import english_text, korean_text
from fastlm.errors import TokenizerError
from fastlm.tokenizer import BpeTrainer, Tokenizer
from fastlm.tokenizer.patterns import REGEXES
from fastlm.tokenizer.tiktoken_format import ENCODINGS, cache_directory

TEXT_BYTES = 1_000_000
ROOT = Path(__file__).resolve().parents[1]
REVIEWS = ROOT.parent / "shared" / "data" / "nsmc" / "reviews.txt"
LONG_RUN_PEERS = ("splintr", "gigatoken", "quicktok", "rs-bpe", "tiktoken")  # the others need minutes


def cases(device: str) -> Iterable[Case]:
    if device != "cpu":
        return
    one_thread()
    texts = {"English": _head(english_text()), "code": _head(_code()), "Korean": _head(_korean())}
    if not _find_vocabularies():
        leave_out("cl100k_base and o200k_base are not here (pip install llama-index-core), so most peers are left out")
        yield from _cases_of_trained(texts)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cl100k_base", "o200k_base"):
            ours = Tokenizer.from_tiktoken(name)
            tokenizer_json = Path(folder) / f"{name}.json"
            ours.save(tokenizer_json)
            peers = load_peers(name, cache_directory() / ENCODINGS[name].cache_name, tokenizer_json)
            for kind, text in texts.items():
                yield _list_case(f"{kind}, {name}", ours, peers, text)
            if name == "cl100k_base":
                yield from _other_cases(ours, peers, texts)


def _other_cases(ours: Tokenizer, peers: dict[str, Encode], texts: dict[str, str]) -> Iterable[Case]:
    for kind, characters in (("English", texts["English"][5000:5080]), ("Korean", texts["Korean"][5000:5080])):
        exact = without_inexact(peers, characters, f"80 characters, {kind}")
        yield Case(
            name=f"80 characters, {kind}, 1000 calls",
            ours=partial(_repeat, ours.encode_ordinary, characters),
            peers={name: partial(_repeat, encode, characters) for name, encode in exact.items()},
            check=check_items,
            work=1000,
            unit="calls",
        )
    yield _list_case("100,000 × a", ours, peers, "a" * 100_000)
    long_run_peers = {name: encode for name, encode in peers.items() if name in LONG_RUN_PEERS}
    yield _list_case("10,000,000 × a", ours, long_run_peers, "a" * 10_000_000)
    if REVIEWS.is_file():
        fast = {name: encode for name, encode in peers.items() if name != "tokenizers"}
        yield _list_case("Korean, 20 MB", ours, fast, REVIEWS.read_text(encoding="utf-8"))
    gigatoken = optional("gigatoken")
    if gigatoken is not None:
        rank_file = cache_directory() / ENCODINGS["cl100k_base"].cache_name
        theirs = gigatoken_arrays("cl100k_base", rank_file, gigatoken)
        for kind, text in texts.items():
            yield Case(
                name=f"{kind}, NumPy array",
                ours=partial(ours.encode_to_numpy, text, disallowed_special=()),
                peers={"gigatoken": partial(theirs, text)},
                check=_check_arrays,
                work=len(text.encode()),
                unit="bytes",
            )
    lines = texts["English"].splitlines(keepends=True) + texts["Korean"].splitlines(keepends=True)
    yield _batch_case(ours, lines, {"tiktoken": _tiktoken_of(ours)})


def _cases_of_trained(texts: dict[str, str]) -> Iterable[Case]:
    ours = BpeTrainer(16_000, pattern="cl100k").train_from_iterator(texts.values())
    theirs = _tiktoken_of(ours)
    for kind, text in (texts | {"100,000 × a": "a" * 100_000}).items():
        yield _list_case(kind, ours, {"tiktoken": theirs.encode_ordinary}, text)


def _list_case(name: str, ours: Tokenizer, peers: dict[str, Encode], text: str) -> Case:
    exact = without_inexact(peers, text, name)
    return Case(
        name=name,
        ours=partial(ours.encode_ordinary, text),
        peers={peer: partial(encode, text) for peer, encode in exact.items()},
        check=check_items,
        work=len(text.encode()),
        unit="bytes",
    )


def _batch_case(ours: Tokenizer, lines: list[str], peers: dict[str, Any]) -> Case:
    threads = os.cpu_count() or 1
    return Case(
        name=f"{len(lines)} lines, {threads} threads",
        ours=partial(ours.encode_batch, lines, num_threads=threads, disallowed_special=()),
        peers={name: partial(peer.encode_ordinary_batch, lines, num_threads=threads) for name, peer in peers.items()},
        check=check_items,
        work=sum(len(line.encode()) for line in lines),
        unit="bytes",
    )


def _repeat(encode: Callable[[str], list[int]], text: str) -> list[int]:
    for _ in range(999):
        encode(text)
    return encode(text)


def _find_vocabularies() -> bool:
    """Sets TIKTOKEN_CACHE_DIR to the first place that has both, as tiktoken itself looks there too."""
    places = [cache_directory(), ROOT / ".test-data" / "tiktoken"]
    if (spec := find_spec("llama_index")) and spec.submodule_search_locations:
        places += [Path(p) / "core" / "_static" / "tiktoken_cache" for p in spec.submodule_search_locations]
    for place in places:
        os.environ["TIKTOKEN_CACHE_DIR"] = str(place)
        try:
            for name in ("cl100k_base", "o200k_base"):
                Tokenizer.from_tiktoken(name)
            return True
        except TokenizerError:
            del os.environ["TIKTOKEN_CACHE_DIR"]
    return False


def _tiktoken_of(ours: Tokenizer) -> Any:
    import tiktoken

    return tiktoken.Encoding(
        "bench",
        pat_str=REGEXES[str(ours.pattern)],
        mergeable_ranks=ours.mergeable_ranks,
        special_tokens=ours.special_tokens,
    )


def _head(text: str) -> str:
    return text.encode()[:TEXT_BYTES].decode(errors="ignore")


def _code() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files[:40])


def _korean() -> str:
    return REVIEWS.read_text(encoding="utf-8") if REVIEWS.is_file() else korean_text()


def check_items(ours: list, peer: list) -> None:
    assert len(ours) == len(peer) > 0, f"{len(ours)} against {len(peer)}"
    for i, (mine, theirs) in enumerate(zip(ours, peer, strict=True)):
        assert mine == theirs, f"item {i} is {mine} against {theirs}"


def _check_arrays(ours: Any, peer: Any) -> None:
    check_items(ours.tolist(), peer.tolist())
