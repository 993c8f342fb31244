"""Which backend serves which feature of each op, as the tables of the documentation.

    python -m fastlm.ops.features docs/en/ops.md docs/ko/ops.md

rewrites, in each page, what stands between `<!-- features -->` and `<!-- /features -->`. With `--check` it writes
nothing and exits with 1 where a page is out of date. No cell is written by hand: for each feature there is a call, and

    fast        the backend's own `supports` takes the call,
    reference   no backend of its device does, so that plain PyTorch serves it,
    by triton   it does not, but that other backend of its device does,
    refused     the op raises on the call, whatever the backend.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastlm._files import write_atomic
from fastlm.errors import DataError
from fastlm.ops import OPS
from fastlm.ops.feature_calls import FEATURES, Feature

WORDS = {
    "en": {"fast": "fast", "reference": "reference", "refused": "refused", "triton": "by triton"},
    "ko": {"fast": "빠름", "reference": "기본 구현", "refused": "거부", "triton": "triton이 처리"},
}
BACKENDS = ("triton", "cuda", "cpu")
_REGION = re.compile(r"(<!-- features -->\n).*?(<!-- /features -->)", re.DOTALL)


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """FASTLM_BACKEND while the block runs; unset for None."""
    before = os.environ.pop("FASTLM_BACKEND", None)
    if backend is not None:
        os.environ["FASTLM_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("FASTLM_BACKEND", None)
        if before is not None:
            os.environ["FASTLM_BACKEND"] = before


def run(op: str, feature: Feature) -> list[Tensor]:
    """The call's outputs that are tensors; where the feature is a gradient, also those of its arguments."""
    args, kwargs = feature.call()
    outputs = OPS[op].public(*args, **kwargs)
    tensors = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(t, Tensor)]
    if not feature.gradient:
        return tensors
    leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    differentiable = [t for t in tensors if t.is_floating_point()]
    grads = torch.autograd.grad(differentiable, leaves, [torch.ones_like(t) for t in differentiable])
    return [*(t.detach() for t in tensors), *grads]


def cell(op: str, feature: Feature, backend: str) -> str:
    """One of the keys of WORDS."""
    with forced("reference"):
        try:
            run(op, feature)
        except (TypeError, ValueError, RuntimeError):
            return "refused"
    args, kwargs = feature.call()
    bound = inspect.signature(OPS[op].public).bind(*args, **kwargs)
    bound.apply_defaults()

    def serves(name: str) -> bool:
        return name in OPS[op].backends and OPS[op].module(name).supports(*bound.args, **bound.kwargs) is None

    if serves(backend):
        return "fast"
    return "triton" if backend == "cuda" and serves("triton") else "reference"


def tables(language: str) -> str:
    """A table an op, in Markdown."""
    words = WORDS[language]
    lines: list[str] = []
    for op, features in FEATURES.items():
        backends = [backend for backend in BACKENDS if backend in OPS[op].backends]
        lines += [f"**{op}**", "", f"| | {' | '.join(backends)} |", f"|---|{'---|' * len(backends)}"]
        for feature in features:
            label = feature.english if language == "en" else feature.korean
            cells = [words[cell(op, feature, backend)] for backend in backends]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def rewritten(text: str, language: str) -> str:
    """The page with its tables made anew. Raises DataError when it has no place for them."""
    if not _REGION.search(text):
        raise DataError("the page has no <!-- features --> … <!-- /features --> to write between")
    return _REGION.sub(lambda match: match[1] + tables(language) + match[2], text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastlm.ops.features", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, help="docs/en/… or docs/ko/…, whose folder names the language")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    options = parser.parse_args(arguments)
    stale = 0
    for page in options.pages:
        text = page.read_text(encoding="utf-8")
        try:
            new = rewritten(text, "ko" if page.absolute().parent.name == "ko" else "en")
        except DataError as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 1
        if new == text:
            continue
        stale += 1
        if options.check:
            print(f"{page} is out of date; run: python -m fastlm.ops.features {page}", file=sys.stderr)
        else:
            write_atomic(page, new)
            print(f"{page} rewritten")
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
