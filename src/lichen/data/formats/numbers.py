"""Reads cells as the numbers of a row, or refuses them by their column.

Numbers are taken as they stand, float32; nothing is scaled. A row is one list of numbers, equally long lists of them,
such as the rows of a picture, or several columns end to end, such as those of a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.visible import clipped

__all__ = ["check_shapes", "numbers_of_row"]

_KINDS: Mapping[type, str] = {dict: "an object", bytes: "bytes", int: "a number that is too large"}


def numbers_of_row(row: Mapping[str, Any], columns: Sequence[str], where: str) -> np.ndarray | None:
    """The numbers of a row; None where it has none.

    One column may hold nested lists; a picture ``(S, S)`` gets a channel, ``(1, S, S)``, as catalog data have it.

    Args:
        row: By column.
        columns: Those to be read, in order.
        where: File and row, for an error.

    Raises:
        LichenError: for what is no finite number, for lists of unequal length, and for several columns of which some
            are empty or hold lists of lists.

    >>> numbers_of_row({"a": "[1, 2]", "b": 3}, ["a", "b"], "row 1").tolist()
    [1.0, 2.0, 3.0]
    >>> numbers_of_row({"x": [[0, 0.5], [1, 2]]}, ["x"], "row 1").shape
    (1, 2, 2)
    """
    found = [_numbers(row.get(column), column, where) for column in columns]
    numbers = [x for x in found if x is not None]
    if not numbers:
        return None
    if len(columns) == 1:
        return numbers[0][None] if numbers[0].ndim in (0, 2) else numbers[0]
    for column, x in zip(columns, found, strict=True):
        if x is None or x.ndim > 1:
            what = "is empty" if x is None else "holds lists of lists"
            raise LichenError(
                f"column {clipped(column, 60)!r} {what}, and is joined to others",
                where=where,
                fix="write a number or a plain list into each, or name one column in data.columns.numbers",
            )
    return np.concatenate([x.reshape(-1) for x in numbers])


def check_shapes(rows: Iterable[np.ndarray | None], where: str) -> None:
    """Refuse rows of several shapes, which no one model reads.

    Args:
        rows: The numbers of each row.
        where: What they were read from.

    Raises:
        LichenError: naming two shapes.
    """
    shapes = dict.fromkeys(row.shape for row in rows if row is not None)
    if len(shapes) > 1:
        one, other = (" x ".join(map(str, shape)) for shape in list(shapes)[:2])
        raise LichenError(
            f"has rows of {one} numbers and rows of {other}",
            where=where,
            fix="write as many numbers in each row, in the same lists",
        )


def _numbers(value: Any, column: str, where: str) -> np.ndarray | None:
    """A cell as an array; a text is read as JSON, as a CSV has it."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _wrong(column, f"the text {clipped(value, 40)!r}", where) from None
    try:
        array = np.asarray(value)
    except ValueError:
        raise _wrong(column, "lists of unequal length", where) from None
    if array.dtype.kind not in "iuf":
        raise _wrong(column, _strange(value), where)
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not numbers.size or not np.isfinite(numbers).all():
        raise _wrong(column, "a number that is not finite" if numbers.size else "an empty list", where)
    return numbers


def _strange(value: Any) -> str:
    """The first thing in a cell that is no number, in words."""
    while isinstance(value, list | tuple) and value:
        value = next((one for one in value if isinstance(one, bool) or not isinstance(one, int | float)), value[0])
    if value is None:
        return "a list with nothing in one of its places"
    if isinstance(value, str | bool):
        return f"the {'text' if isinstance(value, str) else 'truth value'} {clipped(str(value), 40)!r}"
    return _KINDS.get(type(value), "what is no number")


def _wrong(column: str, what: str, where: str) -> LichenError:
    return LichenError(
        f"column {clipped(column, 60)!r} holds {what}, where numbers are read",
        where=where,
        fix="mend the row, or name another column in data.columns.numbers",
    )
