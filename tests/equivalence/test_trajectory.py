"""One trajectory: alone, in company, in other processes, killed and resumed - the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resume
import torch

import lichen
from lichen.core.rounds import load_state
from lichen.core.seeds import numpy_generator
from lichen.core.store import load_tree, save_tree
from lichen.core.tree import norm_C
from lichen.present.trace import read_trace
from lichen.recipes.assemble.run_folder import RunFolder
from support.tiny_llama import recipe, save_model, save_rows
from support.warm import warm_children


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair")
    return folder


@pytest.mark.parametrize("aggregate", ["fedit", "fedex"])
def test_any_block_and_other_processes_give_the_same_bytes(home: Path, tmp_path: Path, aggregate: str) -> None:
    engines: dict[str, dict[str, object]] = {
        f"block-{n}": {"name": "local", "clients_per_block": n, "packing": False} for n in (1, 3, 8)
    }
    if aggregate == "fedit":
        engines["spawned"] = {"name": "spawned", "nodes": 1, "packing": False}
    results = {}
    for name, engine in engines.items():
        federation = {"aggregate": aggregate, "clients_per_round": 4}
        made = recipe(home / "model", home / "rows.jsonl", "pair", engine=engine, federation=federation)
        run = lichen.run(made, out=tmp_path / name)
        results[name] = {
            file: data
            for file, data in resume.result_bytes(run.folder).items()
            if file != "summary.json"  # it holds the recipe's digest, and that the engine's name
        }
        assert run.summary["bytes_up"] > 0
    first = results["block-1"]
    assert "state/final.safetensors" in first
    assert any(name.startswith("adapter/") for name in first) or aggregate == "fedex"
    for name, result in results.items():
        assert [file for file in first.keys() | result.keys() if first.get(file) != result.get(file)] == [], name


def test_packed_blocks_of_any_size_follow_the_padded_run(home: Path, tmp_path: Path) -> None:
    engines: dict[str, dict[str, object]] = {
        "padded": {"packing": False},
        "block-1": {"clients_per_block": 1},
        "block-3": {"clients_per_block": 3},
        "measured": {},
        "again": {"gradient_checkpointing": True},
    }
    finals = {}
    for name, engine in engines.items():
        federation = {"aggregate": "fedit", "clients_per_round": 4}
        made = recipe(home / "model", home / "rows.jsonl", "pair", engine=engine, federation=federation)
        finals[name], _ = load_tree(lichen.run(made, out=tmp_path / name).folder / "state" / "final.safetensors")
    start = finals["padded"]
    for name, final in finals.items():
        for key, x in final.items():
            far = float((x - start[key]).norm() / start[key].norm().clamp(min=1e-6))
            # Adam turns a rounding of a gradient near zero into a step: a run drifts further than a step does.
            assert far <= 1e-3, (name, key)
    blocks = list((tmp_path / "measured").rglob("blocks.json"))
    assert blocks
    assert all(block >= 1 for file in blocks for block in json.loads(file.read_text())["blocks"].values())


def test_runs_killed_at_random_moments_resume_to_the_same_bytes(tmp_path: Path, warm_folder: Path) -> None:
    def by_command(folder: Path) -> object:
        with warm_children(warm_folder):  # it is those that are killed that start as ever
            return resume.by_command(folder)

    settings = ["data.max_clients=3", "federation.rounds=5", "optimizer.lr=[0.1,0.3]", "optimizer.grid_rounds=2"]
    settings += ["compare.baselines=[alone,alone_best]", "compare.alone_epochs=4", "compare.alone_patience=1"]
    wanted = resume.result_bytes(lichen.run(lichen.read_recipe("digits", settings), out=tmp_path / "whole").folder)
    events = read_trace(tmp_path / "whole")
    span = sum(event.report.seconds for event in events)
    ways: tuple[Callable[[Path], object], ...] = (
        by_command,
        lambda folder: lichen.run(folder / "recipe.yaml", out=folder, resume=True),
    )
    done = [
        resume.kill_and_resume(
            "digits",
            tmp_path / f"killed-{i}",
            wanted,
            after=float(moment),
            settings=settings,
            since="trace.jsonl",
            go_on=way,
        )
        for i, (moment, way) in enumerate(zip(numpy_generator(0, "kills").uniform(0, 0.8 * span, 2), ways, strict=True))
    ]
    assert [kill.differing for kill in done] == [(), ()]
    assert any(kill.hit and 0 < kill.rounds < len(events) for kill in done)


class Killed(BaseException):
    """What a kill is to the process itself."""


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A recipe of three columns, and what its run leaves."""
    made = recipe(home / "model", home / "rows.jsonl", "pair", compare={"baselines": ["alone", "pooled"]})
    return made, resume.result_bytes(lichen.run(made, out=tmp_path_factory.mktemp("whole") / "run").folder)


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_around_the_checkpoint_loses_and_doubles_no_line(
    whole: tuple[dict[str, Any], dict[str, bytes]], tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, left_whole = whole
    save, left = RunFolder.save, [5]  # the second round of the second column

    def save_and_die(folder: RunFolder, path: Path, state: object) -> None:
        left[0] -= 1
        if left[0] == 0 and before:
            raise Killed
        save(folder, path, state)  # type: ignore[arg-type]
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(RunFolder, "save", save_and_die)
    with pytest.raises(Killed):
        lichen.run(made, out=tmp_path / "cut")
    monkeypatch.undo()
    resumed = resume.result_bytes(lichen.run(made, out=tmp_path / "cut", resume=True).folder)
    names = left_whole.keys() | resumed.keys()
    assert [name for name in names if left_whole.get(name) != resumed.get(name)] == []
    told = [(e.column, e.report.round) for e in read_trace(tmp_path / "cut")]
    assert told == [(c, r) for c in ("federated", "alone", "pooled") for r in (1, 2, 3)]


def test_what_a_folder_says_is_finished_is_what_its_checkpoints_hold(home: Path, tmp_path: Path) -> None:
    made = recipe(home / "model", home / "rows.jsonl", "pair")
    folder = lichen.run(made, out=tmp_path / "run").folder
    mark = (folder / "state" / "recipe.sha256").read_text()
    assert RunFolder(folder, recipe_sha256=mark).finished() == {("federated", "lr=0.02"): 3}
    assert load_state(folder / "state" / "federated" / "lr=0.02" / "server.safetensors").round == 3
    with pytest.raises(lichen.LichenError, match="another recipe"):
        lichen.run({**made, "seed": 1}, out=folder, resume=True)
    with pytest.raises(lichen.LichenError, match="is not empty"):
        lichen.run(made, out=folder)


def test_a_norm_does_not_depend_on_the_order_of_names(tmp_path: Path) -> None:
    # Trees that were read back have their names in another order than those that were made.
    generator = torch.Generator().manual_seed(0)
    tree = {f"layer{i}": torch.randn(1, 37, generator=generator) * 10**i for i in range(-3, 4)}
    norms = {float(norm_C({name: tree[name] for name in order})[0]) for order in (tree, list(tree)[::-1], sorted(tree))}
    assert len(norms) == 1
    save_tree(tmp_path / "a", tree)
    save_tree(tmp_path / "b", dict(reversed(tree.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
