"""Loads rows from any source: :func:`load_records`.

A name is a catalog entry, a data set of another package, a local file or folder, or a hub id; what comes out is always
a list of :class:`Record`, so that nothing behind this file knows where rows came from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lichen.core.errors import LichenError
from lichen.core.visible import clipped, listed
from lichen.data.chat.messages import messages_of
from lichen.data.chat.preference_rows import answers_of, rating_of
from lichen.data.formats.cells import label_of, name_of, text_of, time_of
from lichen.data.formats.numbers import check_shapes, numbers_of_row
from lichen.data.sources import files
from lichen.data.sources.catalog import CATALOG, fetch_entry, looks_like_hub_id
from lichen.data.sources.datasets import declared_datasets, read_dataset
from lichen.data.sources.entries import near_names
from lichen.data.sources.readers import READERS
from lichen.data.sources.record import Record

__all__ = ["PREFERENCES", "Record", "load_records", "records_of"]

ROLES = ("client", "text", "prompt", "completion", "messages", "numbers", "label", "group", "time")
"""What a column can be used as; ``completion`` is the text that follows a prompt, ``numbers`` stands for a text, and
``time`` says when a row was written."""

PREFERENCES = ("chosen", "rejected", "rating")
"""Roles of preferences: an answer, one that was liked less, and how the answer was rated."""

PATH_CLIENTS = ("auto", "file", "folder", "none")

_TEXTS = ("text", "prompt", "completion")

Columns = Mapping[str, str | Sequence[str]]
"""The user's column for each role, or several that are joined in order."""


def load_records(
    name: str,
    *,
    columns: Columns | None = None,
    path_client: str = "file",
    say: Callable[[str], None] | None = None,
    unread: Collection[str] = PREFERENCES,
    empty: Literal["drop", "keep"] = "drop",
    but: Collection[Path] = (),
    client_files: dict[str, set[Path]] | None = None,
) -> list[Record]:
    """Load rows from a catalog entry, a local file, a folder of files or a hub data set.

    A role without a column of its own uses the column that bears the role's name, if there is one.

    Args:
        name: Catalog name; name of a data set that another package declares; a ``.jsonl``, ``.json``, ``.csv``,
            ``.tsv`` or ``.parquet`` file, also packed with gzip; a folder of such files; or a hub id, of which the
            ``train`` split is read.
        columns: The user's column for each role of :data:`ROLES` and :data:`PREFERENCES`. Several are joined in order:
            texts with an empty line between them, conversations and numbers end to end.
        path_client: The client of rows without a client column: the ``file`` (its name without ending),
            the ``folder`` it lies in, ``none``, or ``auto``: by :func:`lichen.data.sources.files.owners_of_files`.
        say: Called with a line for the user, such as the number of empty rows that were dropped.
        unread: Roles nobody asks for; a column that bears such a role's name is no matter.
        empty: What becomes of rows without text: a caller who keeps them can count them.
        but: Files of a folder that are not read; all others have the clients that they have beside these.
        client_files: Gets the files in which each client has rows.

    Raises:
        LichenError: if there is nothing of this name, a file is damaged or empty, or a column is missing.
    """
    columns = dict(columns or {})
    for role in columns:
        if role not in (*ROLES, *PREFERENCES):
            every = ", ".join((*ROLES, *PREFERENCES))
            raise LichenError(f"unknown role {role!r}", where=f"data.columns.{role}", fix=f"roles: {every}")
    if path_client not in PATH_CLIENTS:
        raise LichenError(f"unknown choice {path_client!r}", where="path_client", fix=f"use {PATH_CLIENTS}")
    if name in CATALOG:
        return _from_catalog(name, columns, say)
    declared = declared_datasets()
    if name in declared:
        return read_dataset(declared[name], _single(name, columns))
    path = Path(name).expanduser()
    if path.exists():
        made: list[Record] = []
        found = files.data_files(path)
        owners = files.owners_of_files(path, found) if path_client == "auto" else {}
        tables = [(file, files.read_rows(file)) for file in found if file not in but]
        # One table for the column check: a key that only some files carry is still a column.
        known = _resolve(columns, _names(row for _, rows in tables for row in rows), where=str(path), unread=unread)
        for file, rows in tables:
            client = (
                owners[file] if owners else {"file": file.stem, "folder": file.parent.name, "none": ""}[path_client]
            )
            new = _records(rows, known, client, str(file))
            made += new
            if client_files is not None:
                for name in {record.client for record in new}:
                    client_files.setdefault(name, set()).add(file)
    elif looks_like_hub_id(name):
        rows = files.read_hub(name)
        known = _resolve(columns, _names(rows), where=name, unread=unread)
        made = _records(rows, known, "", name)
    else:
        raise LichenError(
            f"no such file or folder {name!r}",
            where="data.name",
            fix=f"check the path, or use one of: {', '.join([near_names(name, 'data'), *sorted(declared)])}",
        )
    records = [r for r in made if _holds_something(r)]
    what = "numbers" if "numbers" in known else "text"
    if not records:
        raise LichenError(f"holds no row with {what}", where=name, fix=f"check the file and data.columns.{what}")
    if "numbers" in known:
        check_shapes((record.features for record in records), name)
    if empty == "keep":
        return made
    if len(made) > len(records) and say is not None:
        say(f"{name}: {len(made) - len(records)} rows without {what} were dropped")
    return records


