"""Clients are unlearned from language models and from adapters of other rules as from small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core import tree as trees
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.withdrawal.near import unlearn
from lichen.recipes.withdrawal.options import NearOptions
from lichen.recipes.withdrawal.request import read_request
from support.tiny_llama import recipe, save_model, save_rows

FINAL = Path("state/final.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("adapters")
    save_model(home / "model")
    save_rows(home / "pairs.jsonl", "pair", clients=4)
    return home


def done(home: Path, name: str, **more: Any) -> Path:
    if not (home / name).exists():
        federation = {"history": True, "rounds": 2, **more}
        page = recipe(home / "model", home / "pairs.jsonl", "pair", federation=federation)
        lichen.run(page, out=home / name)
    return home / name


@pytest.mark.parametrize(
    ("name", "more", "how"),
    [
        ("plain", {}, "npo"),
        ("plain", {}, "negate"),
        ("ffa", {"aggregate": "ffa"}, "eraser"),
        ("fedex", {"aggregate": "fedex"}, "eraser"),
        ("epochs", {"local_epochs": 2, "local_steps": None}, "eraser"),
    ],
)
def test_a_chat_adapter_is_unlearned(home: Path, tmp_path: Path, name: str, more: dict[str, Any], how: str) -> None:
    old = done(home, name, **more)
    found = unlearn(read_request(old, "person-1", how, tmp_path / "new"), NearOptions(every=1, rounds=1, repair=1))
    assert (tmp_path / "new" / "adapter").is_dir()
    proof = found["proof"]
    assert proof["rows"] > 0
    assert proof["new"]["train"] != proof["old"]["train"]
    if how == "npo":
        assert proof["new"]["train"] > proof["old"]["train"]
    new, before = (load_tree(folder / FINAL)[0] for folder in (tmp_path / "new", old))
    assert new.keys() == before.keys()


def test_the_loss_of_a_row_is_that_of_its_labelled_tokens(home: Path, tmp_path: Path) -> None:
    """By the model of cohorts, one row at a time."""
    old = done(home, "plain")
    found = unlearn(read_request(old, "person-1", "negate", tmp_path / "new"), NearOptions(repair=0))
    experiment = open_recipe(recipe_of(old)).experiment
    shared, losses = Shared.of_flat(load_tree(tmp_path / "new" / FINAL)[0]), []
    source = experiment.evaluating([experiment.clients.train[1]])
    with torch.no_grad():
        for batch in source.batches((0,), 0):
            loss_CB, count_CB = experiment.model.losses(trees.broadcast(shared.trainable, 1), shared.fixed, batch)
            losses += (loss_CB[0] / count_CB[0]).double()[count_CB[0] > 0].tolist()
    assert len(losses) == found["proof"]["rows"]
    assert found["proof"]["new"]["train"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
