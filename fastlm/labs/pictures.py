"""Pictures whose Korean is drawn, never squares: a font that has it is found, or Hangul is romanised."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from fastlm._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

KOREAN_FONTS = (
    "NanumGothic",
    "NanumBarunGothic",
    "Noto Sans CJK KR",
    "Noto Sans KR",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "AppleGothic",
    "UnDotum",
)
HOW_TO_GET_A_FONT = "apt install fonts-nanum, or pip install koreanize-matplotlib"
_HANGUL = regex.compile(r"\p{Hangul}")


@cache
def korean_font() -> str | None:
    """The name of an installed font that has Hangul; also the one that the package koreanize-matplotlib carries."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    for name in KOREAN_FONTS:
        if name in installed:
            return name
    package = importlib.util.find_spec("koreanize_matplotlib")
    for place in (package.submodule_search_locations or []) if package else []:
        for file in sorted(Path(place).rglob("NanumGothic.ttf")):
            font_manager.fontManager.addfont(str(file))
            return "NanumGothic"
    # matplotlib remembers the fonts of the day it first ran; one that was installed since is found on disk.
    for path in font_manager.findSystemFonts():
        if Path(path).stem in ("NanumGothic", "NotoSansCJK-Regular", "NotoSansKR-Regular"):
            font_manager.fontManager.addfont(path)
            return font_manager.get_font(path).family_name
    return None


def drawable(text: str) -> str:
    """`text` as a picture can show it: as it is, or with Hangul romanised where no font has it."""
    if korean_font() is not None:
        return text
    return _HANGUL.sub(lambda match: unicodedata.name(match[0], "?").rsplit(" ", 1)[-1].lower(), text)


@contextmanager
def drawing(path: Path, *, rows: int, columns: int, width: float, height: float) -> Iterator[NDArray]:
    """Yields a `(rows, columns)` array of axes to draw on, and writes them to `path` as a PNG. Sizes are in inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    family = [name for name in (korean_font(), "DejaVu Sans") if name]
    with matplotlib.rc_context({"font.family": family, "axes.unicode_minus": False, "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots(rows, columns, squeeze=False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def bars_by_group(axes: Axes, groups: list[str], series: dict[str, list[float]]) -> None:
    """Bars side by side: one cluster a group, one colour a series."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
        axes.bar(places, values, width, label=drawable(name))
    axes.set_xticks(range(len(groups)), [drawable(group) for group in groups])
    if len(series) > 1:
        axes.legend(fontsize="small")
