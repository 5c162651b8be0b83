"""Read the user's own files, and hub data sets, as plain rows; every complaint names file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.data.entries import near_names

__all__ = ["Row", "data_files", "read_hub", "read_rows"]

Row = Mapping[str, Any]


def data_files(path: Path) -> list[Path]:
    """The file itself, or all readable files under a folder in name order.

    Raises:
        LichenError: if a folder has none.
    """
    if path.is_file():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.suffix.lower() in _READERS and f.is_file())
    if not found:
        raise LichenError("holds no data files", where=str(path), fix=f"put {', '.join(sorted(_READERS))} files in it")
    return found


def read_rows(path: Path) -> list[Row]:
    """All rows of one file; an empty file has none.

    Raises:
        LichenError: if the ending is unknown, or the file cannot be read as what it claims to be.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise LichenError(
            f"cannot read {path.suffix or 'files without an ending'}",
            where=str(path),
            fix=f"use one of: {', '.join(sorted(_READERS))}",
        )
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise LichenError(f"is not UTF-8 text (byte {error.start})", where=str(path), fix="save it as UTF-8") from None
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror or error}", where=str(path), fix="check the file") from None


def _jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_object(_json(line, f"{path}, line {number}"), f"{path}, line {number}"))
    return rows


def _json_file(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    whole = _json(text, str(path))
    if isinstance(whole, dict):
        lists = [v for v in whole.values() if isinstance(v, list)]
        if len(lists) != 1:
            raise LichenError("must be a list of objects", where=str(path), fix="write [{...}, {...}], or use .jsonl")
        whole = lists[0]
    if not isinstance(whole, list):
        raise LichenError("must be a list of objects", where=str(path), fix="write [{...}, {...}], or use .jsonl")
    return [_object(row, f"{path}, row {number}") for number, row in enumerate(whole, start=1)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise LichenError(f"is not valid JSON: {what}", where=where, fix="mend or delete it") from None
    except RecursionError:
        raise LichenError("is nested too deeply", where=where, fix="mend or delete it") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise LichenError(f"is a {type(value).__name__}, not an object", where=where, fix='write {"text": "..."}')
    return value


def _csv(path: Path) -> list[Row]:
    rows: list[Row] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                # DictReader puts surplus cells under None; a shorter row gets None cells, which read as empty.
                if None in row:
                    raise csv.Error("more cells than the first line has columns")
                rows.append(row)
        except csv.Error as error:
            raise LichenError(
                f"is not valid CSV: {error}",
                where=f"{path}, line {reader.reader.line_num}",
                fix="quote cells that hold commas or line breaks, or use .jsonl",
            ) from None
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        why = str(error).splitlines()[0]
        raise LichenError(f"is not a readable parquet file: {why}", where=str(path), fix="write it again") from None
    return rows


def read_hub(name: str) -> list[Row]:
    """The ``train`` split of a hub data set, through the optional package ``datasets``.

    Raises:
        LichenError: if the package is not installed, or the data set cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise LichenError(
            f"{name!r} is no catalog name and no local path, and hub data need the package datasets",
            where="data.name",
            fix=f"pip install 'lichen[hub]', or use one of: {near_names(name, 'data')}",
        ) from None
    try:
        return list(load_dataset(name, split="train"))
    except Exception as error:
        # The hub client raises many kinds; the user needs its first line, not its traceback.
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise LichenError(
            f"the hub data set {name!r} cannot be loaded: {why}", where="data.name", fix="check the name and network"
        ) from None


_READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".csv": _csv,
    ".json": _json_file,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
