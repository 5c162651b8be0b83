"""Reads rows from Parquet as plain values.

Bytes that are UTF-8 are text, dates and exact decimals are written out, dictionary-encoded columns come as
their values.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.visible import clipped

__all__ = ["parquet_rows"]

_BATCH = 1024


def parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a Parquet file, read in batches.

    Raises:
        LichenError: if it is none, is damaged, or a column's name stands twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise LichenError(
                    f"has two columns named {clipped(twice, 60)!r}",
                    where=str(path),
                    fix="give every column a name of its own",
                )
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    yield {name: plain(value) for name, value in row.items()}
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise LichenError(
            f"is not a readable parquet file: {clipped(why, 200)}", where=str(path), fix="write it again as Parquet"
        ) from None


def plain(value: Any) -> Any:
    """A cell as text, number, truth value, list, mapping or None; bytes that are no text stay bytes."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    return str(value) if isinstance(value, (datetime.timedelta, uuid.UUID)) else repr(value)
