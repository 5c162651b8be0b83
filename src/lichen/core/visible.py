"""Cleans foreign text for the screen: no control sequences, a bounded length.

Names of columns, clients, labels and files are written by others. An escape character among them moves the
cursor, changes colours or sets the window's title; a mark of direction makes a name read as another one. Both
are shown as what they are, such as ``\\x1b``.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice

__all__ = ["PLAIN", "clipped", "listed", "plain", "visible", "visible_json"]

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, but for tab and line break
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069"  # marks of direction, and letters without width
    "\u2028\u2029\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with everything that could steer a terminal written out; tabs and line breaks stay.

    >>> visible("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def visible_json(text: str) -> str:
    """JSON with everything that could steer a terminal as JSON's own escapes: it means the same.

    >>> print(visible_json(f'"a{chr(0x202e)}b"'))
    "a\\u202eb"
    """
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)


PLAIN = "lichen.plain"
"""A stream's ``errors``: letters that its encoding lacks are written as plain ones, or as escapes."""

_INSTEAD = {
    **{"±": "+/-", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≠": "!=", "…": "...", "×": "x", "÷": "/", "·": "."},
    **dict.fromkeys("−–—‐‑─━═╌╍", "-"),
    **dict.fromkeys("’‘", "'"),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯╞╡╪", "+"),
}


def _instead(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_INSTEAD.get(letter) or ascii(letter)[1:-1] for letter in lacking), error.end


codecs.register_error(PLAIN, _instead)


def plain(text: str, encoding: str) -> str:
    """The text in letters that an encoding has.

    >>> print(plain("0.93 ± 0.01 → Zoë", "latin-1"), plain("0.93 ± 0.01 …", "ascii"))
    0.93 ± 0.01 -> Zoë 0.93 +/- 0.01 ...
    """
    return text.encode(encoding, PLAIN).decode(encoding)


def clipped(text: str, most: int) -> str:
    """The text, with dots in place of its middle where it is longer than ``most`` letters.

    >>> clipped("abcdefghij", 7)
    'a ... j'
    """
    if len(text) <= most:
        return text
    half = max((most - 5) // 2, 1)
    return f"{text[:half]} ... {text[-half:]}"


def listed(names: Iterable[object], near: str = "", most: int = 12) -> str:
    """Some of many names, so that a sentence stays one: those most like ``near`` first, each of bounded length.

    Args:
        names: All of them.
        near: What the reader may have meant.
        most: How many are written out.

    >>> listed(["rows", "text", "texts"], near="txt", most=2)
    'text, texts and 1 more'
    """
    known = [str(name) for name in names]
    shown = known[:most]
    if len(known) > most:
        close = list(islice(_close(near, known), most)) if near else []
        shown = list(dict.fromkeys([*close, *shown]))[:most]
    text = ", ".join(clipped(name, 60) for name in shown)
    left = len(known) - len(shown)
    return f"{text} and {left:,} more" if left else text


def _close(near: str, names: list[str]) -> Iterator[str]:
    """Names like one, the likest first; where there are very many, only those that hold it."""
    if len(names) > 2000:
        return (name for name in names if near.lower() in name.lower())
    return iter(difflib.get_close_matches(near, names, n=12, cutoff=0.5))
