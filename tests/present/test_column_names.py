"""People read no_help where files say without, and files of every version are read."""

from __future__ import annotations

from typing import Any

from lichen.present.column_names import column_in_files, column_title
from lichen.present.compare import Outcome, comparison_rows
from lichen.present.report import compare_table, summary_table
from lichen.present.table import table_text
from present.test_show import SUMMARY

SCORE = {"mean": 0.5, "worst_decile": 0.4}


def test_tables_say_no_help() -> None:
    summary: dict[str, Any] = {**SUMMARY, "extra_columns": {"without": SCORE}}
    for table in (summary_table(summary), compare_table([summary, SUMMARY])):
        shown = table_text(table)
        assert "no_help" in shown
        assert "without" not in shown


def test_a_comparison_finds_the_column_by_either_name() -> None:
    for name in ("no_help", "without"):
        summary: dict[str, Any] = {**SUMMARY, "extra_columns": {"without": SCORE}}
        (row,) = comparison_rows((Outcome(method="m", summaries={0: summary}, wanted=1, column=name),))
        assert row.value is not None
        assert row.value.mean == 0.5


def test_both_ways() -> None:
    assert column_in_files(column_title("without")) == "without"
    assert column_title(column_in_files("no_help")) == "no_help"
