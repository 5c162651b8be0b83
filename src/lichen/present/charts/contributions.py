"""Draws what each client contributed: a bar a client, the largest on top, those below zero in another colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lichen.present.charts.canvas import GREY, figure_of, plain, quiet, run_name, save_png, title_of
from lichen.present.charts.fonts import drawable, drawing

__all__ = ["contributions_png"]

_GIVES, _TAKES = "#0072B2", "#D55E00"  # of Okabe and Ito's palette
_NAMED = 60
"""Bars up to which every client's name is legible."""


def contributions_png(folder: Path, clients: Sequence[str], values: Sequence[float], about: str) -> Path | None:
    """Draw one bar a client.

    Args:
        folder: The run's folder.
        clients: Their names.
        values: What each contributed, in units of the loss.
        about: How that was found, in a few words.

    Returns:
        ``folder/contributions.png``; None without clients.
    """
    if not clients:
        return None
    order = sorted(range(len(clients)), key=lambda place: (values[place], clients[place]))
    with drawing([run_name(folder), *(clients[place] for place in order[-_NAMED:])]):
        named, rows = len(clients) <= _NAMED, range(len(clients))
        figure = figure_of(7.6, max(3.0, 1.7 + (0.24 * len(clients) if named else 9.0)))
        axes = figure.add_subplot()
        bars = [values[place] for place in order]
        axes.barh(rows, bars, height=0.7, color=[_TAKES if value < 0 else _GIVES for value in bars], zorder=2)
        axes.axvline(0.0, color=GREY, linewidth=0.8, zorder=3)
        if named:
            names = [clients[place] if drawable(clients[place]) else f"client {place + 1}" for place in order]
            axes.set_yticks(rows, [plain(name if len(name) <= 20 else f"{name[:18]}…") for name in names])
        else:
            axes.set_yticks([])
            axes.set_ylabel(f"{len(clients)} clients, sorted by value", color=GREY)
        axes.set_ylim(-0.8, len(clients) - 0.2)
        axes.set_xlabel("loss that its messages took away (a share of what the rounds gained)", color=GREY)
        quiet(axes)
        axes.grid(False, axis="y")
        below = sum(value < 0 for value in values)
        caption = f"{plain(about)}\n{below} of {len(clients)} clients below zero"
        figure.suptitle(f"{plain(title_of(folder))}: what each client contributed\n{caption}", fontsize=11)
        return save_png(figure, folder / "contributions.png")
