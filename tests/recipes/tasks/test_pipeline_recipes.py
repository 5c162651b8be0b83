"""A recipe with hosts: one process or several, killed or resumed, one trajectory; and nobody holds the whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.replies import Reply
from lichen.core.seeds import derive
from lichen.core.tree import digest
from lichen.models.adapters.wrap import wrap
from lichen.models.loading.load import base_digest, load_causal
from lichen.models.pieces.carve import carve
from lichen.models.pieces.load_piece import load_piece
from lichen.recipes.assemble.column import recipe_engine
from lichen.recipes.assemble.model import spec_of
from lichen.recipes.assemble.pieces.hosts import Hosts
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.sections.compare import CompareConfig
from lichen.recipes.schema.yaml import dump_yaml
from lichen.recipes.tasks.hosts import pipeline as task
from support import tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_llama.save_model(folder / "model")
    tiny_llama.save_rows(folder / "pair.jsonl", "pair", clients=3, rows=8)
    return folder


def values(home: Path, **more: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "pipeline": {"hosts": 2, "micro": 3},
        "compare": {"baselines": ["base"]},
        "federation": {"rounds": 2, "clients_per_round": 2},
    }
    for name, section in more.items():
        whole[name] = {**whole.get(name, {}), **section} if isinstance(section, dict) else section
    return tiny_llama.recipe(home / "model", home / "pair.jsonl", "pair", **whole)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(home: Path) -> lichen.Result:
    """All hosts in one process."""
    return lichen.run(values(home), out=home / "local")


def test_one_process_learns(alone: lichen.Result) -> None:
    columns = alone.summary["columns"]
    assert columns["federated"]["mean"] < columns["base"]["mean"]
    assert alone.summary["extra"]["hosts.blocks"] == "1, 1"
    assert 0 < alone.summary["extra"]["hosts.idle"] < 1
    assert alone.summary["bytes_up"] > 0


def test_orders_of_the_schedule_end_with_the_same_bytes(home: Path, alone: lichen.Result, tmp_path: Path) -> None:
    run = lichen.run(values(home, pipeline={"schedule": "gpipe"}), out=tmp_path / "run")
    assert adapter(run.folder) == adapter(alone.folder)


def test_a_code_of_links_is_the_same_run_in_processes_and_learns(
    home: Path, alone: lichen.Result, tmp_path: Path
) -> None:
    coded = {"code": ["int8"]}
    here = lichen.run(values(home, pipeline=coded), out=tmp_path / "here")
    there = lichen.run(values(home, pipeline=coded, engine={"name": "spawned", "nodes": 2}), out=tmp_path / "there")
    assert adapter(here.folder) == adapter(there.folder) != adapter(alone.folder)
    assert here.summary["columns"]["federated"]["mean"] < here.summary["columns"]["base"]["mean"]
    assert here.summary["bytes_up"] < alone.summary["bytes_up"]


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(home: Path, alone: lichen.Result, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(event: Any) -> None:
        if event.report.round == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        lichen.run(values(home), out=tmp_path / "run", observers=[stop])
    run = lichen.run(values(home), out=tmp_path / "run", resume=True)
    assert adapter(run.folder) == adapter(alone.folder)


def test_nobody_has_the_whole_model(home: Path) -> None:
    recipe = read_recipe(values(home))
    whole, _ = load_causal(home / "model")
    numbers = sum(x.numel() for x in whole.parameters())
    hosts = Hosts(recipe)
    # Whoever runs the recipe: shapes alone, but for what no file holds.
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in hosts.structure.parameters()}
    assert sum(stored.values()) < 0.05 * 4 * numbers
    assert digest(hosts.start.trainable) == digest(tiny_start(recipe, whole))
    for stage, share in enumerate(hosts.shares):
        node = Hosts(recipe)
        model = node.piece(stage).wrapped.model
        assert sum(x.numel() for x in model.parameters()) == pytest.approx(share * numbers)
        assert share < 0.6
        assert set(node._loaded) == {stage}
        assert base_digest(load_piece(home / "model", stage, stage + 1)) == base_digest(carve(whole, stage, stage + 1))


def tiny_start(recipe: Recipe, whole: Any) -> dict[str, torch.Tensor]:
    return wrap(whole, spec_of(recipe, whole)).init(derive(recipe.seed, "init"))


class Killing:
    """Kills a host's process at given replies, counted from the beginning."""

    def __init__(self, inner: Any, at: Collection[int]) -> None:
        self.inner, self.at, self.count = inner, set(at), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def replies(self, numbers: Collection[int], until: float = float("inf")) -> Iterator[Reply]:
        for reply in self.inner.replies(numbers, until):
            self.count += 1
            if self.count in self.at:
                child = list(self.inner.sites.children.values())[self.count % 2].process
                child.kill()
                child.wait()
            yield reply


