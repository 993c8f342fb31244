"""Encodes the lines of a text file on all cores and writes the ids as one array: the lines' ids after one another.

python examples/tokenize_a_corpus.py corpus.txt --tokenizer tokenizer.json --out ids.npy
"""

from __future__ import annotations

import argparse
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np

from fastlm import BpeTrainer, Tokenizer

LINES_AT_ONCE = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, .gguf, .tiktoken or tekken.json file")
    parser.add_argument("--vocab-size", type=int, default=8000, help="of the one that is trained without --tokenizer")
    parser.add_argument("--out", type=Path, default=Path("ids.npy"))
    asked = parser.parse_args()

    if asked.tokenizer is not None:
        tokenizer = Tokenizer.from_file(asked.tokenizer)
    else:
        tokenizer = BpeTrainer(asked.vocab_size).train([asked.text])
    started = time.perf_counter()
    parts = []
    with asked.text.open(encoding="utf-8") as lines:
        while batch := list(islice(lines, LINES_AT_ONCE)):
            ids = tokenizer.encode_batch(batch, disallowed_special=())
            parts.append(np.fromiter(chain.from_iterable(ids), np.uint32))
    np.save(asked.out, np.concatenate(parts) if parts else np.zeros(0, np.uint32))
    tokens, size = sum(map(len, parts)), asked.text.stat().st_size
    took = time.perf_counter() - started
    print(f"{tokens:,} tokens, {size / max(1, tokens):.2f} bytes each, {size / 1e6 / took:.0f} MB/s -> {asked.out}")


if __name__ == "__main__":
    main()
