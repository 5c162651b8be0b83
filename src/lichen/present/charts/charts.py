"""Draws a run: learning curves, and each client's gain.

The second picture is a dumbbell plot: one row a client, alone and federated joined by a line whose
colour says who is better off. Pairs sorted by gain show at a glance whether a better mean was paid
for by a few.

References:
    Cleveland, McGill. "Graphical Perception: Theory, Experimentation, and Application to the
    Development of Graphical Methods". Journal of the American Statistical Association 79(387), 1984.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.present.charts.canvas import GREY, figure_of, plain, quiet, run_name, save_png, title_of
from lichen.present.charts.fonts import drawable, drawing
from lichen.present.column_names import column_title
from lichen.present.summary import share_gaining, stronger_alone
from lichen.present.trace import Event, lr_name, read_trace

if TYPE_CHECKING:
    pass

__all__ = ["clients_png", "curves_png"]

# Okabe and Ito's palette, told apart also by readers who see few colours.
_COLUMN_COLOURS = {
    **{"federated": "#0072B2", "alone": "#E69F00", "alone_best": "#D55E00"},
    **{"pooled": "#009E73", "base": "#999999"},
}
_MORE_COLOURS = ("#CC79A7", "#56B4E9", "#B39B00", "#D55E00")
_DASHES = ("-", "--", ":", "-.")
_BEST_ROUND = "the round that was kept"
_NAMED_ROWS = 60
"""Rows up to which every client's name is legible."""


def _series(events: Sequence[Event], metric: str) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
    """Rounds and finite values by (column, grid), in order of appearance."""
    found: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for event in events:
        value = event.report.metrics.get(metric, math.nan)
        if math.isfinite(value):
            rounds, values = found.setdefault((event.column, event.grid), ([], []))
            rounds.append(event.report.round)
            values.append(value)
    return found


def curves_png(folder: Path) -> Path | None:
    """Draw training and validation loss by round, a line for each column and grid point.

    Args:
        folder: The run's folder, with its ``trace.jsonl``.

    Returns:
        ``folder/curves.png``; None where no round has a finite loss.

    Raises:
        LichenError: if the trace is damaged.
    """
    folder = Path(folder)
    events = read_trace(folder)
    panels = [
        (series, label)
        for series, label in (
            (_series(events, "loss"), "training loss (mean per token or row)"),
            (_series(events, "valid"), "validation loss (mean per token or row)"),
        )
        if series
    ]
    if not panels:
        return None
    with drawing([run_name(folder)]):
        return _curves(folder, events, panels)


