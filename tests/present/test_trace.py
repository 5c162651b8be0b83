"""The trace: what goes in comes out, a kill leaves nothing wrong, a resumed run repeats no line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.contracts.algorithm import Report
from lichen.core.errors import LichenError
from lichen.present.trace import Event, Trace, lr_name, read_trace


def event(
    round_: int, column: str = "federated", grid: str = "lr=0.001", metrics: Mapping[str, float] | None = None
) -> Event:
    report = Report(
        round=round_,
        clients=(0, 2),
        metrics=metrics if metrics is not None else {"loss": 1 / round_},
        tokens=10,
        bytes_up=7,
        bytes_down=9,
        seconds=0.5,
    )
    return Event(column=column, report=report, total_rounds=5, grid=grid)


finite = st.floats(allow_nan=False, allow_infinity=False)
rates = st.floats(1e-12, 1e6)


@given(rate=rates, other=rates, ulps=st.integers(-3, 3))
def test_a_rate_and_its_grid_name_tell_each_other(rate: float, other: float, ulps: int) -> None:
    near = rate * (1 + ulps * 2**-52)
    for one in (near, other):
        assert (lr_name(rate) == lr_name(one)) == (rate == one)
    assert float(lr_name(rate).removeprefix("lr=")) == rate


@pytest.mark.parametrize("rate", [0.1, 0.3, 5e-3, 3e-4, 1e-5, 2.0, 0.02])
def test_ordinary_rates_are_called_as_ever(rate: float) -> None:
    assert lr_name(rate) == f"lr={rate:g}"


@given(
    column=st.text(max_size=8),
    grid=st.text(max_size=8),
    metrics=st.dictionaries(st.text(max_size=5), finite, max_size=3),
    round_=st.integers(1, 10**9),
)
def test_events_come_back_equal(
    column: str, grid: str, metrics: dict[str, float], round_: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("t")
    try:
        (column + grid + "".join(metrics)).encode()
    except UnicodeEncodeError:
        return
    written = (event(round_, column, grid, metrics), event(round_ + 1, column, grid, metrics))
    for one in written:
        Trace(folder)(one)
    assert read_trace(folder) == written


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    Trace(tmp_path)(event(1, metrics={"loss": math.nan, "valid": math.inf, "x": 2.0}))
    line = (tmp_path / "trace.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["metrics"] == {"loss": None, "valid": None, "x": 2.0}
    (back,) = read_trace(tmp_path)
    assert math.isnan(back.report.metrics["loss"])


def test_no_trace_is_no_events(tmp_path: Path) -> None:
    assert read_trace(tmp_path) == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    trace, path = Trace(tmp_path), tmp_path / "trace.jsonl"
    trace(event(1))
    trace(event(2))
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_trace(tmp_path) == (event(1),)
    trace(event(2))
    trace(event(3))
    assert read_trace(tmp_path) == (event(1), event(2), event(3))


def test_a_file_torn_in_its_only_line(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_bytes(b'{"column": "fed')
    assert read_trace(tmp_path) == ()
    Trace(tmp_path)(event(1))
    assert read_trace(tmp_path) == (event(1),)


@pytest.mark.parametrize("bad", ["{}", "3", "nonsense", '{"column": "a", "metrics": []}', "\xff"])
def test_a_damaged_line_within_is_named(tmp_path: Path, bad: str) -> None:
    trace, path = Trace(tmp_path), tmp_path / "trace.jsonl"
    trace(event(1))
    path.write_bytes(path.read_bytes() + bad.encode("latin-1") + b"\n")
    trace(event(2))
    with pytest.raises(LichenError, match="is not a line of a trace") as caught:
        read_trace(tmp_path)
    assert caught.value.where == f"{path}, line 2"
