"""The picture of a stream: it is drawn from what periods.json holds, holes and names of any kind among it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lichen.present.charts.stream import stream_png

FOUND: dict[str, Any] = {
    "metric": "perplexity",
    "higher_is_better": False,
    "periods": [
        {"name": "2018-05", "clients": {"Ærø $1$": 10, "b" * 60: 4}},
        {"name": "2018-06", "clients": {"b" * 60: 7, "c": 1}},
    ],
    "matrix": [[10.0, 12.0], [8.0, 11.0], [8.5, None]],
}


@pytest.mark.parametrize("higher", [True, False])
def test_equal_streams_have_equal_pictures_and_others_others(tmp_path: Path, higher: bool) -> None:
    found = {**FOUND, "higher_is_better": higher}
    pictures = [stream_png(tmp_path / f"{at}.png", found, title="$a$").read_bytes() for at in range(2)]
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")
    assert len(pictures[0]) > 5000
    other = stream_png(tmp_path / "other.png", {**found, "matrix": [[1.0, 2.0]] * 3}, title="$a$").read_bytes()
    assert other != pictures[0]


def test_a_stream_whose_every_score_is_unknown_is_drawn(tmp_path: Path) -> None:
    nothing = {**FOUND, "matrix": [[None, None]] * 3}
    assert stream_png(tmp_path / "a.png", nothing, title="a").stat().st_size > 5000
