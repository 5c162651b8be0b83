"""Draws quality against bytes, with the Pareto frontier of methods.

Two panels, bytes up and bytes down of a whole run, on logarithmic axes: methods differ by orders of
magnitude, and up is the dearer way on most lines. The staircase joins the methods that no other beats
in both quality and bytes (Pareto's frontier). Every point is told apart by number, colour and shape.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.core.files.durable import write_atomic
from lichen.present.charts.fonts import drawable
from lichen.present.compare import ComparisonRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

__all__ = ["frontier_png", "unbeaten"]

# Okabe and Ito's palette without its yellow, too light on white; told apart also by readers who see few colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_GREY = "#555555"


def unbeaten(points: Sequence[tuple[float, float]], *, higher: bool) -> tuple[int, ...]:
    """The points that no other beats in both, by rising cost.

    Args:
        points: ``(cost, quality)`` of each; less cost is better.
        higher: Whether more quality is better.

    >>> unbeaten([(1, 0.5), (2, 0.4), (3, 0.9)], higher=True)
    (0, 2)
    """
    sign = 1.0 if higher else -1.0
    found: list[int] = []
    best = -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[i][1] > best:
            found.append(i)
            best = sign * points[i][1]
    return tuple(found)


def frontier_png(rows: Sequence[ComparisonRow], path: Path, *, title: str = "") -> Path | None:
    """Draw quality against bytes, a numbered point a method, error bars one standard deviation over seeds.

    Args:
        rows: As :func:`lichen.present.compare.comparison_rows` gives them; those without quality or bytes are left out.
        path: The file.
        title: Above the picture.

    Returns:
        The file; None where there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.value is not None and row.train_up is not None and row.train_down is not None]
    if not shown:
        return None
    # Dollar signs would be read as mathematics.
    names = [
        f"{i + 1}  {row.method if drawable(row.method) else f'method {i + 1}'}".replace("$", r"\$")
        for i, row in enumerate(shown)
    ]
    height = max(4.4, 0.9 + 0.21 * len(shown))
    figure = Figure(figsize=(11.5, height), dpi=150, layout="constrained", facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)
    both = figure.subplots(1, 2, sharey=True)
    for axes, label, key in zip(both, ("sent up", "sent down"), ("train_up", "train_down"), strict=True):
        _panel(axes, shown, [float(getattr(row, key)) for row in shown], names)
        axes.set_xlabel(f"{label} in a whole run, all clients (bytes)", color=_GREY)
    way = "higher" if shown[0].higher_is_better else "lower"
    both[0].set_ylabel(f"{shown[0].metric} ({way} is better)", color=_GREY)
    handles, legend_labels = both[0].get_legend_handles_labels()
    figure.legend(handles, legend_labels, loc="outside right center", frameon=False, fontsize=8)
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=12, fontweight="bold")
    canvas.draw()
    figure.set_layout_engine("none")  # labels are placed on the panels as they now stand
    for axes in both:
        place_labels(axes)
    data = io.BytesIO()
    # No software name and no date: equal data give equal bytes.
    figure.savefig(data, format="png", metadata={"Software": None})
    write_atomic(path, data.getvalue())
    return path


def _panel(axes: Axes, rows: Sequence[ComparisonRow], bytes_N: Sequence[float], names: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    from lichen.present.units import bytes_text

    quality = [row.value.mean if row.value is not None else math.nan for row in rows]
    costs = [max(cost, 1.0) for cost in bytes_N]  # nothing sent has no place on a logarithmic axis
    front = unbeaten(list(zip(costs, quality, strict=True)), higher=rows[0].higher_is_better)
    axes.set_xscale("log")
    axes.margins(y=0.12)
    low, high = math.log10(min(costs)), math.log10(max(costs))
    half = max(0.6, (high - low) / 2 * 1.25)
    axes.set_xlim(10 ** ((low + high) / 2 - half), 10 ** ((low + high) / 2 + half))
    if high - low < 2:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # tens alone would be one tick or none
    axes.step(
        [costs[i] for i in front], [quality[i] for i in front], where="post", color="#BBBBBB", linewidth=1.2, zorder=1
    )
    bases = [row.base.mean for row in rows if row.base is not None]
    if bases:
        axes.axhline(sum(bases) / len(bases), color="#999999", linestyle="--", linewidth=1.0, label="bare model")
    for i, row in enumerate(rows):
        axes.errorbar(
            costs[i],
            quality[i],
            yerr=row.value.std if row.value is not None else None,
            fmt=_SHAPES[(i // len(_COLOURS)) % len(_SHAPES)],
            color=_COLOURS[i % len(_COLOURS)],
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.2,
            capsize=2.5,
            label=names[i],
            zorder=3,
        )
        axes.annotate(
            str(i + 1),
            (costs[i], quality[i]),
            textcoords="offset points",
            xytext=(0, 0),
            ha="center",
            va="center",
            fontsize=9,
            color=_COLOURS[i % len(_COLOURS)],
            fontweight="bold" if i in front else "normal",
            arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            zorder=4,
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: bytes_text(size)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.grid(True, color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def _spiral() -> Iterator[tuple[float, float]]:
    """Offsets in points, near ones first."""
    for ring in range(1, 40):
        radius = 5.0 + 5.0 * ring
        for step in range(16):
            angle = math.pi / 4 + 2 * math.pi * step / 16
            yield radius * math.cos(angle), radius * math.sin(angle)


def place_labels(axes: Axes) -> list[Bbox]:
    """Put every annotation of a drawn panel on the nearest free place, clear of points and of each other.

    Returns:
        The boxes of the labels, in pixels.
    """
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    notes = [child for child in axes.get_children() if isinstance(child, Annotation)]
    points = [axes.transData.transform(note.xy) for note in notes]
    scale = figure.dpi / 72
    occupied = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in points]
    for bar in (segment for container in axes.containers for lines in container[2] for segment in lines.get_segments()):
        (x, low), (_, high) = axes.transData.transform(bar)
        occupied.append(Bbox.from_bounds(x - 2 * scale, low, 4 * scale, high - low))
    inside = axes.get_window_extent(figure.canvas.get_renderer())
    placed: list[Bbox] = []
    for note, (x, y) in zip(notes, points, strict=True):
        wide, high = 7.0 * scale * len(note.get_text()), 10.0 * scale
        for right, up in _spiral():
            box = Bbox.from_bounds(x + right * scale - wide / 2, y + up * scale - high / 2, wide, high)
            free = not any(box.overlaps(other) for other in (*occupied, *placed))
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                break
        note.xyann = (right, up)
        placed.append(box)
    return placed
