"""A simulation with the whole model beside its emulator: each of the owner's columns is that of a run by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.recipes.offsite.emulate import emulate
from lichen.recipes.offsite.plug import plug
from support.tiny_llama import recipe, save_model, save_rows

LORA = {"target_modules": ["q_proj", "up_proj"], "rank": 2, "alpha": 4}
FAST: dict[str, Any] = {
    "engine": {"packing": False},
    "federation": {"rounds": 1},
    "compare": {"baselines": ["base", "pooled"]},
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``model`` of six blocks, its emulator ``emu``, rows, and a run ``chat`` with the owner's columns."""
    top = tmp_path_factory.mktemp("owner")
    save_model(top / "model", layers=6)
    save_rows(top / "rows.jsonl", "pair", clients=3)
    save_rows(top / "labels.jsonl", "label", clients=3)
    emulate(str(top / "model"), out=top / "emu", ends="2,1", layers=2)
    lichen.run(page(top, "emu", offsite={"model": str(top / "model")}), out=top / "chat")
    return top


def page(top: Path, model: str, /, **more: Any) -> dict[str, Any]:
    adapter = {**LORA, **more.pop("adapter", {})}
    return recipe(top / model, top / "rows.jsonl", "pair", model={"adapter": adapter}, **{**FAST, **more})


def means(folder: Path) -> dict[str, float]:
    summary = json.loads((folder / "summary.json").read_text())
    both = {**summary["columns"], **summary["extra_columns"]}
    return {name: score["mean"] for name, score in both.items() if score is not None}


def test_the_owner_s_columns_are_those_of_runs_by_hand(there: Path, tmp_path: Path) -> None:
    found = means(there / "chat")
    assert {"base", "federated", "emulator", "emulator_base", "pooled", "plugged", "full"} <= set(found)
    assert found["emulator"] == found["federated"]
    # The same recipe on the model: its bare score, and what one owner of all rows makes of all blocks.
    lichen.run(page(there, "model"), out=tmp_path / "model")
    by_hand = means(tmp_path / "model")
    assert found["base"] == by_hand["base"]
    assert found["full"] == by_hand["pooled"]
    # The same on the emulator, whose columns know nothing of the model.
    lichen.run(page(there, "emu"), out=tmp_path / "emu")
    alone = means(tmp_path / "emu")
    assert (found["emulator_base"], found["federated"], found["pooled"]) == tuple(
        alone[name] for name in ("base", "federated", "pooled")
    )
    # What was plugged, by the command, is where a run starts that begins with it.
    plug(there / "chat", str(there / "model"), out=tmp_path / "new")
    begun = page(there, "model", adapter={"init_from": str(tmp_path / "new"), "target_modules": "all-linear"})
    lichen.run(begun, out=tmp_path / "plugged")
    assert found["plugged"] == pytest.approx(means(tmp_path / "plugged")["base"], rel=1e-6)
    assert found["plugged"] != pytest.approx(found["base"], rel=1e-4)
    extra = json.loads((there / "chat" / "summary.json").read_text())["extra"]
    assert "clients hold 5 of 6 blocks" in extra["offsite"]
    share = (found["plugged"] - found["base"]) / (found["full"] - found["base"])
    assert extra["offsite.share of the full gain"] == pytest.approx(share)


def test_spawned_clients_give_the_same_columns(there: Path, tmp_path: Path) -> None:
    spawned = page(
        there, "emu", offsite={"model": str(there / "model")}, engine={"name": "spawned", "nodes": 1, "packing": False}
    )
    lichen.run(spawned, out=tmp_path / "spawned")
    assert means(tmp_path / "spawned") == means(there / "chat")


def test_a_classifier_and_whole_weights_have_them_too(there: Path, tmp_path: Path) -> None:
    for name, adapter in (("lora", LORA), ("full", {"kind": "full"})):
        label = recipe(
            there / "emu",
            there / "labels.jsonl",
            "label",
            model={"adapter": adapter},
            offsite={"model": str(there / "model")},
            **{key: value for key, value in FAST.items() if key != "engine"},
        )
        lichen.run(label, out=tmp_path / name)
        assert {"emulator", "plugged", "full"} <= set(means(tmp_path / name))


def test_what_does_not_go_with_it_is_refused(there: Path, tmp_path: Path) -> None:
    save_model(there / "other", layers=6, seed=1)
    offsite = {"model": str(there / "model")}
    for refused, where in (
        (page(there, "model", offsite=offsite), "offsite.model"),
        (page(there, "emu", offsite={"model": str(there / "other")}), "offsite.model"),
        (page(there, "emu", offsite={}), "offsite.model"),
        (page(there, "emu", offsite=offsite, stream={"by": "month"}), "stream"),
        (page(there, "emu", offsite=offsite, federation={"rounds": 1, "aggregate": "fedsa"}), "federation.aggregate"),
    ):
        with pytest.raises(LichenError) as error:
            lichen.run(refused, out=tmp_path / "run")
        assert where in str(error.value)
        assert not (tmp_path / "run").exists()
    with pytest.raises(LichenError) as error:
        lichen.run(
            page(there, "emu", offsite=offsite, engine={"name": "spawned", "nodes": 2}),
            out=tmp_path / "run",
            server_alone=True,
        )
    assert error.value.where == "offsite"
