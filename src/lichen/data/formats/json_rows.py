"""Reads rows from JSON: lines, one list, an object of rows or of columns.

A list is read value by value, so that neither its length nor a single line for all of it costs memory twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, final

from lichen.core.errors import LichenError
from lichen.core.visible import clipped, listed
from lichen.data.formats.encodings import MOST_LETTERS, lines_of, open_text

__all__ = ["json_rows", "line_rows"]

Row = Mapping[str, Any]

MOST_WHOLE = 1 << 28
"""Letters of an object that must be read whole."""

_CHUNK = 1 << 20
_BLANK = re.compile(r"[ \t\r\n\ufeff]*")
_LIST = 'write [{"text": "..."}, ...], or a row a line as .jsonl'


@final
class _TwiceError(ValueError):
    """A key stands twice in one object."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _TwiceError(f"the key {clipped(twice, 60)!r} stands twice in one object")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _fault(error: Exception, where: str) -> LichenError:
    if isinstance(error, RecursionError):
        return LichenError("is nested too deeply", where=where, fix="mend or delete it")
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return LichenError(f"is not valid JSON: {what}", where=where, fix="mend or delete it")


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise LichenError(f"is a {_kind(value)}, not an object", where=where, fix='write {"text": "..."}')
    return value


def _kind(value: Any) -> str:
    names = {list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def line_rows(path: Path) -> Iterator[Row]:
    """A row a line; blank lines are skipped. One list of rows is read as such.

    Raises:
        LichenError: naming the line.
    """
    with open_text(path) as file:
        if _first(file) == "[":
            yield from _list_rows(path, file)
            return
        for number, line in enumerate(lines_of(file, str(path)), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = _DECODER.decode(line.lstrip("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise _fault(error, where) from None
            yield _object(value, where)


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of one JSON value: a list of objects, an object that holds one, or an object of columns.

    Objects one after the other, as in JSONL, are read too.

    Raises:
        LichenError: if it holds no rows, or is damaged.
    """
    with open_text(path) as file:
        first = _first(file)
        if first == "":
            return
        if first == "[":
            yield from _list_rows(path, file)
            return
        text = file.read(MOST_WHOLE + 1).lstrip("\ufeff \t\r\n")
    if len(text) > MOST_WHOLE:
        raise LichenError(
            f"is one value of more than {MOST_WHOLE >> 20} million letters", where=str(path), fix="write it as .jsonl"
        )
    at, values = 0, []
    try:
        while at < len(text):
            value, at = _DECODER.raw_decode(text, at)
            values.append(value)
            at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, getattr(error, "pos", 0)) + 1
        raise _fault(error, f"{path}, line {line}" if isinstance(error, json.JSONDecodeError) else str(path)) from None
    if len(values) > 1:
        yield from (_object(value, f"{path}, row {number}") for number, value in enumerate(values, start=1))
    else:
        yield from _inside(values[0], str(path))


def _first(file: TextIO) -> str:
    """The first letter that is no blank, with the file back at its begin; empty where there is none."""
    found = ""
    while not found and (chunk := file.read(_CHUNK)):
        found = chunk.lstrip("\ufeff \t\r\n")[:1]
    file.seek(0)
    return found


def _list_rows(path: Path, file: TextIO) -> Iterator[Row]:
    """The objects of one list, one by one."""
    text, at, lines, ended, number = "", 0, 1, False, 0
    expected = "["

    def where() -> str:
        return f"{path}, line {lines + text.count(chr(10), 0, at)}"

    while True:
        at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text) and not ended:
            lines += text.count("\n")
            text, at = file.read(_CHUNK), 0
            ended = not text
            continue
        letter = text[at : at + 1]
        if expected == "end":
            if letter:
                raise LichenError("is not valid JSON: something follows the list", where=where(), fix=_LIST)
            return
        if letter == "]" and expected in ("value or ]", ", or ]"):
            expected, at = "end", at + 1
        elif expected == "[":
            expected, at = "value or ]", at + 1
        elif expected == ", or ]":
            if letter != ",":
                what = f"expected a comma, not {letter!r}" if letter else "the list is never closed"
                raise LichenError(f"is not valid JSON: {what}", where=where(), fix="mend it there")
            expected, at = "value", at + 1
        else:
            try:
                value, at = _DECODER.raw_decode(text, at)
            except RecursionError as error:
                raise _fault(error, where()) from None
            except ValueError as error:
                if ended or not _may_go_on(error, text):
                    raise _fault(error, where()) from None
                if len(text) - at > MOST_LETTERS:
                    raise LichenError(
                        f"holds a row of more than {MOST_LETTERS >> 20} million letters", where=where(), fix="cut it"
                    ) from None
                more = file.read(max(len(text) - at, _CHUNK))
                lines += text.count("\n", 0, at)
                text, at, ended = text[at:] + more, 0, not more
                continue
            number += 1
            yield _object(value, f"{path}, row {number}")
            expected = ", or ]"


def _may_go_on(error: ValueError, text: str) -> bool:
    """Whether the fault may only be that the rest was not read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 64


def _inside(whole: Any, where: str) -> Iterator[Row]:
    """The rows in one object: a list of objects under one of its keys, or a list for each column."""
    if not isinstance(whole, dict):
        raise LichenError("must be a list of objects", where=where, fix=_LIST)
    if isinstance(whole.get("columns"), list) and isinstance(whole.get("data"), list):
        names, tables = [str(name) for name in whole["columns"]], whole["data"]
        if all(isinstance(row, list) and len(row) == len(names) for row in tables):
            yield from (dict(zip(names, row, strict=True)) for row in tables)
            return
    lists = {key: value for key, value in whole.items() if isinstance(value, list)}
    of_rows = [key for key, value in lists.items() if all(isinstance(row, dict) for row in value)]
    by_index = {k: list(v.values()) for k, v in whole.items() if isinstance(v, dict)}
    if whole and len(lists) == len(whole) and len(of_rows) < len(lists):
        yield from _by_column(lists, where)
    elif len(of_rows) == 1:
        yield from (_object(row, f"{where}, row {i}") for i, row in enumerate(lists[of_rows[0]], start=1))
    elif len(of_rows) > 1:
        raise LichenError(
            f"holds several lists of rows: {listed(of_rows)}", where=where, fix="write each to a file of its own"
        )
    elif whole and len(by_index) == len(whole) and len({tuple(value) for value in whole.values()}) == 1:
        yield from _by_column(by_index, where)
    else:
        raise LichenError("must be a list of objects", where=where, fix=_LIST)


def _by_column(columns: Mapping[str, list[Any]], where: str) -> Iterator[Row]:
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        raise LichenError(
            f"has columns of unequal length ({min(lengths)} to {max(lengths)})", where=where, fix="make them equal"
        )
    yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
