"""A client's own values in a file beside its private state: a line a round, which a person can read."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic

__all__ = ["ValueNotes", "read_notes"]

_HEAD = ["round", "value"]


@final
@dataclass(frozen=True, slots=True)
class ValueNotes:
    """A folder of files ``000003.csv``, one a client by its number in the roster; nobody else can read them.

    Args:
        folder: Made when it is first needed.
    """

    folder: Path

    def note(self, client: int, round_: int, value: float) -> None:
        """Keep a value; one of the same round, and those of later ones, are replaced: a run goes on from there.

        Raises:
            LichenError: if the file is damaged.
        """
        path = self.folder / f"{client:06d}.csv"
        before = read_notes(path) if path.exists() else {}
        lines = {at: x for at, x in before.items() if at < round_} | {round_: value}
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([_HEAD, *([at, repr(x)] for at, x in lines.items())])
        write_atomic(path, out.getvalue().encode())


def read_notes(path: Path) -> dict[int, float]:
    """A client's values by round.

    Raises:
        LichenError: if the file is missing or damaged.
    """
    try:
        head, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        found = {int(at): float(value) for at, value in rows}
        if head != _HEAD or not all(map(math.isfinite, found.values())):
            raise ValueError
    except FileNotFoundError:
        raise LichenError("no such file", where=str(path)) from None
    except (OSError, ValueError):
        raise LichenError("is damaged", where=str(path), fix="remove it; values of rounds to come are kept") from None
    return found