def test_a_host_that_is_killed_is_replaced_and_costs_no_byte(
    home: Path, alone: lichen.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, lost = list[Killing](), list[int]()

    def killing(*some: Any, **more: Any) -> Any:
        engines.append(Killing(recipe_engine(*some, **more), (7,)))
        return engines[-1]

    monkeypatch.setattr(task, "recipe_engine", killing)
    recipe = values(home, engine={"name": "spawned"}, compare={"baselines": []})
    watch = [lambda event: lost.append(sum(event.report.attendance.refused.values()))]
    run = lichen.run(recipe, out=tmp_path / "run", observers=watch)
    assert (lost, len(engines)) == ([1, 0], 1)
    assert engines[0].count > 7
    assert adapter(run.folder) == adapter(alone.folder)
    assert run.summary["columns"]["federated"] == alone.summary["columns"]["federated"]


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"task": "classify"}, "pipeline"),
        ({"model": {"adapter": {"kind": "ia3", "target_modules": ["q_proj"]}}}, "model.adapter.kind"),
        ({"optimizer": {"name": "mezo", "lr": [0.1]}}, "optimizer.name"),
        ({"optimizer": {"lr": [0.1, 0.2]}}, "optimizer.lr"),
        ({"engine": {"name": "distributed"}}, "engine.name"),
        ({"compare": {"baselines": ["base", "pooled"]}}, "compare.baselines"),
        ({"federation": {"server": {"momentum": 0.5}}}, "federation.server.momentum"),
        ({"wire": {"up": ["int8"]}}, "wire.up"),
        ({"engine": {"packing": False}}, "engine.packing"),
        ({"pipeline": {"parts": [1, 1, 1]}}, "pipeline.parts"),
        ({"pipeline": {"hosts": 1}}, "pipeline.hosts"),
        ({"pipeline": {"micro": 1000000}}, "pipeline.micro"),
    ],
)
def test_what_hosts_do_not_read_is_refused(home: Path, more: dict[str, Any], where: str) -> None:
    with pytest.raises(LichenError) as caught:
        read_recipe(values(home, **more))
    assert caught.value.where == where
    assert caught.value.fix


def test_a_key_that_neither_hosts_nor_the_baselines_read_is_left_out_once(home: Path) -> None:
    file, notes = home / "alone.yaml", list[str | None]()
    compare = {"baselines": ["base", "alone", "alone_best", "pooled"], "alone_epochs": 3}
    file.write_text(dump_yaml({**values(home), "pipeline": None, "compare": compare}), encoding="utf-8")
    recipe = read_recipe(str(file), ["pipeline.hosts=2", "compare.baselines=[base]"], note=notes.append)
    assert recipe.compare.alone_epochs == CompareConfig().alone_epochs
    assert len([note for note in notes if "compare.alone_epochs" in str(note)]) == 1


def test_hosts_that_do_not_suit_the_model_are_refused(home: Path, tmp_path: Path) -> None:
    for section, where in (({"hosts": 3}, "pipeline.hosts"), ({"parts": [1, 2]}, "pipeline.parts")):
        with pytest.raises(LichenError) as caught:
            lichen.run(values(home, pipeline=section), out=tmp_path / "run")
        assert caught.value.where == where
    assert (
        Hosts(read_recipe(values(home))).text == "hosts hold 1 blocks (50% of the model), 1 blocks (50% of the model)"
    )
    with pytest.raises(LichenError, match="others hold the rows"):
        lichen.run(values(home, engine={"name": "spawned"}), out=tmp_path / "run", server_alone=True)
