"""Methods side by side: rows from summaries, what is marked as best, and nothing said that is not known."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lichen.core.errors import LichenError
from lichen.present.compare import ComparisonRow, Outcome, comparison_rows, mean_and_std
from lichen.present.compare_table import comparison_csv, comparison_markdown, comparison_table, notes
from lichen.present.summary import check_summary


def summary(value: float, *, up: int = 1000, metric: str = "perplexity", **more: Any) -> dict[str, Any]:
    score = {"mean": value, "worst_decile": value + 5}
    return check_summary(
        {
            "name": "m",
            "question": "",
            "task": "chat",
            "metric": metric,
            "higher_is_better": metric != "perplexity",
            "columns": {
                "base": {"mean": 40.0, "worst_decile": 50.0},
                "alone": None,
                "federated": score,
                "pooled": None,
            },
            "extra_columns": {},
            "share_gaining": None,
            "clients": 4,
            "bytes_up": up * 8,
            "bytes_down": 9000,
            "traffic": {
                "rounds": 2,
                "trainings": 6,
                "client_up": float(up),
                "client_down": 500.0,
                "up": 6.0 * up,
                "down": 3000.0,
                "validation": False,
            },
            "seconds": 30.0,
            "peak_memory_bytes": 1,
            "seed": 0,
            "versions": {},
            "recipe_sha256": "a" * 64,
            "extra": {"forgotten.before": 20.0, "forgotten.after": 21.5},
            **more,
        }
    )


def shown(rows: tuple[ComparisonRow, ...]) -> str:
    out = io.StringIO()
    Console(file=out, width=10_000).print(comparison_table(rows))
    return out.getvalue()


TWO = comparison_rows(
    [
        Outcome(method="fedit", summaries={0: summary(20.0), 1: summary(22.0)}, wanted=2, memory=3_000_000),
        Outcome(method="small", summaries={0: summary(24.0, up=10)}, wanted=2, faults=("seed 1: data: is | odd",)),
    ]
)


def test_a_row_is_a_method_over_its_seeds() -> None:
    row = TWO[0]
    assert row.value is not None
    assert (row.value.mean, row.value.values) == (21.0, (20.0, 22.0))
    assert row.value.std == pytest.approx(statistics.stdev([20.0, 22.0]))
    assert row.worst is not None
    assert row.worst.mean == 26.0
    assert (row.client_up, row.train_up, row.total, row.rounds) == (1000.0, 6000.0, 17_000.0, 2.0)
    assert TWO[1].value is not None
    assert TWO[1].value.std is None
    assert json.loads(json.dumps(TWO[0].as_dict(), allow_nan=False))["value"]["mean"] == 21.0


def test_the_table_says_it_all_and_marks_the_best() -> None:
    text = shown(TWO)
    first, second = (next(line for line in text.splitlines() if name in line) for name in ("fedit", "small"))
    for words in ("21 ± 1.4 *", "26 ± 1.4 *", "40", "20 → 21.5", "1.0 kB", "500 B", "17.0 kB", "3.0 MB", "30.0s"):
        assert words in first
    for words in ("10 B *", "1 of 2", "seed 1: data: is | odd"):
        assert words in second
    assert "500 B *" not in text, "what all have alike is nobody's merit"


def test_markdown_has_the_same_cells() -> None:
    page = comparison_markdown(TWO, title="t", question="Which?").splitlines()
    assert page[:3] == ["# t", "", "Which?"]
    table = [line for line in page if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "**21 ± 1.4**" in table[2]
    assert "is \\| odd" in table[3]
    assert len(notes(TWO)) == len([line for line in page if line.startswith("- ")]) >= 5


def test_numbers_for_programs() -> None:
    first, second = csv.DictReader(io.StringIO(comparison_csv(TWO)))
    assert (first["method"], float(first["value_mean"]), float(first["memory"])) == ("fedit", 21.0, 3e6)
    assert (second["value_std"], second["memory"], second["seeds"]) == ("", "", "0")


def test_columns_without_a_word_are_left_out() -> None:
    plain = summary(0.5, metric="accuracy", extra={}, traffic=None)
    plain["columns"]["base"] = None
    rows = comparison_rows(
        [Outcome(method="a", summaries={0: plain}, wanted=1), Outcome(method="b", summaries={}, wanted=1)]
    )
    head = comparison_markdown(rows).splitlines()[0]
    assert head == "| method | accuracy | worst decile | total | time | seeds |"
    assert "0 of 1" in shown(rows)
    assert "*" not in shown(rows), "one alone is not the best of anything"
    assert all("forgotten" not in note and "memory" not in note for note in notes(rows))


def test_what_an_attack_reached_stands_beside_the_score() -> None:
    def outcome(name: str, **extra: float) -> Outcome:
        return Outcome(method=name, summaries={0: summary(20.0, extra=extra)}, wanted=1)

    rows = comparison_rows(
        [
            outcome("open", **{"attack_success.before": 0.1, "attack_success.after": 0.9, "refused.federated": 0.2}),
            outcome("shut", **{"attack_success.after": 0.25, "refused.federated": 0.2, "refused.repaired": 0.75}),
        ]
    )
    head, _, first, second, *rest = comparison_markdown(rows).splitlines()
    places = [head.split("|").index(f" {name} ") for name in ("attack success", "refused")]
    assert [first.split("|")[i].strip() for i in places] == ["0.9", "0.2"]
    assert [second.split("|")[i].strip() for i in places] == ["**0.25**", "**0.75**"]
    assert sum(line.startswith(("- attack success:", "- refused:")) for line in rest) == 2


def _rated(value: float, accuracy: float = 0.5) -> dict[str, Any]:
    majority = {"mean": 0.2, "worst_decile": 0.1}
    found = summary(value, metric="macro_f1", task="classify", extra_columns={"majority": majority})
    found["columns"]["federated"] = {"mean": value, "worst_decile": 0.1}
    found["extra"] |= {"federated.accuracy": accuracy, "majority.accuracy": 0.5}
    return found


def test_a_method_that_answers_the_majority_class_is_told() -> None:
    rows = comparison_rows(
        [
            Outcome(method="still", summaries={0: _rated(0.2), 1: _rated(0.2), 2: _rated(0.3)}, wanted=3),
            Outcome(method="near", summaries={0: _rated(0.2, accuracy=0.51)}, wanted=1),
        ]
    )
    assert [row.constant_seeds for row in rows] == [2, 0], "the same score by other answers is not constant"
    page = comparison_markdown(rows)
    assert "| majority |" in page.splitlines()[0]
    assert "(= on 2 of 3)" in page
    assert any("still on 2 of 3 seeds" in note and "near" not in note for note in notes(rows))
    assert [row["constant_seeds"] for row in csv.DictReader(io.StringIO(comparison_csv(rows)))] == ["2", "0"]


def test_nothing_run_is_a_table_too() -> None:
    rows = comparison_rows([Outcome(method="a", summaries={}, wanted=3)])
    assert "0 of 3" in shown(rows)
    assert notes(rows) == ()


def test_validation_that_was_counted_in_is_told() -> None:
    every = summary(20.0)
    every["traffic"]["validation"] = True
    assert any(
        "validation counted in" in n
        for n in notes(comparison_rows([Outcome(method="a", summaries={0: every}, wanted=1)]))
    )


def test_two_metrics_do_not_mix() -> None:
    with pytest.raises(LichenError, match="perplexity cannot be compared with accuracy"):
        comparison_rows(
            [
                Outcome(method="a", summaries={0: summary(20.0)}, wanted=1),
                Outcome(method="b", summaries={0: summary(0.5, metric="accuracy")}, wanted=1),
            ]
        )


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_spread_is_that_of_the_textbook(values: list[float]) -> None:
    found = mean_and_std(values)
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert found.std == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)
    assert min(values) - 1e-6 <= found.mean <= max(values) + 1e-6
    assert math.isfinite(found.mean)
    assert mean_and_std([]) is None


@given(st.lists(st.tuples(st.floats(10, 100), st.integers(1, 10**9)), min_size=2, max_size=8))
def test_the_mark_is_on_the_least_perplexity(runs: list[tuple[float, int]]) -> None:
    rows = comparison_rows(
        [Outcome(method=f"m{i}", summaries={0: summary(v, up=up)}, wanted=1) for i, (v, up) in enumerate(runs)]
    )
    lines = [line for line in comparison_markdown(rows).splitlines() if line.startswith("| m")][1:]
    cells = [line.split("|")[2].strip() for line in lines]
    marked = [i for i, cell in enumerate(cells) if cell.startswith("**")]
    best = min(range(len(runs)), key=lambda i: runs[i][0])
    assert marked == [] if len(set(cells)) == 1 else best in marked
