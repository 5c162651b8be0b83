"""Finds installed fonts that can draw names in any script.

A picture that draws a name in a font without its letters shows boxes. So the fonts of the machine are asked for the
letters that the usual one lacks, and what none of them has is replaced by words that can be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache

__all__ = ["drawable", "drawing", "families_for"]

USUAL = "DejaVu Sans"
"""Comes with matplotlib."""


@cache
def _letters(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def _fonts() -> tuple[tuple[str, str], ...]:
    """``(name, file)`` of the upright fonts, the usual one first; those that draw no outlines are left out."""
    from matplotlib.font_manager import fontManager

    found: dict[str, str] = {}
    for font in sorted(fontManager.ttflist, key=lambda f: (f.name != USUAL, f.name, f.fname)):
        plain = font.style == "normal" and font.weight in (400, "normal", "regular", "book")
        if plain and not any(word in font.name for word in ("Last Resort", "Color", "Emoji")):
            found.setdefault(font.name, font.fname)
    return tuple(found.items())


def _needed(texts: Iterable[str]) -> set[int]:
    return {ord(letter) for text in texts for letter in text if letter.isprintable() and not letter.isspace()}


def families_for(texts: Iterable[str]) -> list[str]:
    """Font families, the usual one first, that together have as many letters of these texts as any can draw.

    >>> families_for(["plain", "Ærøskøbing"])
    ['DejaVu Sans']
    """
    fonts = dict(_fonts())
    left = _needed(texts) - _letters(fonts.get(USUAL, ""))
    chosen = [USUAL]
    while left:
        name = max(fonts, key=lambda name: len(left & _letters(fonts[name])))
        here = left & _letters(fonts[name])
        if not here:
            break
        chosen.append(name)
        left -= here
    return chosen


def drawable(text: str) -> bool:
    """Whether the installed fonts have every letter of a text, and it holds none that cannot be seen.

    >>> drawable("Zürich 3"), drawable("\\U000F0000")
    (True, False)
    """
    if not text.strip() or any(not letter.isprintable() for letter in text):
        return False
    left = _needed([text])
    for _, file in _fonts():
        left -= _letters(file)
        if not left:
            return True
    return False


def drawing(texts: Iterable[str]) -> AbstractContextManager[None]:
    """Pictures made inside are drawn with fonts that have these texts' letters."""
    from matplotlib import rc_context

    families = families_for(texts)
    inside: AbstractContextManager[None] = rc_context({"font.family": families} if len(families) > 1 else {})
    return inside