def _curves(
    folder: Path,
    events: Sequence[Event],
    panels: Sequence[tuple[dict[tuple[str, str], tuple[list[int], list[float]]], str]],
) -> Path:
    from matplotlib.ticker import MaxNLocator

    best = _best_rounds(folder)
    columns = list(dict.fromkeys(event.column for event in events))
    more = [column for column in columns if column not in _COLUMN_COLOURS]
    colours = {**_COLUMN_COLOURS, **{c: _MORE_COLOURS[i % len(_MORE_COLOURS)] for i, c in enumerate(more)}}
    grids = {c: list(dict.fromkeys(e.grid for e in events if e.column == c)) for c in columns}
    figure = figure_of(5.4 * len(panels) + 0.6, 4.4)
    for place, (series, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for (column, grid), (rounds, values) in series.items():
            axes.plot(
                rounds,
                values,
                color=colours[column],
                linestyle=_DASHES[grids[column].index(grid) % len(_DASHES)],
                marker="o",
                markersize=8 if len(rounds) == 1 else 3.5 if len(rounds) <= 40 else 0,
                linewidth=1.8,
                label=plain(f"{column_title(column)}  {grid}".strip()),
            )
            if len(rounds) == 1:  # a curve of one point is that point, and what it is
                axes.annotate(
                    f"{values[0]:.4g}",
                    (rounds[0], values[0]),
                    xytext=(8, 4),
                    textcoords="offset points",
                    fontsize=9,
                    color=colours[column],
                )
            if best.get((column, grid)) in rounds:
                at = rounds.index(best[column, grid])
                axes.scatter(
                    rounds[at],
                    values[at],
                    s=90,
                    facecolors="none",
                    edgecolors=colours[column],
                    zorder=5,
                    label=_BEST_ROUND,
                )
        axes.set_xlabel("round", color=GREY)
        axes.set_ylabel(plain(label), color=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        quiet(axes)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(
        handles=list(handles.values()),
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(plain(title_of(folder)), fontsize=13, fontweight="bold")
    return save_png(figure, folder / "curves.png")


def _best_rounds(folder: Path) -> dict[tuple[str, str], int]:
    """The round that was kept, by (column, grid), of a finished run."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        best_rounds = {
            name: training["kept"] for name, training in summary["training"].items() if training["kept"] is not None
        }
        return {(name, lr_name(summary["extra"][f"lr.{name}"])): at for name, at in best_rounds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _number(client: Mapping[str, Any], key: str) -> float:
    value = client.get(key)
    return math.nan if value is None else float(value)


def clients_png(folder: Path, clients: Sequence[Mapping[str, Any]], metric: str, higher_is_better: bool) -> Path | None:
    """Draw who gained: one row a client, alone against federated, sorted by gain, the bare model faint.

    Args:
        folder: The run's folder.
        clients: Mappings with ``name`` and the scores ``base``, ``alone`` or ``alone_best``, ``federated``; of the
            two the stronger is drawn, and clients without a finite one and ``federated`` are left out.
        metric: What the scores are, with its unit if it has one.
        higher_is_better: What gaining means.

    Returns:
        ``folder/clients.png``; None where no client has both scores.
    """
    folder = Path(folder)
    sign = 1.0 if higher_is_better else -1.0
    known = {
        name: [_number(c, name) for c in clients]
        for name in ("alone", "alone_best")
        if any(c.get(name) is not None for c in clients)
    }
    against = stronger_alone(known, higher_is_better) or "alone"
    pairs = [
        (sign * (_number(c, "federated") - _number(c, against)), str(c["name"]), {**c, "line": line})
        for line, c in enumerate(clients, start=1)
        if math.isfinite(_number(c, "federated")) and math.isfinite(_number(c, against))
    ]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: (pair[0], pair[1]))
    with drawing([run_name(folder), *(name for _, name, _ in pairs[:_NAMED_ROWS])]):
        return _clients(folder, pairs, against, metric, higher_is_better)


def _clients(
    folder: Path,
    pairs: Sequence[tuple[float, str, Mapping[str, Any]]],
    against: str,
    metric: str,
    higher_is_better: bool,
) -> Path:
    alone, federated = ([_number(c, key) for *_, c in pairs] for key in (against, "federated"))
    base = [_number(c, "base") for *_, c in pairs]
    named = len(pairs) <= _NAMED_ROWS
    row_inches = 0.24 if named else max(0.02, 9.0 / len(pairs))
    figure = figure_of(7.6, max(3.2, 1.9 + row_inches * len(pairs)))
    axes = figure.add_subplot()
    dot = 34.0 if named else max(5.0, 1600.0 / len(pairs))
    rows = list(range(len(pairs)))
    tints = ["#7FB3D5" if gain > 0 else "#D55E00" if gain < 0 else "#BBBBBB" for gain, *_ in pairs]
    axes.hlines(rows, alone, federated, colors=tints, linewidth=2.0 if named else 0.8, zorder=2)
    if any(math.isfinite(value) for value in base):
        axes.scatter(base, rows, s=dot * 0.7, color="#CCCCCC", marker="|", label="bare model", zorder=1)
    axes.scatter(alone, rows, s=dot, color=_COLUMN_COLOURS[against], label=against, zorder=3)
    axes.scatter(federated, rows, s=dot, color=_COLUMN_COLOURS["federated"], label="federated", zorder=4)
    if named:
        names = [
            (name if len(name) <= 20 else f"{name[:18]}…") if drawable(name) else f"client {c['line']}"
            for _, name, c in pairs
        ]
        axes.set_yticks(rows, [plain(name) for name in names])
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(pairs)} clients, sorted by gain", color=GREY)
    axes.set_ylim(-0.8, len(pairs) - 0.2)
    axes.set_xlabel(plain(f"{metric} ({'higher' if higher_is_better else 'lower'} is better)"), color=GREY)
    quiet(axes)
    axes.grid(False, axis="y")
    share = share_gaining(alone, federated, higher_is_better)
    caption = (
        f"{100 * share:.0f} % of {len(pairs)} clients gain over {'training alone' if against == 'alone' else against}"
    )
    if named and not all(drawable(name) for _, name, _ in pairs):
        caption += "\nclient N: the Nth name in clients.csv, which no installed font can draw"
    figure.suptitle(f"{plain(title_of(folder))}\n{caption}", fontsize=12, fontweight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save_png(figure, folder / "clients.png")
