"""More rounds for a finished run, and rounds that end early: each equals the run it should equal, or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.core.store import load_tree
from lichen.present.trace import read_trace
from lichen.recipes.artifacts import more_rounds as longer
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import recipe, save_model, save_rows

ALL = {"baselines": ["base", "alone", "pooled"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair")
    return folder


def made(home: Path, rounds: int, **more: Any) -> dict[str, Any]:
    federation = {"rounds": rounds, "local_steps": 2, "clients_per_round": 3, **more.pop("federation", {})}
    return recipe(home / "model", home / "rows.jsonl", "pair", federation=federation, **more)


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_tree(folder / "state" / "final.safetensors")[0]


def equal(a: lichen.Result, b: lichen.Result) -> None:
    for key in ("columns", "share_gaining", "bytes_up", "bytes_down", "traffic", "extra", "recipe_sha256"):
        assert a.summary[key] == b.summary[key], key
    assert final(a.folder).keys() == final(b.folder).keys()
    assert all(torch.equal(x, final(b.folder)[name]) for name, x in final(a.folder).items())
    assert (a.folder / "clients.csv").read_bytes() == (b.folder / "clients.csv").read_bytes()
    assert (a.folder / "recipe.yaml").read_bytes() == (b.folder / "recipe.yaml").read_bytes()
    told = [[(e.column, e.grid, e.report.round, e.report.metrics) for e in read_trace(r.folder)] for r in (a, b)]
    assert sorted(map(repr, told[0])) == sorted(map(repr, told[1]))


CASES: dict[str, dict[str, Any]] = {
    "averaged": {"compare": ALL, "engine": {"packing": False}},
    "a grid, at home": {
        "optimizer": {"lr": [0.01, 0.05], "grid_rounds": 1},
        "federation": {"aggregate": "fedsa"},
        "compare": {"baselines": ["alone"]},
        "engine": {"packing": False},
    },
    "coded, momentum": {
        "federation": {"server": {"momentum": 0.5}},
        "wire": {"up": ["int8"], "down": ["int4~"]},
        "engine": {"packing": False},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_given_more_rounds_is_the_run_that_had_them_from_the_start(home: Path, tmp_path: Path, name: str) -> None:
    whole = lichen.run(made(home, 4, **CASES[name]), out=tmp_path / "whole")
    first = lichen.run(made(home, 2, **CASES[name]), out=tmp_path / "longer")
    assert first.summary["traffic"]["rounds"] == 2
    if name == "coded, momentum":
        assert first.summary["columns"]["federated"] != whole.summary["columns"]["federated"]
    again = lichen.run(made(home, 4, **CASES[name]), out=tmp_path / "longer", resume=True)
    equal(again, whole)
    assert (
        lichen.run(made(home, 4, **CASES[name]), out=tmp_path / "longer", resume=True).summary["columns"]
        == (whole.summary["columns"])
    )


def test_in_nodes_of_their_own_and_by_the_command(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, Any] = {"engine": {"packing": False, "name": "spawned", "nodes": 1}}
    whole = lichen.run(made(home, 3, engine={"packing": False}), out=tmp_path / "whole")
    lichen.run(made(home, 2, **plain), out=tmp_path / "there")
    words = ["run", "--resume", str(tmp_path / "there"), "--quiet"]
    assert cli.main([*words, "-s", "federation.rounds=3", "-s", "optimizer.lr=0.1"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert cli.main([*words, "-s", "federation.rounds=3"]) == 0
    assert "by client: " in capsys.readouterr().out
    assert all(torch.equal(x, final(tmp_path / "there")[name]) for name, x in final(whole.folder).items())
    assert read_recipe(tmp_path / "there" / "recipe.yaml").federation.rounds == 3
    assert cli.main([*words, "-s", "federation.rounds=1"]) == 2
    assert "cannot be taken back" in capsys.readouterr().err


@pytest.fixture(scope="module")
def of_one_and_two(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[lichen.Result, lichen.Result]:
    """Runs of one round and of two."""
    folder = tmp_path_factory.mktemp("rounds")
    one, two = (lichen.run(made(home, rounds), out=folder / str(rounds)) for rounds in (1, 2))
    return one, two


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_kill_while_rounds_are_given_leaves_a_run_that_can_be_resumed(
    home: Path,
    tmp_path: Path,
    of_one_and_two: tuple[lichen.Result, lichen.Result],
    at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, whole = of_one_and_two
    long = made(home, 2)
    shutil.copytree(short.folder, tmp_path / "run")
    write, writes = longer.write_atomic, [0]

    def write_and_die(path: Path, data: bytes) -> None:
        writes[0] += 1
        if writes[0] == at:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(longer, "write_atomic", write_and_die)
    if at < 4:
        with pytest.raises(KeyboardInterrupt):
            lichen.run(long, out=tmp_path / "run", resume=True)
    monkeypatch.undo()
    mine = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert lichen.run(mine, out=tmp_path / "run", resume=True).summary["traffic"]["rounds"] == mine.federation.rounds
    equal(lichen.run(long, out=tmp_path / "run", resume=True), whole)


def test_what_would_be_another_run_is_refused_and_what_differs_is_said(home: Path, tmp_path: Path) -> None:
    falling = made(home, 1, optimizer={"schedule": "cosine"})
    lichen.run(falling, out=tmp_path / "falling")
    before = (tmp_path / "falling" / "recipe.yaml").read_bytes()
    with pytest.raises(LichenError, match="cosine learning rate") as caught:
        lichen.run(made(home, 2, optimizer={"schedule": "cosine"}), out=tmp_path / "falling", resume=True)
    assert caught.value.where == "federation.rounds"
    assert (tmp_path / "falling" / "recipe.yaml").read_bytes() == before
    odd = {"federation": {"valid_every": 2}}
    lichen.run(made(home, 1, **odd), out=tmp_path / "odd")
    said: list[str] = []
    lichen.run(made(home, 2, **odd), out=tmp_path / "odd", resume=True, say=said.append)
    assert any("round 1 was validated" in line for line in said)
    with pytest.raises(LichenError, match="made by another recipe"):
        lichen.run(made(home, 3, optimizer={"lr": [0.5]}), out=tmp_path / "odd", resume=True)


PATIENT: dict[str, Any] = {
    "optimizer": {"lr": [0.5]},
    "federation": {"patience": 2},
    "compare": {"baselines": ["alone", "pooled"]},
    "engine": {"packing": False},
}


def test_rounds_end_when_patience_does_in_every_column(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = lichen.run(made(home, 12, **PATIENT), out=tmp_path / "patient")
    seen: dict[str, list[float]] = {}
    most = {}
    for event in read_trace(patient.folder):
        seen.setdefault(event.column, []).append(event.report.metrics["valid"])
        most[event.column] = event.total_rounds
    assert len(seen["federated"]) < most["federated"] == most["pooled"] == 12
    assert most["alone"] == 8
    for column, values in seen.items():
        best = min(range(len(values)), key=values.__getitem__)
        assert len(values) == min(most[column], best + 1 + 2)
    # Ended early, it holds what a run of so many rounds holds.
    stopped = len(seen["federated"])
    without = {**PATIENT, "federation": {}, "compare": {"baselines": []}}
    short = lichen.run(made(home, stopped, **without), out=tmp_path / "short")
    assert all(torch.equal(x, final(short.folder)[name]) for name, x in final(patient.folder).items())
    assert patient.summary["bytes_down"] == short.summary["bytes_down"]
    save, saves = RunFolder.save, [0]

    def save_and_die(folder: RunFolder, path: Path, state: Any) -> None:
        save(folder, path, state)
        saves[0] += 1
        if saves[0] == stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        lichen.run(made(home, 12, **PATIENT), out=tmp_path / "cut")
    monkeypatch.undo()
    again = lichen.run(made(home, 12, **PATIENT), out=tmp_path / "cut", resume=True)
    assert again.summary["columns"] == patient.summary["columns"]
    assert load_state(next((tmp_path / "cut/state/federated").glob("*/server.safetensors"))).round == stopped
