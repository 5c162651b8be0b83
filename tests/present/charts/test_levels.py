"""Methods over levels: the grid, what is best in it, and its picture."""

from __future__ import annotations

from pathlib import Path

from lichen.present.charts.levels import by_level, levels_markdown, levels_png
from lichen.present.compare import ComparisonRow, Outcome, Spread, comparison_rows


def row(name: str, value: float | None, worst: float = 0.1, std: float | None = 0.02) -> ComparisonRow:
    if value is None:
        return ComparisonRow(method=name)
    spread = Spread(mean=value, std=std, values=(value,))
    return ComparisonRow(
        method=name, metric="macro_f1", value=spread, worst=Spread(mean=worst, std=None, values=(worst,))
    )


ROWS = [row("alone@few", 0.2), row("taught@few", 0.4), row("alone@many", 0.6), row("taught@many", None)]


def test_the_grid_has_a_line_a_method_and_marks_the_best_of_a_level() -> None:
    text = levels_markdown(ROWS, ["few", "many"])
    lines = text.splitlines()
    assert lines[0] == "| macro_f1 | few | many |"
    assert lines[2].startswith("| alone | 0.2")
    assert "± 0.02 (0.1" in lines[2]
    assert lines[3].startswith("| taught | **0.4")
    assert lines[3].endswith("| - |")
    assert "**0.6" not in text, "nothing is best alone"


def test_rows_are_parted_by_level() -> None:
    assert {m: list(at) for m, at in by_level(ROWS).items()} == {"alone": ["few", "many"], "taught": ["few", "many"]}


def test_equal_rows_give_equal_pictures(tmp_path: Path) -> None:
    one = levels_png(ROWS, ["few", "many"], tmp_path / "a.png", title="When?")
    two = levels_png(ROWS, ["few", "many"], tmp_path / "b.png", title="When?")
    assert one is not None
    assert two is not None
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes()[:4] == b"\x89PNG"
    assert levels_png([row("alone@few", None)], ["few"], tmp_path / "c.png") is None


def test_another_column_of_the_same_runs_is_a_row_without_costs() -> None:
    score = {"mean": 0.5, "worst_decile": 0.25}
    run = {
        "task": "classify",
        "metric": "macro_f1",
        "higher_is_better": True,
        "columns": {"base": None, "alone": score, "federated": {"mean": 0.7, "worst_decile": 0.6}, "pooled": None},
        "extra_columns": {"without": {"mean": 0.6, "worst_decile": 0.5}},
        "extra": {"fm.asked": 12.0, "fm.tokens_out": 340.0},
        "traffic": None,
        "bytes_up": 3,
        "bytes_down": 4,
        "seconds": 1.0,
    }
    kinds = ("alone", "without", "federated")
    rows = comparison_rows([Outcome(method=c, summaries={0: run}, wanted=1, column=c) for c in kinds])
    assert [r.value.mean for r in rows if r.value] == [0.5, 0.6, 0.7]
    assert [(r.total, r.calls) for r in rows] == [(None, None), (None, None), (7.0, 12.0)]
