"""A split run has the bytes of one in which clients hold the whole: on ranks, in processes, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import resume
import torch
from safetensors.torch import load_file

import lichen
from lichen.engines.splitting.middle import Middle
from support import tiny_llama
from support.forked_ranks import runs_on
from support.pieces import four_blocks
from support.split_llama import made, save_all
from support.tiny_llama import save_rows

SPLIT = {"client": {"first": 2, "last": 1}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("split"), clients=3)


def recipe(home: Path, **more: Any) -> dict[str, Any]:
    federation = {"rounds": 2, "local_epochs": 1, "local_steps": None}
    return made(home, federation=federation, compare={"baselines": ["base"], "forms": []}, **more)


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lichen.run(recipe(home), out=tmp_path_factory.mktemp("plain") / "run").folder


@pytest.fixture(scope="module")
def split(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lichen.run(recipe(home, split=SPLIT), out=tmp_path_factory.mktemp("split-run") / "run").folder


def state(folder: Path) -> dict[str, bytes]:
    """What was learned, and what it scored."""
    found = {"state/final.safetensors": resume.result_bytes(folder)["state/final.safetensors"]}
    return found | {"clients.csv": (folder / "clients.csv").read_bytes()}


def sent(folder: Path) -> tuple[int, int]:
    summary = json.loads((folder / "summary.json").read_text())
    return summary["bytes_up"], summary["bytes_down"]


def test_v1_is_federated_averaging_of_the_whole_to_the_byte(plain: Path, split: Path) -> None:
    assert state(split) == state(plain)
    assert sent(split) > sent(plain)


@pytest.mark.parametrize("name", ["spawned", "distributed"])
def test_in_processes_and_on_ranks_it_is_one_run(home: Path, tmp_path: Path, split: Path, name: str) -> None:
    what = recipe(home, split=SPLIT, engine={"name": name, "nodes": 2})

    def program() -> None:
        lichen.run(what, out=tmp_path / "run")

    if name == "distributed":
        runs_on(2, program)
    else:
        program()
    assert state(tmp_path / "run") == state(split)
    assert sent(tmp_path / "run") == sent(split)


class Killed(BaseException):
    """What a kill is to the process itself."""


@pytest.mark.parametrize(("kind", "after"), [("v1", 5), ("v2", 8), ("v2", 14)])
def test_killed_at_a_question_and_resumed_it_is_one_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, after: int
) -> None:
    what = recipe(home, split={**SPLIT, "kind": kind})
    whole = lichen.run(what, out=tmp_path / "whole").folder
    answer, count = Middle.answer, [0]

    def killed(self: Middle, *values: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == after:
            raise Killed
        return answer(self, *values, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Middle, "answer", killed)
        with pytest.raises(Killed):
            lichen.run(what, out=tmp_path / "cut")
    lichen.run(what, out=tmp_path / "cut", resume=True)
    assert state(tmp_path / "cut") == state(whole)
    assert sent(tmp_path / "cut") == sent(whole)


def test_unequal_ranks_and_cuts_go_together(home: Path, tmp_path: Path) -> None:
    unequal = {"rounds": 1, "local_steps": 1, "ranks": [2, 1], "aggregate": "flexlora"}
    runs = [
        lichen.run(made(home, federation=unequal, **more), out=tmp_path / str(len(more))).folder
        for more in ({}, {"split": {"client": {"first": [3, 1], "last": 1}}})
    ]
    assert state(runs[0]) == state(runs[1])


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_classifier_is_split_with_its_head_at_the_client(home: Path, tmp_path: Path, name: str) -> None:
    four_blocks(name).save_pretrained(tmp_path / "model")
    for file in (home / "small").glob("*token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    save_rows(tmp_path / "rows.jsonl", "label", clients=2)
    targets = {"bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"]}[name]
    what = tiny_llama.recipe(
        tmp_path / "model",
        tmp_path / "rows.jsonl",
        "label",
        model={"adapter": {"target_modules": targets, "rank": 2, "alpha": 4}},
        engine={"packing": False},
        federation={"rounds": 1, "local_steps": 2},
    )
    runs = [
        lichen.run({**what, **more}, out=tmp_path / str(len(more))).folder
        for more in ({}, {"split": {"client": {"first": 1, "last": 2}}})
    ]
    assert state(runs[0]) == state(runs[1])


@pytest.mark.parametrize("code", [[], ["change", "int4"]])
def test_a_split_run_is_replayed_and_a_client_forgotten_as_in_any_other(
    home: Path, tmp_path: Path, code: list[str]
) -> None:
    federation = {"rounds": 2, "local_steps": 1, "history": True}
    what = made(home, federation=federation, split={**SPLIT, "code": code}, engine={"history": 1})
    whole = lichen.run(what, out=tmp_path / "whole")
    again, saved = lichen.replay(whole.folder), load_file(whole.folder / "state" / "final.safetensors")
    assert saved.keys() == again.shared.flat().keys()
    assert all(torch.equal(x, saved[name]) for name, x in again.shared.flat().items())
    if not code:  # what is scored crosses coded in a run, and not here
        assert again.mean == pytest.approx(whole.summary["columns"]["federated"]["mean"], abs=1e-9)
    name = json.loads((whole.folder / "roster.json").read_text())["members"][1]["name"]
    lichen.forget(whole.folder, name, out=tmp_path / "forgotten")
    absent = lichen.run({**what, "federation": {**federation, "absent": [name]}}, out=tmp_path / "absent").folder
    assert state(tmp_path / "forgotten")["state/final.safetensors"] == state(absent)["state/final.safetensors"]
