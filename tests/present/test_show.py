"""What people see: progress lines, tables that cut no name, pictures that show what they say."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lichen.core.contracts.algorithm import Report
from lichen.core.errors import LichenError
from lichen.present.charts import canvas
from lichen.present.charts.charts import clients_png, curves_png
from lichen.present.progress import Progress, event_text
from lichen.present.report import compare_table, summary_table
from lichen.present.summary import check_summary
from lichen.present.trace import Event, Trace
from lichen.present.units import bytes_text, count_text, seconds_text

LONG = "a-very-long-recipe-name-[with-brackets]-that-no-table-may-ever-cut-even-when-it-is-piped-into-a-file"

SUMMARY: dict[str, Any] = check_summary(
    {
        "name": LONG,
        "question": "",
        "task": "classify",
        "metric": "macro_f1",
        "higher_is_better": True,
        "columns": {
            "base": None,
            "alone": {"mean": 0.61, "worst_decile": 0.2},
            "federated": {"mean": 0.71234, "worst_decile": 0.5},
            "pooled": {"mean": 0.8, "worst_decile": 0.6},
        },
        "extra_columns": {"hard answers": {"mean": 0.4, "worst_decile": 0.1}},
        "share_gaining": 0.75,
        "clients": 40,
        "bytes_up": 12_345_678,
        "bytes_down": 999,
        "seconds": 75.0,
        "peak_memory_bytes": 2_000_000_000,
        "seed": 3,
        "versions": {},
        "recipe_sha256": "a" * 64,
        "extra": {"majority": 0.3, "best form": "chat", "forgotten": None},
    }
)


def event(round_: int, *, column: str = "federated", grid: str = "lr=0.001", valid: float = 2.0) -> Event:
    report = Report(
        round=round_,
        clients=(0,),
        metrics={"loss": 3 / round_, "valid": valid},
        tokens=12_000,
        bytes_up=3_100_000,
        bytes_down=950,
        seconds=2.0,
    )
    return Event(column=column, report=report, total_rounds=10, grid=grid)


def shown(thing: Any, width: int = 10_000) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(thing)
    return out.getvalue()


def test_a_round_in_one_line() -> None:
    line = event_text(event(4), 2.0)
    assert line == (
        "federated  lr=0.001  round 4/10  loss 0.75  valid 2  6.0k tokens/s  up 3.1 MB  down 950 B  ETA 12.0s"
    )
    assert "ETA" not in event_text(event(10), 2.0)
    assert "valid -" in event_text(event(1, valid=math.nan), 2.0)


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=20)) as progress:
        progress.say("loading [bold]x[/bold]")
        for round_ in (1, 2):
            progress(event(round_))
    lines = out.getvalue().splitlines()
    assert lines[0] == "loading [bold]x[/bold]"
    assert [line.split("  ")[2] for line in lines[1:]] == ["round 1/10", "round 2/10"]
    assert "\x1b" not in out.getvalue()


def test_one_live_line_on_a_terminal() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=200, force_terminal=True)) as progress:
        for round_ in (1, 2, 3):
            progress(event(round_))
        progress.say("half way")
        progress(event(1, column="alone"))
    text = out.getvalue()
    assert "\x1b[2K" in text
    assert "half way" in text
    assert text.count("round 3/10") >= 1
    assert "\x1b[?25h" in text.split("alone")[-1]


def test_quiet_shows_nothing() -> None:
    out = io.StringIO()
    with Progress(Console(file=out), quiet=True) as progress:
        progress.say("x")
        progress(event(1))
    assert out.getvalue() == ""


def test_the_cursor_comes_back_after_a_fault() -> None:
    out = io.StringIO()

    def fail() -> None:
        with Progress(Console(file=out, force_terminal=True)) as progress:
            progress(event(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert out.getvalue().rstrip().endswith("\x1b[?25h")


@pytest.mark.parametrize("table", [summary_table(SUMMARY), compare_table([SUMMARY, SUMMARY])])
def test_tables_keep_names_whole(table: Any) -> None:
    text = shown(table)
    assert LONG in text
    assert "hard answers" in text
    assert "macro_f1 (higher is better)" in text
    assert "0.7123" in text
    assert "75 %" in text
    assert "12.3 MB" in text
    assert "…" not in text
    narrow = shown(table, 40)
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 40


def test_the_summary_table_tells_extras() -> None:
    text = shown(summary_table(SUMMARY))
    for words in ("majority", "0.3", "best form", "chat", "forgotten", "1m15s", "2.0 GB"):
        assert words in text
    assert "base" not in text


def test_runs_of_one_name_are_told_apart_by_folder() -> None:
    text = shown(compare_table([SUMMARY, SUMMARY], folders=["runs/x-1", "runs/x-2"]))
    assert "runs/x-1" in text
    assert "runs/x-2" in text


def test_comparing_nothing_is_refused() -> None:
    with pytest.raises(LichenError, match="no runs to compare"):
        compare_table([])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(999.6), "1.0 kB"),
        (bytes_text(99_960), "100 kB"),
        (bytes_text(10**18), "1000 PB"),
        (count_text(0), "0"),
        (seconds_text(59.96), "1m00s"),
        (seconds_text(3599.6), "1h00m"),
        (seconds_text(math.inf), "-"),
    ],
)
def test_units_at_their_edges(text: str, expected: str) -> None:
    assert text == expected


def labels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures as they are saved, to look at what they hold."""
    kept: list[Any] = []
    painted = canvas._painted
    monkeypatch.setattr(canvas, "_painted", lambda figure: (kept.append(figure), painted(figure))[1])
    return kept


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = labels(monkeypatch)
    (tmp_path / "recipe.yaml").write_text("name: costs $5 and $6\n")
    for column in ("federated", "alone", "something else"):
        for grid in ("lr=0.1", "lr=0.2"):
            for round_ in (1, 2, 3):
                Trace(tmp_path)(event(round_, column=column, grid=grid, valid=math.nan if round_ == 2 else 1.0))
    path = curves_png(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = kept
    loss, valid = figure.axes
    assert len(loss.lines) == len(valid.lines) == 6
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3]
    assert list(loss.lines[0].get_ydata()) == [3.0, 1.5, 1.0]
    assert list(valid.lines[0].get_xdata()) == [1, 3]
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 6
    assert figure.get_suptitle() == r"costs \$5 and \$6"
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("round", "training loss (mean per token or row)")
    first = path.read_bytes()
    assert curves_png(tmp_path) == path
    assert path.read_bytes() == first


