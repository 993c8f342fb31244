"""Other exact BPE tokenizers, each loaded with one of tiktoken's vocabularies. All of them give a list of int."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from fastlm.benchmarks.harness import leave_out, optional

Encode = Callable[[str], list[int]]


def load_peers(name: str, rank_file: Path, tokenizer_json: Path) -> dict[str, Encode]:
    """Those that are installed, by name. `name` is cl100k_base or o200k_base, and the files hold that vocabulary."""
    loaders: dict[str, tuple[str, Callable[[Any], Encode]]] = {
        "tiktoken": ("tiktoken", lambda m: m.get_encoding(name).encode_ordinary),
        "splintr": ("splintr", lambda m: m.Tokenizer.from_pretrained(name).encode),
        "quicktok": ("quicktok", lambda m: m.get_encoding(name).encode_ordinary),
        "rs-bpe": ("rs_bpe", lambda m: getattr(import_module("rs_bpe.bpe").openai, name)().encode),
        # Its Python layer refuses long texts and costs more than short ones.
        "bpe-openai": ("bpe_openai", lambda m: m.get_encoding(name)._backend.encode),
        "gigatoken": ("gigatoken", partial(_gigatoken, name, rank_file)),
        "fastokens": ("fastokens", partial(_fastokens, name, rank_file)),
        "tokie": ("tokie", partial(_tokie, tokenizer_json)),
        "kitoken": ("kitoken", lambda m: m.Kitoken.from_tiktoken_file(str(rank_file)).encode),
        "tokenizers": ("tokenizers", partial(_tokenizers, tokenizer_json)),
    }
    peers = {}
    for peer, (package, load) in loaders.items():
        module = optional(package)
        if module is None:
            continue
        try:
            peers[peer] = load(module)
        except Exception as error:  # whatever it was, the others can still be measured
            leave_out(f"{peer} cannot load {name}, so it is left out: {type(error).__name__}: {error}")
    return peers


def without_inexact(peers: dict[str, Encode], text: str, case: str) -> dict[str, Encode]:
    """tiktoken, and those whose ids are its ids on this text and that work on one thread. The others are left out."""
    exact = {"tiktoken": peers["tiktoken"]}
    expected = peers["tiktoken"](text)
    for peer, encode in peers.items():
        if peer in exact:
            continue
        began, used = time.perf_counter(), time.process_time()
        try:
            ids = encode(text)
        except Exception as error:
            leave_out(f"{peer} is left out of {case}: {type(error).__name__}: {error}")
            continue
        took, used = time.perf_counter() - began, time.process_time() - used
        if took > 0.001 and used > 1.3 * took:
            leave_out(f"{peer} is left out of {case}: it works on {used / took:.1f} threads")
            continue
        if ids == expected:
            exact[peer] = encode
            continue
        differ = (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b)
        first = next(differ, min(len(ids), len(expected)))
        leave_out(f"{peer} is left out of {case}: its ids are not tiktoken's from the {first + 1:,}th on")
    return exact


def one_thread() -> None:
    """Before any peer is loaded: several start as many threads as there are processors."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")


def gigatoken_arrays(name: str, rank_file: Path, module: Any) -> Callable[[str], Any]:
    """gigatoken's own result, a NumPy array."""
    return module.Tokenizer.from_tiktoken(rank_file, pretokenizer=name.removesuffix("_base")).encode


def _gigatoken(name: str, rank_file: Path, module: Any) -> Encode:
    encode = gigatoken_arrays(name, rank_file, module)
    return lambda text: encode(text).tolist()


def _fastokens(name: str, rank_file: Path, module: Any) -> Encode:
    tokenizer = module.Tokenizer.from_tiktoken(str(rank_file), encoding=name)
    return lambda text: tokenizer.encode_ordinary(text).ids


def _tokie(tokenizer_json: Path, module: Any) -> Encode:
    tokenizer = module.Tokenizer.from_json(str(tokenizer_json))
    return lambda text: tokenizer.encode(text).ids


def _tokenizers(tokenizer_json: Path, module: Any) -> Encode:
    tokenizer = module.Tokenizer.from_file(str(tokenizer_json))
    return lambda text: tokenizer.encode(text).ids
