"""The one way to load rows, whatever they come from: :func:`load_records`.

A name is a catalog entry, a local file or folder, or a hub id; what comes out is always a list of
:class:`Record`, so that nothing behind this file knows where rows came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.data import files
from lichen.data.catalog import CATALOG, fetch, looks_like_hub_id
from lichen.data.entries import near_names
from lichen.data.readers import READERS
from lichen.data.record import Record

__all__ = ["ROLES", "Record", "load_records"]

ROLES = ("client", "text", "prompt", "completion", "messages", "label", "group")
"""What a column can be used as; ``completion`` is the text that follows a prompt."""

PATH_CLIENTS = ("file", "folder", "none")


def load_records(
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    path_client: str = "file",
    say: Callable[[str], None] | None = None,
) -> list[Record]:
    """Load rows from a catalog entry, a local file, a folder of files or a hub data set.

    A role without a column of its own uses the column that bears the role's name, if there is one.

    Args:
        name: Catalog name; a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; a folder of such
            files; or a hub id, of which the ``train`` split is read.
        columns: The user's column for each role of :data:`ROLES`.
        path_client: The client of rows without a client column: the ``file`` (its name without ending),
            the ``folder`` it lies in, or ``none``.
        say: Called with a line for the user, such as the number of empty rows that were dropped.

    Raises:
        LichenError: if there is nothing of this name, a file is damaged or empty, or a column is missing.
    """
    columns = dict(columns or {})
    for role in columns:
        if role not in ROLES:
            raise LichenError(f"unknown role {role!r}", where=f"data.columns.{role}", fix=f"roles: {', '.join(ROLES)}")
    if path_client not in PATH_CLIENTS:
        raise LichenError(f"unknown choice {path_client!r}", where="data.path_client", fix=f"use {PATH_CLIENTS}")
    if name in CATALOG:
        return _from_catalog(name, columns, say)
    path = Path(name).expanduser()
    if path.exists():
        records: list[Record] = []
        empty = 0
        tables = [(file, files.read_rows(file)) for file in files.data_files(path)]
        # One table for the column check: a key that only some files carry is still a column.
        known = _resolve(columns, _names(row for _, rows in tables for row in rows), where=str(path))
        for file, rows in tables:
            client = {"file": file.stem, "folder": file.parent.name, "none": ""}[path_client]
            made = [_record(row, known, client, f"{file}, row {i}") for i, row in enumerate(rows, start=1)]
            kept = [r for r in made if _holds_something(r)]
            empty += len(made) - len(kept)
            records += kept
    elif looks_like_hub_id(name):
        rows = files.read_hub(name)
        known = _resolve(columns, _names(rows), where=name)
        made = [_record(row, known, "", f"{name}, row {i}") for i, row in enumerate(rows, start=1)]
        records = [r for r in made if _holds_something(r)]
        empty = len(made) - len(records)
    else:
        raise LichenError(
            f"no such file or folder {name!r}",
            where="data.name",
            fix=f"check the path, or use one of: {near_names(name, 'data')}",
        )
    if not records:
        raise LichenError("holds no row with text", where=name, fix="check the file and data.columns.text")
    if empty and say is not None:
        say(f"{name}: {empty} rows without text were dropped")
    return records


def _from_catalog(name: str, columns: Mapping[str, str], say: Callable[[str], None] | None) -> list[Record]:
    if name not in READERS:
        raise LichenError(f"{name!r} is a model", where="data.name", fix=f"data: {near_names('', 'data')}")
    return READERS[name](fetch(name, say=say), columns)


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(row))
    return list(seen)


def _resolve(columns: Mapping[str, str], names: Sequence[str], *, where: str) -> dict[str, str]:
    for role, column in columns.items():
        if column not in names:
            raise LichenError(
                f"{where} has no column {column!r}",
                where=f"data.columns.{role}",
                fix=f"columns are: {', '.join(names) or 'none, it is empty'}",
            )
    known = {role: role for role in ROLES if role in names} | dict(columns)
    if "completion" in columns and "text" not in columns:
        known.pop("text", None)
    if "text" in columns:
        known.pop("completion", None)
    if not {"text", "completion", "messages"} & known.keys():
        if not names:
            raise LichenError("is empty", where=where, fix="give at least one row")
        raise LichenError(
            f"{where} has no column 'text'",
            where="data.columns.text",
            fix=f"name the column to learn from; columns are: {', '.join(names)}",
        )
    return known


def _record(row: Mapping[str, Any], known: Mapping[str, str], client: str, where: str) -> Record:
    def cell(role: str) -> str:
        value = row.get(known[role]) if role in known else None
        return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)

    return Record(
        client=cell("client") or client,
        text=(cell("text") or cell("completion")).strip(),
        prompt=cell("prompt").strip(),
        label=_label(row.get(known["label"])) if "label" in known else None,
        messages=_messages(row.get(known["messages"]), where) if "messages" in known else (),
        group=cell("group"),
    )


def _label(value: object) -> str | int | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, int) else str(value)


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if value is None or value == "":
        return ()
    try:
        turns = json.loads(value) if isinstance(value, str) else value
        made = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    except (ValueError, TypeError, KeyError):
        made = ({"role": "", "content": None},)
    for turn in made:
        if turn["role"] not in ("system", "user", "assistant", "tool") or not isinstance(turn["content"], str):
            raise LichenError(
                "messages must be a list of turns with a known role and a text as content",
                where=where,
                fix='write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            )
    return made


def _holds_something(record: Record) -> bool:
    return bool(record.text or record.messages)
