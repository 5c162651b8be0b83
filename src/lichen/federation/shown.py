"""Prints how the sites of a federation stand."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lichen.present.table import new_table
from lichen.present.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HEADS", "cells_of", "standing_table"]

HEADS = ("site", "there for", "heard", "clients", "rows", "round", "up", "down", "doing")


def cells_of(row: Mapping[str, Any], now: float) -> list[str]:
    """The cells of one site, in the order of :data:`HEADS`.

    Args:
        row: As a federation's status has it.
        now: Seconds of the epoch.
    """
    there = seconds_text(now - row["since"]) if "since" in row else "-"
    last = f"{seconds_text(now - row['last'])} ago" if row["there"] and "last" in row else "-"
    counts = [f"{row[key]:,}" if key in row else "-" for key in ("clients", "rows")]
    done = f"{row['round']} of {row['rounds']}" if "round" in row and "rounds" in row else "-"
    sent = [bytes_text(row[key]) if key in row else "-" for key in ("bytes_up", "bytes_down")]
    return [str(row["site"]), there, last, *counts, done, *sent, str(row["doing"])]


def standing_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each site.

    Args:
        rows: As a federation's status has them.
    """
    from rich.text import Text

    table = new_table(None, *HEADS, numbers=HEADS[1:8])
    for row in rows:
        table.add_row(*map(Text, cells_of(row, time.time())), style="" if row["there"] else "dim")
    return table
