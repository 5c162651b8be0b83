"""Who validates, which round is kept for parts that stay at home, and whose bytes are told: from recipe to summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.rounds import load_state
from lichen.core.store import load_tree
from lichen.present.report import summary_table
from lichen.present.trace import read_trace
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import validators_of
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe
from lichen.server.sampling import validators
from support.tiny_llama import recipe, save_model, save_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair", clients=7)
    return folder


def run(home: Path, out: Path, **more: Any) -> lichen.Result:
    return lichen.run(recipe(home / "model", home / "rows.jsonl", "pair", **more), out=out)


def scores(result: lichen.Result) -> dict[str, torch.Tensor]:
    return load_tree(result.folder / "state" / "scores" / "federated.safetensors")[0]


def best_of(result: lichen.Result) -> int:
    return load_state(next((result.folder / "state" / "federated").glob("*/server.safetensors"))).best_round


AT_HOME: dict[str, Any] = {
    "federation": {"aggregate": "fedsa", "rounds": 6, "clients_per_round": 4, "local_steps": 4, "batch_size": 4}
}
STEEP: dict[str, Any] = {**AT_HOME, "optimizer": {"lr": [0.05]}, "engine": {"packing": False}}


@pytest.fixture(scope="module")
def at_home(home: Path, tmp_path_factory: pytest.TempPathFactory) -> lichen.Result:
    return run(home, tmp_path_factory.mktemp("steep") / "run", **STEEP)


def test_parts_at_home_are_scored_as_they_were_in_the_best_round(
    home: Path, tmp_path: Path, at_home: lichen.Result
) -> None:
    best = best_of(at_home)
    assert 1 <= best < 5  # the law below says nothing of a run whose last round is its best
    short = {**STEEP, "federation": {**STEEP["federation"], "rounds": best}}
    stopped_there = run(home, tmp_path / "short", **short)
    assert best_of(stopped_there) == best
    for name, x in scores(stopped_there).items():
        assert torch.equal(x, scores(at_home)[name])
    assert at_home.summary["columns"] == stopped_there.summary["columns"]
    # The last round's own score is another: it was scored before, and is no better by validation.
    valid = [e.report.metrics["valid"] for e in read_trace(at_home.folder)]
    assert min(valid) == valid[best - 1] < valid[-1]


@pytest.mark.parametrize("cut", [3, 5, 6])
def test_a_kill_keeps_what_the_best_round_left_at_home(
    home: Path, tmp_path: Path, at_home: lichen.Result, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = RunFolder.save, [0]

    def save_and_die(folder: RunFolder, path: Path, state: Any) -> None:
        saves[0] += 1
        if saves[0] == cut:
            raise KeyboardInterrupt
        save(folder, path, state)

    monkeypatch.setattr(RunFolder, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "cut", **STEEP)
    monkeypatch.undo()
    known = read_recipe(recipe(home / "model", home / "rows.jsonl", "pair", **STEEP))
    again = lichen.run(known, out=tmp_path / "cut", resume=True)
    assert again.summary["columns"] == at_home.summary["columns"]


def test_nodes_of_their_own_keep_it_too(home: Path, tmp_path: Path, at_home: lichen.Result) -> None:
    there = run(home, tmp_path / "there", **{**STEEP, "engine": {"packing": False, "name": "spawned", "nodes": 2}})
    assert there.summary["columns"] == at_home.summary["columns"]
    assert best_of(there) == best_of(at_home)


def test_a_sample_validates_in_the_rounds_and_everybody_is_scored(home: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"federation": {"rounds": 2, "local_steps": 2, "batch_size": 4, "valid_clients": 3}}
    known = read_recipe(recipe(home / "model", home / "rows.jsonl", "pair", **sections))
    judges = validators_of(open_recipe(known).experiment.server)
    assert len(judges) == 3
    result = lichen.run(known, out=tmp_path / "run")
    assert scores(result)["count"].shape == (7,)
    traffic = result.summary["traffic"]
    assert traffic["validators"] == 3
    assert 0 < traffic["valid_down"] < traffic["down"]
    assert traffic["up"] + traffic["valid_up"] == result.summary["bytes_up"]
    assert traffic["down"] + traffic["valid_down"] == result.summary["bytes_down"]
    shown = [str(cell) for column in summary_table(result.summary).columns for cell in column.cells]
    assert "clients validating in a round" in shown
    assert any("for validation" in cell for cell in shown)


def test_whoever_is_few_all_validate_and_no_key_changes_a_byte(home: Path, tmp_path: Path) -> None:
    left = []
    for name, most in (("default", 64), ("seven", 7), ("none", None), ("all", "all")):
        result = run(home, tmp_path / name, federation={"rounds": 2, "local_steps": 1, "valid_clients": most})
        assert result.summary["traffic"]["validators"] == 7
        left.append({f: (result.folder / "state" / f).read_bytes() for f in ("final.safetensors",)})
        left[-1]["numbers"] = repr([e.report.metrics for e in read_trace(result.folder)]).encode()
    assert left[0] == left[1] == left[2] == left[3]


def test_the_sample_is_drawn_once_of_those_that_can() -> None:
    rows = [0, 3, 1, 0, 2, 5, 1, 1]
    first = validators(rows, 3, 11)
    assert first == validators(rows, 3, 11)
    assert len({validators(rows, 3, seed) for seed in range(20)}) > 5
    assert all(rows[c] > 0 for seed in range(20) for c in validators(rows, 3, seed))
    assert validators(rows, None, 0) == validators(rows, 8, 0) == tuple(range(8))
    assert validators([0, 0, 0], 2, 0) != ()
