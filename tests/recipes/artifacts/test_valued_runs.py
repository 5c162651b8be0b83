"""A run that values its clients: files, columns and record, the same after a kill; and what its clients are paid."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.cli import main
from lichen.core.errors import LichenError
from lichen.core.files.record import canonical, chain
from lichen.present.clients import read_clients
from lichen.present.trace import Event, read_trace
from lichen.recipes.artifacts.contributions import read_contributions
from lichen.recipes.artifacts.payout import pay
from lichen.recipes.artifacts.verify import verify

RECIPE: dict[str, Any] = {
    "name": "valued",
    "task": "classify",
    "model": {"student": {"kind": "image-mlp", "width": 16}},
    "data": {
        "name": "digits",
        "partition": {"by": "dirichlet", "clients": 4, "alpha": 0.5},
        "on_single_class": "keep",
        "valid": 0.2,
        "test": 0.2,
        "public": {"share": 0.2, "labelled": 100, "unlabelled": 1},
    },
    "optimizer": {"name": "sgd", "lr": [0.1, 0.2], "grid_rounds": 1},
    "federation": {"rounds": 3, "local_steps": 3, "batch_size": 8, "aggregate": "mean"},
    "compare": {"baselines": []},
    "attack": {"kind": "sign_flip", "liars": 1, "scale": 3},
    "value": {"kind": "exact", "rows": "public"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valued") / "run"
    lichen.run(RECIPE, out=folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_files_and_columns_say_what_each_contributed(whole: Path) -> None:
    found, summary = read_contributions(whole), json.loads((whole / "summary.json").read_text())
    grid = f"lr={summary['extra']['lr.federated']:g}"
    assert found.column == f"federated/{grid}"
    assert list(found.rounds) == [1, 2, 3]
    assert abs(found.gap) < 1e-12
    assert [row["contribution"] for row in read_clients(whole)] == list(found.totals)
    lied = summary["attack"]["names"]
    assert [name for name, total in zip(found.clients, found.totals, strict=True) if total < 0] == lied
    assert summary["extra"]["value.negative"] == len(lied) == 1
    assert summary["extra"]["value.evaluations"] == 3 * 2**4
    assert summary["extra"]["value.seconds"] > 0
    assert (whole / "contributions.png").read_bytes()[:4] == b"\x89PNG"
    body = json.loads((whole / "contributions.json").read_text())
    assert len(body["lines"]) == 12
    counted = [one for at, one in found.rounds.items() if at <= found.until]
    assert sum(found.totals) == pytest.approx(counted[-1].after - counted[0].before, abs=1e-12)
    assert not list(whole.rglob("messages/*"))


def test_a_run_that_was_killed_and_goes_on_has_the_same_bytes_and_pays_the_same(whole: Path, tmp_path: Path) -> None:
    def killed(event: Event) -> None:
        if event.report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lichen.run(RECIPE, out=tmp_path / "run", observers=[killed])
    assert not (tmp_path / "run" / "contributions.json").exists()
    lichen.run(RECIPE, out=tmp_path / "run", resume=True)
    again = tmp_path / "run"
    for name in ("contributions.json", "contributions.png"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    shutil.copytree(whole, tmp_path / "whole")
    assert pay(again, "123.45") == pay(tmp_path / "whole", "123.45")
    assert (again / "payout.csv").read_bytes() == (tmp_path / "whole" / "payout.csv").read_bytes()


@pytest.mark.parametrize(("kind", "alone"), [("first", False), ("gtg", True)])
def test_values_at_spawned_nodes_are_those_of_one_process(tmp_path: Path, kind: str, alone: bool) -> None:
    data = {key: value for key, value in RECIPE["data"].items() if key != "public"}
    recipe = {
        **{**RECIPE, "data": {**data, "classes": [str(label) for label in range(10)]}, "attack": None},
        **{"optimizer": {"name": "sgd", "lr": 0.1}, "value": {"kind": kind}},
    }
    values = []
    for name in ("local", "spawned"):
        away = alone and name == "spawned"
        lichen.run({**recipe, "engine": {"name": name}}, out=tmp_path / name, server_alone=away)
        values.append([event.report.value for event in read_trace(tmp_path / name)])
    assert values[0] == values[1]
    assert all(values[0])


def test_a_payout_is_on_the_record_and_every_changed_byte_is_found(run: Path) -> None:
    before = verify(run)
    assert (before.values, before.payouts) == (12, 0)
    for times, by in enumerate(("value", "rows", "bytes", "equal"), start=1):
        found = pay(run, "1000.00", by=by)  # type: ignore[arg-type]
        rows = list(csv.DictReader((run / "payout.csv").read_text().splitlines()))
        assert sum(round(100 * float(row["paid"])) for row in rows) == 100_000
        assert [row["client"] for row in rows] == [one.client for one in found.clients]
        assert all(row["why"] for row in rows)
        after = verify(run)
        assert (after.payouts, after.others, after.key) == (times, (), before.key)
    assert len({one.cents for one in found.clients}) == 1
    payout = (run / "payout.csv").read_bytes()
    (run / "payout.csv").write_bytes(payout.replace(b"250.00", b"250.01", 1))
    with pytest.raises(LichenError, match="another file"):
        verify(run)
    (run / "payout.csv").write_bytes(payout)
    lines, _ = chain(run / "record.jsonl")
    (run / "record.jsonl").write_bytes(b"".join(map(canonical, lines[:-1])))
    with pytest.raises(LichenError, match="is not the record"):
        verify(run)


def test_who_made_the_model_worse_is_named_and_paid_nothing(run: Path) -> None:
    (liar,) = json.loads((run / "summary.json").read_text())["attack"]["names"]
    for one in pay(run, "50").clients:
        assert (one.cents == 0) == (one.client == liar)
        assert ("below zero" in one.why) == (one.client == liar)


def test_other_values_than_those_on_record_are_found(run: Path) -> None:
    text = (run / "contributions.json").read_text()
    body = json.loads(text)
    body["lines"][0]["value"] += 1
    (run / "contributions.json").write_text(json.dumps(body))
    with pytest.raises(LichenError, match="another file"):
        verify(run)


@pytest.mark.parametrize(
    ("words", "missing", "said"),
    [
        (["--budget", "0"], "", "--budget"),
        (["--budget", "ten"], "", "--budget"),
        (["--budget", "5", "--floor", "2"], "", "--floor"),
        (["--budget", "5"], "contributions.json", "contributions.json is missing"),
        (["--budget", "5"], "summary.json", "not finished"),
        (["--budget", "5"], "record.json", "record.json"),
        (["--budget", "5", "--by", "luck"], "", "luck"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    run: Path, words: list[str], missing: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing:
        (run / missing).unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["pay", str(run), *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_command_prints_a_line_a_client(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pay", str(run), "--budget", "12.34", "--by", "rows", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(one["cents"] for one in found["clients"]) == 1234
    assert main(["pay", str(run), "--budget", "12.34"]) == 0
    assert "below zero" in capsys.readouterr().out
    assert main(["verify", str(run)]) == 0
    assert "payouts   2" in capsys.readouterr().out
