"""Names in any script: no box is ever drawn, and one-point curves and kept rounds can be seen."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lichen.core.contracts.algorithm import Report
from lichen.present.charts import charts, fonts
from lichen.present.charts.charts import clients_png, curves_png
from lichen.present.charts.fonts import drawable, families_for
from lichen.present.trace import Event, Trace

NAMES = ["东京病院", "مستشفى", "🏥 clinic", "Zürich", "बैंक", "서울", "\U000f0000", "a\x1bb", "costs $5"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    kept: list[Figure] = []
    make = charts.figure_of

    def figure(width: float, height: float) -> Figure:
        kept.append(make(width, height))
        return kept[-1]

    monkeypatch.setattr(charts, "figure_of", figure)
    return kept


def test_no_picture_holds_a_box(tmp_path: Path, figures: list[Figure]) -> None:
    clients = [{"name": name, "alone": 1.0, "federated": 2.0 + i} for i, name in enumerate(NAMES)]
    (tmp_path / "summary.json").write_text(json.dumps({"name": "病院の試験"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of every letter that its font lacks
        clients_png(tmp_path, clients, "accuracy", True)
    shown = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    for i, name in enumerate(NAMES):
        assert shown[i] == (name.replace("$", r"\$") if drawable(name) else f"client {i + 1}")
    assert "Zürich" in shown
    assert "client 7" in shown
    assert "client N: the Nth name in clients.csv" in figures[0].get_suptitle()


def test_fonts_are_taken_that_have_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"DejaVu Sans": "usual", "Far East": "east", "Near East": "near", "Both": "both"}
    letters = {"usual": "abc", "east": "东京", "near": "م", "both": "东م"}
    monkeypatch.setattr(fonts, "_fonts", lambda: tuple(made.items()))
    monkeypatch.setattr(fonts, "_letters", lambda file: frozenset(map(ord, letters[file])))
    assert families_for(["abc"]) == ["DejaVu Sans"]
    assert families_for(["a东京"]) == ["DejaVu Sans", "Far East"]
    assert families_for(["东京", "م", "?"]) == ["DejaVu Sans", "Far East", "Near East"]
    assert drawable("a 东京م")
    assert not drawable("a?")
    assert not drawable(" ")


def event(number: int, column: str = "federated", **metrics: float) -> Event:
    report = Report(round=number, clients=(0,), metrics=metrics, tokens=1, bytes_up=1, bytes_down=1, seconds=1.0)
    return Event(column=column, report=report, total_rounds=3, grid="lr=0.1")


def test_the_kept_round_is_ringed_and_a_single_point_is_seen(tmp_path: Path, figures: list[Figure]) -> None:
    for number, valid in ((1, 3.0), (2, 2.0), (3, 2.5)):
        Trace(tmp_path)(event(number, loss=1.0, valid=valid))
    Trace(tmp_path)(event(1, "pooled", loss=0.75, valid=1.25))
    told: dict[str, Any] = {"training": {"federated": {"kept": 2}, "pooled": {"kept": 1}, "alone": {"kept": None}}}
    told |= {"name": "n", "extra": {"lr.federated": 0.1, "lr.pooled": 0.1}}
    (tmp_path / "summary.json").write_text(json.dumps(told))
    curves_png(tmp_path)
    loss, valid = figures[0].axes
    rings = [tuple(ring.get_offsets()[0].tolist()) for ring in valid.collections]
    assert rings == [(2.0, 2.0), (1.0, 1.25)]
    assert [text.get_text() for text in valid.texts] == ["1.25"]
    assert [text.get_text() for text in loss.texts] == ["0.75"]
    assert valid.lines[1].get_markersize() > 2 * valid.lines[0].get_markersize()
    assert [text.get_text() for text in figures[0].legends[0].get_texts()].count("the round that was kept") == 1


def test_without_a_summary_nothing_is_ringed(tmp_path: Path, figures: list[Figure]) -> None:
    Trace(tmp_path)(event(1, loss=1.0, valid=3.0))
    Trace(tmp_path)(event(2, loss=1.0, valid=2.0))
    curves_png(tmp_path)
    assert not any(axes.collections for axes in figures[0].axes)
