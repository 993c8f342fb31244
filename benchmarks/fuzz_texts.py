"""Random texts for comparing tokenizers: every plane and category of Unicode, and what patterns and forms look at."""

from __future__ import annotations

import random
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from functools import cache

from fastlm.data import english_text, korean_text

MAX_RUN = 3000  # characters; the longest run of one string

_SPACES = [
    chr(c) for c in [*range(9, 14), 32, 32, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x3000]
]
_CONTRACTIONS = ["'s", "'S", "'ll", "'LL", "'lL", "'re", "'Ve", "'m", "'D", "'t", "'ſ", "’s", "'", "''", "'ve'", "n't"]
_NUMBERS = [*"0123456789٣४²½Ⅷ〇፩𝟙", "10", "1234567", "3.14", "1,000", "0x1F", "１２"]
_EMOJI = [
    "👩",
    "👨",
    "👧",
    "👍",
    "🏽",
    "🏿",
    "🇰",
    "🇷",
    "🇺",
    "❤",
    "🏴",
    "😀",
    "☕",
    "1",
    "#",
    "\u200d",
    "\ufe0f",
    "\u20e3",
    "\U000e0067",
]
_CODE = [
    *"(){}[]<>=+-*/%&|^~!?:;,.@#$_\\\"'`",
    "\n",
    "\n    ",
    "\r\n",
    "\t",
    "def",
    "return",
    "self",
    "//",
    "==",
    "->",
    " ",
]
_MARKUP = [
    "<s>",
    "</s>",
    "<|",
    "|>",
    "<|endoftext|>",
    "<bos>",
    "[INST]",
    "▁",
    "▁▁",
    "\n\n",
    "<h1>",
    "<unk>",
    "Ġ",
    "<0x0A>",
]


class FuzzTexts:
    """Draws texts; the same seed draws the same ones. Characters in `excluded` are left out.

    Lone surrogates are drawn only `with_surrogates`: not every library takes them.
    """

    def __init__(self, seed: int, excluded: frozenset[str] = frozenset(), *, with_surrogates: bool = False) -> None:
        self.rng = random.Random(seed)
        self.excluded = excluded
        kinds: list[tuple[float, Callable[[int], str]]] = [
            (3, self._of_planes),
            (4, self._of_one_category),
            (3, self._of_categories),
            (3, lambda k: self._of(_hangul(), k)),
            (2, lambda k: self._of(_marks(), k)),
            (2, lambda k: self._of(_EMOJI, k)),
            (2, lambda k: self._of(_SPACES, k)),
            (1, lambda k: self._of(["\r\n", "\r", "\n", "\n\n", " "], k)),
            (2, lambda k: self._of(_CODE, k)),
            (1, lambda k: self._of(_CONTRACTIONS, k)),
            (1, lambda k: self._of(_NUMBERS, k)),
            (1, lambda k: self._of(_MARKUP, k)),
            (5, lambda k: self._of(_words(), k)),
            (0.03, self._long_run),
        ]
        if with_surrogates:
            kinds.append((1, lambda k: "".join(chr(self.rng.randrange(0xD800, 0xE000)) for _ in range(k))))
        self._weights = [weight for weight, _ in kinds]
        self._kinds = [kind for _, kind in kinds]

    def draw(self) -> str:
        """One text of 0 to some 100 characters, a few of thousands: one to four stretches of different kinds."""
        rng = self.rng
        parts = []
        for kind in rng.choices(self._kinds, self._weights, k=rng.choice([1, 1, 2, 3, 4])):
            parts.append(kind(rng.choice([0, 1, 1, 2, 3, 5, 8, 13, 30])))
        text = "".join(parts)
        if self.excluded and not self.excluded.isdisjoint(text):
            text = "".join(char for char in text if char not in self.excluded)
        return text

    def draw_bytes(self) -> bytes:
        """UTF-8 of a text with bytes changed, cut or put in: mostly no longer UTF-8."""
        rng = self.rng
        data = bytearray(self.draw().encode("utf-8", "replace"))
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.choice([0, 1, 2])] = rng.randbytes(rng.choice([0, 1, 3]))
        return bytes(data)

    def _of(self, population: list[str], count: int) -> str:
        return "".join(self.rng.choices(population, k=count))

    def _of_planes(self, count: int) -> str:
        chars = [chr(self.rng.randrange(17) << 16 | self.rng.randrange(0x10000)) for _ in range(count)]
        return "".join(char for char in chars if not "\ud800" <= char < "\ue000")

    def _of_one_category(self, count: int) -> str:
        return self._of(self.rng.choice(_categories()), count)

    def _of_categories(self, count: int) -> str:
        return "".join(self.rng.choice(self.rng.choice(_categories())) for _ in range(count))

    def _long_run(self, count: int) -> str:
        unit = self.rng.choice(["a", " ", "\n", "한", "=", "1", "ab", " x", "é", "\U0001f600", "\u0301", "の"])
        return unit * self.rng.randrange(1, MAX_RUN // len(unit))


@cache
def _categories() -> list[list[str]]:
    by_category: dict[str, list[str]] = defaultdict(list)
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category != "Cs":
            by_category[category].append(chr(code))
    return list(by_category.values())


@cache
def _hangul() -> list[str]:
    """Syllables, conjoining and compatibility jamo, halfwidth forms and tone marks."""
    ranges = [
        (0x1100, 0x1200),
        (0x3131, 0x318F),
        (0xA960, 0xA97D),
        (0xD7B0, 0xD7FC),
        (0xFFA0, 0xFFDD),
        (0x302E, 0x3030),
    ]
    jamo = [chr(code) for first, end in ranges for code in range(first, end)]
    syllables = [chr(code) for code in range(0xAC00, 0xD7A4, 7)]
    return [*jamo * 2, *syllables, *[unicodedata.normalize("NFD", syllable) for syllable in syllables[::5]], *" ." * 50]


@cache
def _marks() -> list[str]:
    """Marks that combine, and letters for them to combine with, canonical order and composition at stake."""
    marks = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))]
    return [*marks, *"aeiouAEOnśṩкиअकกဗ" * 20, *["\u0323", "\u0301", "\u0327", "\u0345", "\u3099"] * 30]


@cache
def _words() -> list[str]:
    """Pieces of real English and Korean, each with the space before it."""
    words = [f" {word}" for word in (korean_text() + english_text()[:60_000]).split(" ") if word]
    return [*words[:4000], *words[-4000:], *[word.strip().upper() for word in words[-500:]]]