def records_of(
    rows: Sequence[Mapping[str, Any]], columns: Columns, *, client: str = "", where: str = "data"
) -> list[Record]:
    """Rows that were read already, as records; those without text are among them.

    Args:
        rows: Mappings by column.
        columns: The user's column, or columns, for each role.
        client: Whose they are where no column says so.
        where: What they were read from, for errors.

    Raises:
        LichenError: if a column is missing, or a cell is not what its role needs.
    """
    requested = {name for some in columns.values() for name in ((some,) if isinstance(some, str) else some)}
    unread = tuple(role for role in ("label", *PREFERENCES) if role not in columns)
    known = _resolve(columns, list(dict.fromkeys([*_names(rows), *requested])), where=where, unread=unread)
    return _records(rows, known, client, where)


def _records(
    rows: Iterable[Mapping[str, Any]], known: Mapping[str, tuple[str, ...]], client: str, where: str
) -> list[Record]:
    return [_record(row, known, client, f"{where}, row {i}") for i, row in enumerate(rows, start=1)]


def _from_catalog(name: str, columns: Columns, say: Callable[[str], None] | None) -> list[Record]:
    if name not in READERS:
        raise LichenError(f"{name!r} is a model", where="data.name", fix=f"data: {near_names('', 'data')}")
    single = _single(name, columns)
    return READERS[name](fetch_entry(name, say=say), single)


def _single(name: str, columns: Columns) -> dict[str, str]:
    """One column for each role.

    Raises:
        LichenError: if a role has several.
    """
    single = {role: column for role, column in columns.items() if isinstance(column, str)}
    if len(single) < len(columns):
        role = next(role for role in columns if role not in single)
        raise LichenError(f"{name} joins no columns", where=f"data.columns.{role}", fix="name one column")
    return single


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(row))
    return list(seen)


def _resolve(
    columns: Columns, names: Sequence[str], *, where: str, unread: Collection[str]
) -> dict[str, tuple[str, ...]]:
    requested = {role: (some,) if isinstance(some, str) else tuple(some) for role, some in columns.items()}
    have = set(names)
    for role, several in requested.items():
        if role in ("client", "label", "group", "time", "rating") and len(several) != 1:
            raise LichenError("is one column", where=f"data.columns.{role}", fix="name one")
        for column in several:
            if column not in have:
                raise LichenError(
                    f"{where} has no column {clipped(column, 60)!r}",
                    where=f"data.columns.{role}",
                    fix=f"columns are: {listed(names, near=column) or 'none, it is empty'}",
                )
    known = {role: (role,) for role in (*ROLES, *PREFERENCES) if role in have and role not in unread} | requested
    if "numbers" in requested:
        if read := next((role for role in (*_TEXTS, "messages") if role in requested), None):
            raise LichenError(
                "a row is numbers or a text, not both",
                where=f"data.columns.{read}",
                fix="remove one of the two columns",
            )
        return {role: some for role, some in known.items() if role not in (*_TEXTS, "messages")}
    if {"text", "completion", "messages", "chosen"} & known.keys():
        known.pop("numbers", None)
    if "chosen" in known:
        return {role: some for role, some in known.items() if role not in ("text", "completion", "messages")}
    if "messages" in requested:
        # Conversations may lie in columns called prompt and completion, which then hold no texts.
        known = {role: some for role, some in known.items() if role in requested or role not in _TEXTS}
    if "completion" in columns and "text" not in columns:
        known.pop("text", None)
    if "text" in columns:
        known.pop("completion", None)
    if not {"text", "completion", "messages", "numbers"} & known.keys():
        if not names:
            raise LichenError("is empty", where=where, fix="give at least one row")
        raise LichenError(
            f"{where} has no column 'text'",
            where="data.columns.text",
            fix=f"name the column to learn from; columns are: {listed(names, near='text')}",
        )
    return known


def _record(row: Mapping[str, Any], known: Mapping[str, tuple[str, ...]], client: str, where: str) -> Record:
    pair = answers_of(row, known, where) if "chosen" in known else None

    def text(role: str) -> str:
        return "\n\n".join(filter(None, (text_of(row.get(column), column, where) for column in known.get(role, ()))))

    def name(role: str) -> str:
        return "".join(name_of(row.get(column), column, where) for column in known.get(role, ()))

    return Record(
        client=name("client") or client,
        text=text("text") or text("completion") if pair is None else pair.chosen,
        prompt=text("prompt") if pair is None else pair.prompt,
        label=next((label_of(row.get(column), column, where) for column in known.get("label", ())), None),
        messages=tuple(
            turn for column in known.get("messages", ()) for turn in messages_of(row.get(column), f"{where}, {column}")
        )
        if pair is None
        else pair.messages,
        group=name("group"),
        time=next((time_of(row.get(column)) for column in known.get("time", ())), ""),
        features=numbers_of_row(row, known["numbers"], where) if "numbers" in known else None,
        rejected="" if pair is None else pair.rejected,
        rating=next((rating_of(row.get(column), column, where) for column in known.get("rating", ())), None),
    )


def _holds_something(record: Record) -> bool:
    return bool(record.text or record.messages or record.features is not None)
