"""Draws a stream: every model on every period, and who was there when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lichen.present.charts.canvas import GREY, figure_of, plain, save_png
from lichen.present.charts.fonts import drawable, drawing
from lichen.present.units import score_text

__all__ = ["stream_png"]

_NAMED = 40
"""Clients up to which every name is legible."""

_NUMBERED = 12
"""Periods up to which a square has room for its score."""


def stream_png(path: Path, found: Mapping[str, Any], *, title: str) -> Path:
    """Draw the matrix R on the left, and the clients' rows by period on the right.

    Args:
        path: The picture's file.
        found: What ``periods.json`` holds.
        title: What the stream is called.
    """
    periods: Sequence[Mapping[str, Any]] = found["periods"]
    names = [str(one["name"]) for one in periods]
    clients = sorted({client for one in periods for client in one["clients"]})
    with drawing([title, *names, *clients[:_NAMED]]):
        size = max(3.4, 0.5 * len(names) + 2.0)
        figure = figure_of(2 * size + 2.0, max(size, min(0.2 * len(clients), 8.0) + 1.6))
        left, right = figure.subplots(1, 2)
        scores = np.array([[np.nan if x is None else x for x in row] for row in found["matrix"]], dtype=float)
        _squares(left, scores, names, ["start", *names], reverse=not found["higher_is_better"])
        left.set_xlabel("test rows of", color=GREY)
        left.set_ylabel("model in force after", color=GREY)
        left.set_title(f"{found['metric']}; a step below the diagonal: trained on", fontsize=9, color=GREY)
        rows = np.array([[one["clients"].get(client) or np.nan for one in periods] for client in clients], dtype=float)
        shown = [client if drawable(client) else f"client {at + 1}" for at, client in enumerate(clients)]
        short = [name if len(name) <= 20 else f"{name[:18]}…" for name in shown]
        _squares(right, rows, names, short if len(clients) <= _NAMED else [], numbered=False)
        right.set_title(f"rows that each of {len(clients)} clients trained on", fontsize=9, color=GREY)
        known = plain(title) if drawable(title) else "stream"
        figure.suptitle(f"{known}: {len(names)} periods", fontsize=11)
        return save_png(figure, path)


def _squares(
    axes: Any,
    values: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    reverse: bool = False,
    numbered: bool = True,
) -> None:
    """A grid of coloured squares, the better ones lighter."""
    axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="cividis_r" if reverse else "cividis")
    axes.set_xticks(range(len(columns)), [plain(name) for name in columns], rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows], fontsize=7)
    axes.tick_params(colors=GREY)
    if numbered and len(columns) <= _NUMBERED:
        middle = (np.nanmax(values) + np.nanmin(values)) / 2 if np.isfinite(values).any() else 0.0
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = (value < middle) != reverse
                axes.text(j, i, score_text(float(value)), ha="center", va="center", fontsize=6, color="wk"[not dark])
