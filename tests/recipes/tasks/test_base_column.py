"""The column ``base`` is the bare model, in the form that is best where nothing is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.store import load_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.columns import adapt
from support.tiny_llama import recipe, save_model, save_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair")
    return folder


def made(home: Path, **compare: Any) -> dict[str, Any]:
    more = {"baselines": ["base"], **compare}
    return recipe(home / "model", home / "rows.jsonl", "pair", federation={"rounds": 1}, compare=more)


def test_the_form_is_chosen_on_validation_rows_and_scored_on_test_rows(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = RunFolder.tree
    losses = {"base.plain.valid": 1.0, "base.plain": 9.0, "base.transcript.valid": 2.0}

    def with_losses(folder: RunFolder, name: str, make: Any, **more: Any) -> Tree:
        def changed() -> Tree:
            found = dict(make())
            return found | {"loss_sum": found["count"] * losses[name]} if name in losses else found

        return tree(folder, name, changed, **more)

    monkeypatch.setattr(RunFolder, "tree", with_losses)
    result = lichen.run(made(home, forms=["plain"]), out=tmp_path / "run")
    extra, base = result.summary["extra"], result.summary["columns"]["base"]
    assert extra["base.form"] == "plain"
    assert base["mean"] == extra["base.plain"] == pytest.approx(torch.tensor(9.0).exp().item(), rel=1e-4)
    assert extra["base.transcript"] < extra["base.plain"]


def test_without_other_forms_nothing_is_scored_twice(home: Path, tmp_path: Path) -> None:
    result = lichen.run(made(home), out=tmp_path / "run")
    scores = {path.stem for path in (result.folder / "state" / "scores").glob("base*")}
    assert scores == {"base"}
    assert result.summary["extra"]["base.form"] == "transcript"


def test_validation_and_test_rows_of_a_form_are_other_rows(home: Path, tmp_path: Path) -> None:
    folder = lichen.run(made(home, forms=["plain", "chat"]), out=tmp_path / "run").folder
    scores = folder / "state" / "scores"
    for form in ("plain", "chat"):
        tested, valid = (load_tree(scores / f"base.{form}{part}.safetensors")[0] for part in ("", ".valid"))
        assert not torch.equal(tested["loss_sum"], valid["loss_sum"])


def test_base_is_the_bare_model_whatever_helped_the_federation_to_start(home: Path, tmp_path: Path) -> None:
    bare = open_recipe(read_recipe(made(home))).experiment
    start = bare.server.start
    moved = bare.with_server(start=Shared({name: x + 0.5 for name, x in start.trainable.items()}))
    found = [
        adapt(
            experiment, RunFolder(tmp_path / name, recipe_sha256="0" * 64), lambda _: None, lambda _: None, plain=bare
        )
        for name, experiment in (("bare", bare), ("moved", moved))
    ]
    assert torch.equal(found[0]["base"].value_N, found[1]["base"].value_N)
    assert not torch.equal(found[0]["federated"].value_N, found[1]["federated"].value_N)
