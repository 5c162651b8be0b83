"""Reads a table's cell as a text, a name or a class, or refuses it by its column.

Texts are taken as they stand, blanks and indentation among them. A number names the same client, group or class
whether it is written ``1``, ``1.0`` or ``"1"``.
"""

from __future__ import annotations

import math
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.visible import clipped

__all__ = ["label_of", "name_of", "text_of", "time_of"]

_KINDS: dict[type, str] = {dict: "an object", list: "a list", tuple: "a list", bytes: "bytes that are no text"}


def text_of(value: Any, column: str, where: str) -> str:
    """The cell as a text; empty where there is none, or nothing but blanks.

    Args:
        value: The cell.
        column: Its column, and
        where: its file and row, for an error.

    Raises:
        LichenError: for what is no text, number or truth value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise LichenError(
                f"column {clipped(column, 60)!r} holds half a character, which is no text",
                where=where,
                fix="mend the row, or delete it",
            )
        return value if value.strip() else ""
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise LichenError(
        f"column {clipped(column, 60)!r} holds {_KINDS.get(type(value), 'no text')}, not a text",
        where=where,
        fix="name a column of texts in data.columns",
    )


def name_of(value: Any, column: str, where: str) -> str:
    """The cell as the name of a client or a group: a whole number is written without a fraction.

    >>> name_of(1.0, "who", "row 1"), name_of(1, "who", "row 2"), name_of("1", "who", "row 3")
    ('1', '1', '1')
    """
    return text_of(int(value) if _is_whole(value) else value, column, where)


def time_of(value: Any) -> str:
    """The cell as a time, in the words of its file; empty for what can be none, which only a stream minds.

    >>> time_of(2018.0), time_of("2018-05-03 "), time_of(float("nan")), time_of([2018])
    ('2018', '2018-05-03', '', '')
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value) if value.is_integer() else value)
    return str(value).strip()


def label_of(value: Any, column: str, where: str) -> str | int | None:
    """The cell as a class, None where it is empty; truth values are written as JSON writes them.

    >>> label_of(True, "y", "row 1"), label_of(2.0, "y", "row 2"), label_of("nan", "y", "row 3"), label_of(" ", "y", "")
    ('true', 2, 'nan', None)

    Raises:
        LichenError: for a list or an object.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or _is_whole(value):
        return int(value)
    if isinstance(value, (list, tuple, dict)):
        raise LichenError(
            f"column {clipped(column, 60)!r} holds {_KINDS[type(value)]}, and a row has one class",
            where=where,
            fix="write one class in each row, or name another column in data.columns.label",
        )
    return text_of(value, column, where) or None


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()
