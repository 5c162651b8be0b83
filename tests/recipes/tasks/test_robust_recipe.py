"""A robust rule in a recipe gives the same bytes in any process, and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lichen
from lichen.core.rounds import load_state
from lichen.core.tree import digest
from lichen.present.trace import read_trace
from lichen.recipes.schema.read import read_recipe
from support import tiny_llama

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


BUFFERED = ("federation.schedule={kind: buffered, arrivals: 5, concurrency: 6}", "engine.clock={median: 60}")
LIE = "attack={kind: sign_flip, liars: 1, scale: 50}"


def test_a_buffered_step_is_the_rules_choice_among_those_that_arrived(tmp_path: Path) -> None:
    def tensors(name: str, *more: str) -> torch.Tensor:
        found = lichen.run(recipe(*BUFFERED, *more), out=tmp_path / name).folder
        events = read_trace(found)
        if "federation.robust=null" not in more:
            assert all(event.report.metrics["clients"] == 5 for event in events)
            assert any(event.report.metrics.get("age", 0) > 0 for event in events), "late messages count, too"
        (checkpoint,) = (found / "state").rglob("server.safetensors")
        return torch.cat([x.flatten() for _, x in sorted(load_state(checkpoint).shared.trainable.items())])

    honest = tensors("honest")
    far = {name: float((tensors(name, LIE, *more) - honest).norm()) for name, more in LED.items()}
    assert 10 * far["rule"] < far["mean"]


LED = {"rule": (), "mean": ("federation.robust=null",)}


def test_each_layer_of_lora_chooses_by_its_products_in_a_run(tmp_path: Path) -> None:
    model = tiny_llama.save_model(tmp_path / "model")
    data = tiny_llama.save_rows(tmp_path / "rows.jsonl", "pair", clients=6)

    def learned_by(of: str, **more: Any) -> dict[str, torch.Tensor]:
        robust = {"rule": "multi_krum", "liars": 1, "of": of}
        made = tiny_llama.recipe(model, data, "pair", federation={"rounds": 2, "robust": robust}, **more)
        run = lichen.run(made, out=tmp_path / f"{of}-{len(more)}").folder
        assert all(event.report.metrics["clients"] == 6 for event in read_trace(run))
        return load_file(run / "adapter" / "adapter_model.safetensors")

    products, factors = learned_by("products"), learned_by("factors")
    assert all(bool(x.isfinite().all()) for x in products.values())
    assert any(not torch.equal(products[name], factors[name]) for name in products)
    lied = learned_by("products", attack={"kind": "sign_flip", "liars": 1, "scale": 1000.0})
    assert max(float((lied[name] - products[name]).abs().max()) for name in products) < 1, "the liar leads no layer"
