"""Draw names of classes and arms in any script, with the fonts of this machine."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

from matplotlib import font_manager

from flowseg.runs.terminal import printable

# Fallback fonts for characters that matplotlib's own font lacks, in order of preference.
_WIDE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP"),
    *("Source Han Sans SC", "Source Han Sans", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans", "Hiragino Sans GB", "Apple SD Gothic Neo", "Heiti TC", "Arial Unicode MS"),
    *(
        "Microsoft YaHei",
        "SimHei",
        "Yu Gothic",
        "MS Gothic",
        "Malgun Gothic",
        "IPAGothic",
        "IPAexGothic",
        "TakaoGothic",
    ),
    *("NanumGothic", "UnDotum", "AR PL UMing CN", "AR PL UKai CN"),
    *(
        "Noto Sans",
        "Noto Sans Arabic",
        "Noto Sans Hebrew",
        "Noto Sans Devanagari",
        "Noto Sans Thai",
        "FreeSans",
        "Unifont",
    ),
)


@functools.cache
def font_families() -> list[str]:
    """Font families for names: matplotlib's own font, then the installed fallback fonts."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]


def drawable(names: Sequence[str], word: str = "class", first: int = 0) -> list[str]:
    """The text to draw for each name: the name, or ``class 3`` if no font has all its characters.

    Args:
        names: any texts.
        word: replaces a name that cannot be drawn, followed by its number.
        first: number of the first name.
    """
    return [_as_text(name) if can_draw(name) else f"{word} {place}" for place, name in enumerate(names, first)]


def captioned(names: Sequence[str], word: str = "class", first: int = 0) -> list[str]:
    """Each name for text next to a picture; if the picture shows a replacement, it follows in brackets."""
    shown = drawable(names, word, first)
    return [name if can_draw(name) else f"{name} ({text})" for name, text in zip(names, shown)]


def can_draw(name: str) -> bool:
    """Whether the fonts of this machine have all characters of a name."""
    return all(ord(character) in _characters() for character in printable(name) if not _is_invisible(character))


@functools.cache
def _characters() -> set[int]:
    files = (font_manager.findfont(name) for name in font_families())
    return set().union(*(font_manager.get_font(file).get_charmap() for file in files))


def _is_invisible(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) == "Cf"


def _as_text(name: str) -> str:
    """Protect a name from matplotlib, which interprets formulas, line breaks and a leading underscore."""
    visible = "".join(" " if c in "\n\t" else c for c in printable(name) if c in "\n\t" or not _is_invisible(c))
    plain = visible.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") or not plain else plain
