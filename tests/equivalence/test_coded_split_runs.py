"""A split run whose crossings are coded and noisy: one run wherever it is computed, with its bytes counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import resume
import torch

import lichen
from lichen.core.store import load_tree
from lichen.engines.splitting.middle import Middle
from lichen.recipes.audit.crossings import split_audit
from support.forked_ranks import runs_on
from support.split_llama import made, save_all

SPLIT = {"client": {"first": 2, "last": 1}}
CODED = {**SPLIT, "code": ["int8"], "noise": 0.05}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("split"), clients=3)


def recipe(home: Path, **more: Any) -> dict[str, Any]:
    federation = {"rounds": 2, "local_epochs": 1, "local_steps": None}
    return made(home, federation=federation, compare={"baselines": ["base"], "forms": []}, **more)


@pytest.fixture(scope="module")
def coded(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lichen.run(recipe(home, split=CODED), out=tmp_path_factory.mktemp("coded") / "run").folder


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lichen.run(recipe(home, split=SPLIT), out=tmp_path_factory.mktemp("plain") / "run").folder


def state(folder: Path) -> dict[str, bytes]:
    found = {"state/final.safetensors": resume.result_bytes(folder)["state/final.safetensors"]}
    return found | {"clients.csv": (folder / "clients.csv").read_bytes()}


def summary(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return read


def test_eight_bits_cross_in_fewer_bytes_and_learn_nearly_the_same(plain: Path, coded: Path) -> None:
    before, after = summary(plain), summary(coded)
    assert after["bytes_up"] < 0.6 * before["bytes_up"]
    assert after["bytes_down"] < before["bytes_down"]
    assert state(coded) != state(plain)
    scores = [one["columns"]["federated"]["mean"] for one in (before, after)]
    assert scores[1] == pytest.approx(scores[0], rel=0.05)


def test_in_processes_it_is_one_run(home: Path, tmp_path: Path, coded: Path) -> None:
    lichen.run(recipe(home, split=CODED, engine={"name": "spawned", "nodes": 2}), out=tmp_path / "run")
    assert state(tmp_path / "run") == state(coded)
    assert summary(tmp_path / "run")["bytes_up"] == summary(coded)["bytes_up"]


class Killed(BaseException):
    """What a kill is to the process itself."""


def test_killed_at_a_question_and_resumed_it_is_one_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coded: Path
) -> None:
    answer, count = Middle.answer, [0]

    def killed(self: Middle, *values: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == 14:
            raise Killed
        return answer(self, *values, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Middle, "answer", killed)
        with pytest.raises(Killed):
            lichen.run(recipe(home, split=CODED), out=tmp_path / "cut")
    lichen.run(recipe(home, split=CODED), out=tmp_path / "cut", resume=True)
    assert state(tmp_path / "cut") == state(coded)


def test_the_summary_says_what_the_server_could_read(plain: Path, coded: Path) -> None:
    for folder in (plain, coded):
        extra = summary(folder)["extra"]
        assert extra["split.seen"].startswith("Who sees what crosses after block 2 reads")
        assert 0 <= extra["split.tokens read"] <= 1
    (found,) = split_audit(coded)
    assert found.cut == 2
    assert found.nbytes == 34


CHANGES = {**SPLIT, "code": ["change", "int4"]}


def remembered(folder: Path, side: str) -> dict[str, dict[str, torch.Tensor]]:
    """By client the newest of what one side remembers of its rows."""
    found = {}
    for at in folder.glob(f"state/federated/*/{side}/*/*"):
        newest = max(at.glob("*.safetensors"), key=lambda file: int(file.stem))
        tree = load_tree(newest)[0]
        found[at.name] = {name.removeprefix("crossed/"): x for name, x in tree.items()}
    return found


def agree(folder: Path) -> bool:
    """Whether both sides remember the same, to the bit."""
    mine, theirs = remembered(folder, "clients"), remembered(folder, "server")
    assert len(mine) == 3
    assert mine.keys() == theirs.keys()
    return all(
        mine[c].keys() == theirs[c].keys() and all(torch.equal(x, theirs[c][n]) for n, x in mine[c].items())
        for c in mine
    )


@pytest.fixture(scope="module")
def changes(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lichen.run(recipe(home, split=CHANGES), out=tmp_path_factory.mktemp("changes") / "run").folder


def test_of_rows_seen_before_the_change_crosses_and_both_sides_remember_the_same(
    home: Path, plain: Path, changes: Path
) -> None:
    assert agree(changes)
    before, after = summary(plain), summary(changes)
    assert after["bytes_up"] < before["bytes_up"]
    assert state(changes) != state(plain)


@pytest.mark.parametrize("name", ["spawned", "distributed"])
def test_changes_are_one_run_in_processes_and_on_ranks(home: Path, tmp_path: Path, changes: Path, name: str) -> None:
    what = recipe(home, split=CHANGES, engine={"name": name, "nodes": 2})

    def program() -> None:
        lichen.run(what, out=tmp_path / "run")

    if name == "distributed":
        runs_on(2, program)
    else:
        program()
    assert state(tmp_path / "run") == state(changes)
    assert summary(tmp_path / "run")["bytes_up"] == summary(changes)["bytes_up"]
    assert agree(tmp_path / "run")


@pytest.mark.parametrize("after", [3, 12])
def test_a_run_of_changes_that_was_killed_goes_on_with_what_both_remembered(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Path, after: int
) -> None:
    answer, count = Middle.answer, [0]

    def killed(self: Middle, *values: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == after:
            raise Killed
        return answer(self, *values, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Middle, "answer", killed)
        with pytest.raises(Killed):
            lichen.run(recipe(home, split=CHANGES), out=tmp_path / "cut")
    lichen.run(recipe(home, split=CHANGES), out=tmp_path / "cut", resume=True)
    assert state(tmp_path / "cut") == state(changes)
    assert agree(tmp_path / "cut")
    assert summary(tmp_path / "cut")["bytes_up"] == summary(changes)["bytes_up"]
