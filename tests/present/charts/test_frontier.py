"""The picture of quality against bytes: who is beaten, and numbers that can be read."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lichen.present.charts import frontier
from lichen.present.charts.frontier import frontier_png, unbeaten
from lichen.present.compare import ComparisonRow, Spread

POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


def row(name: str, value: float, up: float, down: float, std: float | None = 0.5) -> ComparisonRow:
    spread = Spread(mean=value, std=std, values=(value,))
    return ComparisonRow(
        method=name, metric="perplexity", higher_is_better=False, value=spread, train_up=up, train_down=down
    )


@given(POINTS, st.booleans())
def test_unbeaten_by_looking_at_all_pairs(points: list[tuple[int, int]], higher: bool) -> None:
    sign = 1 if higher else -1

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= b[0] and sign * a[1] >= sign * b[1] and a != b

    found = unbeaten(points, higher=higher)
    slow = {point for point in points if not any(beats(other, point) for other in points)}
    assert {points[i] for i in found} == slow
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_a_picture_of_thirty_methods(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [row(f"m{i}", 20 + draw.gauss(0, 2), 10 ** draw.uniform(1, 8), 10 ** draw.uniform(6, 7)) for i in range(30)]
    file = frontier_png(rows, tmp_path / "new" / "frontier.png", title="cost in $ and $$?")
    assert file is not None
    assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
def test_no_number_lies_on_another_or_on_a_point(spread: float) -> None:
    draw = random.Random(1)
    figure = Figure(figsize=(6, 5), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = [row(f"m{i}", 20 + spread * draw.gauss(0, 1), 10 ** (5 + spread * draw.random()), 1.0) for i in range(20)]
    frontier._panel(axes, rows, [r.train_up or 0.0 for r in rows], [r.method for r in rows])
    figure.canvas.draw()
    boxes = frontier.place_labels(axes)
    assert len(boxes) == 20
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    values = [(r.train_up, r.value.mean) for r in rows if r.value is not None]
    for x, y in axes.transData.transform(values):
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sent", [0.0, 7000.0])
def test_all_at_one_price(tmp_path: Path, sent: float) -> None:
    same = [row("a", 20.0, sent, sent, std=0.0), row("b", 20.0, sent, sent)]
    assert frontier_png(same, tmp_path / "one.png") == tmp_path / "one.png"


def test_nothing_to_draw_and_nothing_sent(tmp_path: Path) -> None:
    assert frontier_png([ComparisonRow(method="a")], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    silent = [row("a", 20.0, 0.0, 0.0, std=None), row("b", 21.0, 1e6, 1e6)]
    file = frontier_png(silent, tmp_path / "one.png")
    assert file is not None
    assert file.stat().st_size > 1000