def test_curves_carry_the_name_of_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = labels(monkeypatch)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    Trace(tmp_path)(event(1))
    curves_png(tmp_path)
    assert kept[0].get_suptitle() == LONG
    assert kept[0].axes[1].get_ylabel() == "validation loss (mean per token or row)"


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert curves_png(tmp_path) is None
    assert clients_png(tmp_path, [{"name": "a", "alone": None, "federated": 1.0}], "accuracy", True) is None
    assert list(tmp_path.iterdir()) == []


def test_the_stronger_column_of_training_alone_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = labels(monkeypatch)
    clients = [{"name": f"c{i}", "alone": 0.5, "alone_best": 0.6 + i / 10, "federated": 0.75} for i in range(4)]
    clients_png(tmp_path, clients, "accuracy", True)
    dots = {c.get_label(): c.get_offsets() for c in kept[0].axes[0].collections if not c.get_label().startswith("_")}
    assert set(dots) == {"alone_best", "federated"}
    assert sorted(x for x, _ in dots["alone_best"]) == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert "50 % of 4 clients gain over alone_best" in kept[0].get_suptitle()


@pytest.mark.parametrize("number", [1, 4, 60, 500])
def test_clients_are_sorted_by_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    kept = labels(monkeypatch)
    clients = [
        {
            "name": f"$c{i}",
            "base": 40.0 if i % 2 else None,
            "alone": 30.0,
            "federated": 30.0 + i - number / 2,
            "pooled": None,
        }
        for i in range(number)
    ]
    path = clients_png(tmp_path / "run", clients, "perplexity", False)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = kept[0].axes
    dots = {c.get_label(): c.get_offsets() for c in axes.collections if not c.get_label().startswith("_")}
    federated = [x for x, _ in dots["federated"]]
    assert federated == sorted(federated, reverse=True)
    assert len(federated) == number
    gaining = sum(c["federated"] < 30 for c in clients) / number
    assert f"{100 * gaining:.0f} % of {number} clients gain" in kept[0].get_suptitle()
    assert "lower is better" in axes.get_xlabel()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == (number if number <= 60 else 0)
