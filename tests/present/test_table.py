"""Tables fit the screen: no word or number is broken, narrow ones stack, and every letter can be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lichen import cli
from lichen.present.compare import Outcome, comparison_rows
from lichen.present.compare_table import comparison_table
from lichen.present.planned import plan_table
from lichen.present.report import compare_table, summary_table
from lichen.present.summary import check_summary
from lichen.present.table import new_table, table_text

SCREENS = Path(__file__).parent / "screens"
"""What each table looks like; LICHEN_WRITE_SCREENS=1 writes them anew."""


def summary(name: str, federated: float, **more: Any) -> dict[str, Any]:
    scores = {"base": 0.1012, "alone": 0.8123, "federated": federated, "pooled": 0.9555}
    training = {
        "rows": 12800,
        "passes": 11.3,
        "rows_there": 1133,
        "share_seen": 1.0,
        "rounds": 40,
        "of": 40,
        "kept": 37,
    }
    return check_summary(
        {
            "name": name,
            "question": "",
            "task": "classify",
            "metric": "macro_f1",
            "higher_is_better": True,
            "columns": {way: {"mean": mean, "worst_decile": mean / 2} for way, mean in scores.items()},
            "extra_columns": {"no_help": {"mean": 0.41, "worst_decile": 0.112}},
            "training": {"federated": training},
            "share_gaining": 0.9,
            "clients": 10,
            "bytes_up": 12_345_678,
            "bytes_down": 98_765_432,
            "seconds": 75.0,
            "peak_memory_bytes": 2_000_000_000,
            "energy_joules": None,
            "seed": 3,
            "versions": {},
            "recipe_sha256": "a" * 64,
            "extra": {"majority": 0.3, "best form": "chat"},
            **more,
        }
    )


ONE, TWO = summary("digits", 0.9321), summary("digits-with-fewer-rounds", 0.91)
ROWS = comparison_rows(
    [
        Outcome(method="fedavg", summaries={0: ONE, 1: TWO}, wanted=2, memory=3_000_000),
        Outcome(method="fedprox-mu-0.1", summaries={0: ONE, 1: ONE}, wanted=2, faults=("seed 2: engine.nodes: ended",)),
    ]
)
COST = {"train_tokens": 12_800.0, "evaluate_tokens": 5_390.0, "train_flops": 1.5e9, "evaluate_flops": 2e8}
PLAN: dict[str, Any] = {
    "name": "digits",
    "engine": "local",
    "device": "cpu",
    "start": 0.4,
    "seconds": 98.0,
    "joules": None,
    "columns": {"alone": {"seconds": 40.0, **COST}, "federated": {"seconds": 57.6, **COST}},
    "rooms": [],
    "problems": [{"what": "memory: 3.1 GB are needed and 2.0 GB are there", "change": "lower engine.nodes"}],
    "notes": ["seconds of 4 nodes are those of one process, which is an estimate"],
    "bytes": {
        **dict.fromkeys(("client_up", "client_down", "round_up", "round_down", "up", "down"), 1_234_567),
        **{"bound": True, "validators": 10, "valid_up": 120, "valid_down": 64_000},
    },
    "memory": {"peak": 3e9, "available": 2e9, "base": 0, "loaded": 5e8, "client": 1e6, "clients": 10, "block": 1e7},
    "disk": {"private": 1e6, "shared": 2e6, "history": 0, "free": 9e9},
    "seen": {"federated": {"rows": 12800, "passes": 11.3, "rows_there": 1133, "share_seen": 1.0}},
    "trained": 4810,
    "frozen": 0,
    "clients": 10,
}


def cache() -> Any:
    table = new_table(None, "what", "holds", "size", "last used", "path", numbers=["size"])
    table.add_row(
        "model minilm-l6", "public", "92.9 MB", "3 days ago", "/home/ada/.cache/lichen/minilm-l6-1a2b3c4d5e6f"
    )
    table.add_row(
        "tokens", "private rows", "1.2 GB", "today", "/home/ada/.cache/lichen/prepared/9f8e7d6c5b4a.safetensors"
    )
    return table


TABLES = {
    "report": lambda: compare_table([ONE, TWO], folders=["runs/digits-1", "runs/digits-with-fewer-rounds-12"]),
    "report-one": lambda: summary_table(ONE),
    "compare": lambda: comparison_table(ROWS),
    "plan": lambda: plan_table(PLAN),
    "cache": cache,
}


def words(text: str) -> list[str]:
    """What must stay in one piece; lines of a table's box are none."""
    return sorted({word.rstrip(":") for word in text.split() if set(word) - set("─-|:+")})


@pytest.mark.parametrize("width", [80, 60, 40])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_its_screen_and_breaks_no_word_and_no_number(name: str, width: int) -> None:
    wide, shown = table_text(TABLES[name]()), table_text(TABLES[name](), width=width)
    longest = max(width, *(len(word) + 4 for word in wide.split() if not set(word) <= {"─"}))
    assert all(len(line) <= longest for line in shown.split("\n"))
    assert set(words(wide)) <= set(words(shown))
    file = SCREENS / f"{name}-{width}.txt"
    if os.environ.get("LICHEN_WRITE_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        file.write_text(shown + "\n", encoding="utf-8")
    assert shown + "\n" == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("width", [10_000, 80, 40])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_written_with_the_letters_that_there_are(name: str, width: int, encoding: str) -> None:
    shown = table_text(TABLES[name](), width=width, encoding=encoding)
    assert shown.encode(encoding).decode(encoding) == shown
    rule = [line for line in shown.split("\n") if line.strip() and not set(line) - set(" -")]
    assert rule
    if name == "compare":
        assert ("0.9211 ± 0.016" in shown) == (encoding != "ascii")
        assert ("0.9211 +/- 0.016" in shown) == (encoding == "ascii")
    if width == 10_000:  # the columns stand where they stand with all letters, but where a cell has grown
        full = table_text(TABLES[name]())
        assert encoding == "ascii" or [len(line) for line in full.split("\n")] == [len(x) for x in shown.split("\n")]


@pytest.mark.parametrize("width", [80, 60, 40])
@pytest.mark.parametrize("command", [["list"], ["list", "methods"]])
def test_the_lists_fit_every_screen(
    command: list[str], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 0
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    longest = max(width, *(len(word) + 4 for word in wide.split() if not set(word) <= {"─"}))
    assert all(len(line) <= longest for line in shown.split("\n"))
    assert set(words(wide)) <= set(words(shown))
