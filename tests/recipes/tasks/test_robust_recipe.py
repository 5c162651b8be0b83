"""A robust rule in a recipe gives the same bytes in any process, and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.rounds import load_state
from lichen.core.tree import digest
from lichen.present.trace import read_trace
from lichen.recipes.schema.read import read_recipe

SMALL = (
    "federation.rounds=3",
    "federation.local_steps=2",
    "federation.robust={rule: multi_krum, mixing: true}",
    "optimizer.lr=[0.1]",
    "compare.baselines=[]",
    "data.partition.clients=6",
)


def recipe(*more: str) -> Any:
    return read_recipe("digits", [*SMALL, *more])


def learned(folder: Path) -> str:
    (checkpoint,) = (folder / "state").rglob("server.safetensors")
    return digest(load_state(checkpoint).shared.flat())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> lichen.Result:
    return lichen.run(recipe("federation.robust.liars=1"), out=tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("engine", ["spawned", "distributed"])
def test_other_processes_give_the_same_bytes(whole: lichen.Result, tmp_path: Path, engine: str) -> None:
    there = lichen.run(recipe(f"engine={{name: {engine}, nodes: 2}}"), out=tmp_path / "run")
    assert learned(there.folder) == learned(whole.folder)
    reports = [[event.report.metrics for event in read_trace(run.folder)] for run in (whole, there)]
    assert reports[0] == reports[1]


def test_a_stopped_run_goes_on_to_the_same_bytes(whole: lichen.Result, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(event: Any) -> None:
        if event.report.round == 2:
            raise StopError

    with pytest.raises(StopError):
        lichen.run(recipe(), out=tmp_path / "run", observers=[stop])
    lichen.run(recipe(), out=tmp_path / "run", resume=True)
    assert learned(tmp_path / "run") == learned(whole.folder)


def test_the_rule_stands_in_the_place_of_the_mean(whole: lichen.Result, tmp_path: Path) -> None:
    mean = lichen.run(recipe("federation.robust=null"), out=tmp_path / "mean")
    assert learned(mean.folder) != learned(whole.folder)
    assert all(event.report.metrics["clients"] == 6 for event in read_trace(whole.folder))
