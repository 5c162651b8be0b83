"""The picture of contributions: a bar a client, in order, under any name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lichen.present.charts import contributions
from lichen.present.charts.contributions import contributions_png


def test_bars_stand_in_order_and_those_below_zero_have_another_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    figure_of = contributions.figure_of

    def figure(width: float, height: float) -> Any:
        made.append(figure_of(width, height))
        return made[-1]

    monkeypatch.setattr(contributions, "figure_of", figure)
    names = ["$5 clinic", "\U000f0000", "a name that is far too long for a picture", "bo"]
    assert contributions_png(tmp_path, names, [0.5, -0.25, 0.0, 1.0], "gtg") == tmp_path / "contributions.png"
    (axes,) = made[0].axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == sorted(widths) == [-0.25, 0.0, 0.5, 1.0]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert len(set(colours)) == 2
    assert colours[0] not in colours[1:]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["client 2", "a name that is far…", "\\$5 clinic", "bo"]
    assert "1 of 4 clients below zero" in made[0].get_suptitle()
    first = (tmp_path / "contributions.png").read_bytes()
    contributions_png(tmp_path, names, [0.5, -0.25, 0.0, 1.0], "gtg")
    assert (tmp_path / "contributions.png").read_bytes() == first


def test_many_clients_are_drawn_without_names_and_none_not_at_all(tmp_path: Path) -> None:
    assert contributions_png(tmp_path, [], [], "gtg") is None
    assert contributions_png(tmp_path, [f"c{k}" for k in range(90)], [float(k) for k in range(90)], "gtg") is not None
