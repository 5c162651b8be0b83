"""Draws methods under several conditions, as a grid of what each reached.

A comparison's rows are called ``method@level``. Here a method is a line and a level a place, so that the eye
finds where help begins to matter.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lichen.core.files.durable import write_atomic
from lichen.present.charts.fonts import drawable
from lichen.present.compare import ComparisonRow, Spread
from lichen.present.units import score_text

__all__ = ["by_level", "levels_markdown", "levels_png"]

# Okabe and Ito's palette without its yellow; told apart also by readers who see few colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES = ("-", "--", ":")
_GREY = "#555555"


def by_level(rows: Sequence[ComparisonRow]) -> dict[str, dict[str, ComparisonRow]]:
    """Rows by method and level, methods in the order they first come.

    >>> rows = [ComparisonRow(method=method) for method in ("a@few", "b@few", "a@many")]
    >>> {method: list(levels) for method, levels in by_level(rows).items()}
    {'a': ['few', 'many'], 'b': ['few']}
    """
    found: dict[str, dict[str, ComparisonRow]] = {}
    for row in rows:
        method, _, level = row.method.partition("@")
        found.setdefault(method, {})[level] = row
    return found


def levels_markdown(rows: Sequence[ComparisonRow], levels: Sequence[str]) -> str:
    """A line a method, a column a level: mean ± deviation over seeds, the worst decile in brackets.

    The best mean of a column is bold.
    """
    grid = by_level(rows)
    metric = next((row.metric for row in rows if row.metric), "score")
    higher = next((row.higher_is_better for row in rows if row.metric), True)
    best = {level: _best(grid, level, higher) for level in levels}
    lines = [f"| {metric} | " + " | ".join(levels) + " |", "|---|" + "---:|" * len(levels)]
    for method, at in grid.items():
        cells = []
        for level in levels:
            text = _cell(at.get(level))
            cells.append(f"**{text}**" if best[level] == method else text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _best(grid: dict[str, dict[str, ComparisonRow]], level: str, higher: bool) -> str | None:
    values = {m: at[level].value for m, at in grid.items() if level in at}
    means = {m: value.mean for m, value in values.items() if value is not None}
    return (max if higher else min)(means, key=lambda m: means[m]) if len(means) > 1 else None


def _cell(row: ComparisonRow | None) -> str:
    if row is None or row.value is None:
        return "-"
    worst = f" ({score_text(row.worst.mean)})" if row.worst is not None else ""
    deviation = f" ± {row.value.std:.2g}" if row.value.std is not None else ""
    return f"{score_text(row.value.mean)}{deviation}{worst}"


def levels_png(rows: Sequence[ComparisonRow], levels: Sequence[str], path: Path, *, title: str = "") -> Path | None:
    """Draw a line a method over the levels: the mean on the left, the worst decile on the right.

    Args:
        rows: As :func:`lichen.present.compare.comparison_rows` gives them.
        levels: In order.
        path: The file.
        title: Above the picture.

    Returns:
        The file; None where nothing is finished.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = {m: at for m, at in by_level(rows).items() if any(row.value is not None for row in at.values())}
    if not grid:
        return None
    first = next(row for row in rows if row.metric)
    figure = Figure(figsize=(11.5, max(4.4, 1.2 + 0.24 * len(grid))), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts = {"value": "mean over clients", "worst": "worst decile of clients"}
    # Clients that share one test set have no worst tenth.
    parts = {p: label for p, label in parts.items() if any(getattr(r, p) for at in grid.values() for r in at.values())}
    both = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, (part, label) in zip(both, parts.items(), strict=True):
        for i, (method, at) in enumerate(grid.items()):
            offset = 0.5 * (i / (len(grid) - 1) - 0.5) if len(grid) > 1 else 0.0
            _line(axes, i, method, [getattr(at[lev], part) if lev in at else None for lev in levels], offset)
        axes.set_xticks(range(len(levels)), levels)
        axes.set_title(label, fontsize=10, color=_GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#BBBBBB")
        axes.tick_params(colors=_GREY, labelsize=9)
        axes.tick_params(axis="x", rotation=30 if max(map(len, levels)) > 6 else 0)
        axes.grid(True, color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)
    way = "higher" if first.higher_is_better else "lower"
    both[0].set_ylabel(f"{first.metric} ({way} is better)", color=_GREY)
    handles, legend_labels = both[0].get_legend_handles_labels()
    figure.legend(handles, legend_labels, loc="outside right center", frameon=False, fontsize=9)
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=12, fontweight="bold")
    data = io.BytesIO()
    # No software name and no date: equal data give equal bytes.
    figure.savefig(data, format="png", metadata={"Software": None})
    write_atomic(path, data.getvalue())
    return path


def _line(axes: Any, i: int, method: str, values: Sequence[Spread | None], offset: float) -> None:
    """Methods stand beside each other at a level, and a line ends where its next level was not run."""
    axes.errorbar(
        [x + offset for x in range(len(values))],
        [math.nan if value is None else value.mean for value in values],
        yerr=[math.nan if value is None else value.std or 0.0 for value in values],
        color=_COLOURS[i % len(_COLOURS)],
        marker=_SHAPES[i % len(_SHAPES)],
        linestyle=_LINES[(i // len(_COLOURS)) % len(_LINES)],
        markersize=6,
        linewidth=1.4,
        elinewidth=1.0,
        capsize=2.5,
        markeredgecolor="white",
        label=(method if drawable(method) else f"method {i + 1}").replace("$", r"\$"),
    )
