"""The error that a user reads: what is wrong, where, and the fix."""

from __future__ import annotations

import re
import traceback
from typing import final

from lichen.core.visible import clipped, visible

__all__ = ["LichenError", "traceback_text"]

_MESSAGE = 200
"""Letters of an unforeseen error's message: what it cites may be somebody's row."""

_LONGEST = 1000
"""Letters of each part at most: what is quoted may come from a file with a hundred thousand columns."""

_BREAK = re.compile(r"\n(?!  )")
"""A line break, unless what follows is set in: the last words of a process are lines of their own."""


def _readable(part: str) -> str:
    """Of bounded length, on one line but for what is set in below it, and with nothing that steers a terminal."""
    return clipped(visible(_BREAK.sub(" ", clipped(part, _LONGEST))), _LONGEST)


@final
class LichenError(Exception):
    """Bad input, told in one sentence, with the place it was found and how to mend it.

    What is quoted in it may come from a stranger's file: it is shortened, and cannot steer a terminal.

    Args:
        what: What is wrong, in plain words.
        where: The recipe key, file, message or checkpoint it was found in.
        fix: What the reader can do about it.
        reason: One word for it, where errors are counted by kind.

    >>> print(LichenError("no such column 'text'", where="data.columns.text", fix="use one of: body, title"))
    data.columns.text: no such column 'text'
      fix: use one of: body, title
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "", reason: str = "") -> None:
        self.reason = reason
        what, where, fix = (_readable(part) for part in (what, where, fix))
        self.what, self.where, self.fix = what, where, fix
        head = f"{where}: {what}" if where else what
        super().__init__(f"{head}\n  fix: {fix}" if fix else head)


def traceback_text(error: BaseException) -> str:
    """The traceback of an unforeseen error, without values of variables and with its messages cut short.

    >>> print(traceback_text(ValueError("a" * 300)), end="")  # doctest: +ELLIPSIS
    ValueError: aaa...aaa [112 more letters]
    """
    parts = traceback.TracebackException.from_exception(error, capture_locals=False).format()
    return "".join(part if part.lstrip().startswith("File ") else _cut(part) for part in parts)


def _cut(part: str) -> str:
    text = part.rstrip("\n")
    if len(text) <= _MESSAGE:
        return part
    return f"{text[:_MESSAGE].splitlines()[0]} [{len(text) - _MESSAGE} more letters]\n"
