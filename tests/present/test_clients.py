"""Results by client: names in full and harmless, numbers that read back, and the command that prints them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.present.cells import read_cell, text_cell
from lichen.present.clients import client_rows, clients_csv, read_clients
from support.tiny_llama import recipe, save_model, save_rows

NAMES = ["=cmd|' /C calc'!A1", "+1", "-2", "@SUM(A1)", "'quoted", 'a,b\n"c"', "病院東京" * 20, "  padded ", "\tx"]


@given(st.text())
def test_a_cell_reads_back_and_begins_like_no_formula(text: str) -> None:
    assert read_cell(text_cell(text)) == text
    assert not text_cell(text).startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


def test_rows_read_back_with_their_names(tmp_path: Path) -> None:
    scores = {"alone": [1.0] * 9, "federated": [2.0] * 8 + [math.nan], "=extra": [0.5] * 9}
    counts: list[dict[str, int | None]] = [{"train": 5, "valid": 1, "test": 2, "cut": None}] * 9
    rows = client_rows(NAMES, counts, scores, higher_is_better=False)
    (tmp_path / "clients.csv").write_text(clients_csv(rows), encoding="utf-8", newline="")
    assert read_clients(tmp_path) == rows
    assert rows[0]["gain"] == -1.0
    assert rows[0]["cut"] is rows[0]["pooled"] is rows[8]["federated"] is rows[8]["gain"] is None
    with open(tmp_path / "clients.csv", newline="", encoding="utf-8") as file:
        for line in list(csv.reader(file)):
            assert not any(cell.startswith(("=", "+", "@", "\t")) for cell in line)


def test_a_gain_is_over_the_stronger_column_for_every_client() -> None:
    scores = {"alone": [1.0, 5.0], "alone_best": [2.0, 1.0], "federated": [1.5, 1.5]}
    rows = client_rows(["a", "b"], [], scores, higher_is_better=False)
    assert [row["gain"] for row in rows] == [0.5, -0.5]
    rows = client_rows(["a", "b"], [], scores, higher_is_better=True)
    assert [row["gain"] for row in rows] == [0.5, -3.5]


def test_a_missing_or_damaged_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="no results by client"):
        read_clients(tmp_path)
    for text in ("client,train\na,b,c\n", "client,alone\na,x\n", ""):
        (tmp_path / "clients.csv").write_text(text)
        with pytest.raises(LichenError, match="damaged"):
            read_clients(tmp_path)


def test_a_run_leaves_them_and_report_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl", "pair", clients=3)
    long = "=HYPERLINK(" + "a very long name " * 9 + ")"
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        line["who"] = long if line["who"] == "person-1" else line["who"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    more: dict[str, Any] = {"data": {"max_length": 16}, "federation": {"rounds": 1}}
    more["compare"] = {"baselines": ["base", "alone", "pooled"]}
    result = lichen.run(recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", **more), out=tmp_path / "run")
    rows = read_clients(result.folder)
    assert [row["client"] for row in rows] == sorted([long, "person-0", "person-2"])
    for row in rows:
        assert row["train"] + row["valid"] + row["test"] == 10
        assert row["cut"] == (10 if row["client"] == long else 0)  # 15 words of answer and a prompt, in 16 tokens
        assert row["gain"] == row["alone"] - row["federated"]
    for column in ("base", "alone", "federated", "pooled"):
        mean = sum(row[column] for row in rows) / 3
        assert mean == pytest.approx(result.summary["columns"][column]["mean"])
    assert cli.main(["report", str(result.folder), "--clients"]) == 0
    out = capsys.readouterr().out
    assert long in out
    assert "gain" in out
    assert cli.main(["report", str(result.folder), "--clients", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["clients"] == rows
