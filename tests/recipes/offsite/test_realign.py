"""FedBiOT's turn: the owner patches the emulator's middle between rounds; a stop changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.models.offsite.training import batch_of, relative_distance
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.offsite.emulate import emulate
from lichen.recipes.offsite.plug import plug
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.offsite.owner_columns import open_owner
from lichen.recipes.tasks.offsite.realign import _hidden
from support.tiny_llama import WORDS, recipe, save_model, save_rows


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``model`` of six blocks, its emulator ``emu``, rows, public text, and runs ``on`` and ``off``."""
    top = tmp_path_factory.mktemp("realign")
    save_model(top / "model", layers=6)
    save_rows(top / "rows.jsonl", "pair", clients=3)
    lines = [json.dumps({"text": " ".join((WORDS * 8)[i * 7 : i * 7 + 70])}) for i in range(30)]
    (top / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    emulate(str(top / "model"), out=top / "emu", ends="2,1", layers=2)
    lichen.run(page(top), out=top / "on")
    lichen.run(page(top, realign=None), out=top / "off")
    return top


def page(top: Path, /, **more: Any) -> dict[str, Any]:
    realign = {"every": 2, "steps": 6, "public": str(top / "text.jsonl"), "rank": 4, "lr": 1e-2}
    offsite = {"model": str(top / "model"), "realign": more.pop("realign", realign)}
    engine = {"packing": False, **more.pop("engine", {})}  # bits do not depend on who else is computed
    sections: dict[str, Any] = {
        "offsite": offsite,
        "engine": engine,
        "federation": {"rounds": 4, "valid_every": 4},
        **more,
    }
    return recipe(top / "emu", top / "rows.jsonl", "pair", **sections)


def final(folder: Path) -> Tree:
    return load_tree(folder / "state" / "final.safetensors")[0]


def test_the_middle_alone_is_patched_and_comes_nearer_to_the_model(there: Path) -> None:
    shared = Shared.of_flat(final(there / "on"))
    assert {name.split(".")[2] for name in shared.patch} == {"2", "3"}
    assert {name.split(".")[2] for name in shared.trainable} == {"0", "1", "4"}
    assert not Shared.of_flat(final(there / "off")).patch
    loaded = open_recipe(read_recipe(page(there)))
    owner = open_owner(loaded, str(there / "model"), lambda line: None)
    inputs = batch_of([list(range(6, 40)), list(range(9, 30))], (0, 1), 0)
    student, teacher = owner.emulator.wrapped, owner.ends.model.wrapped  # type: ignore[attr-defined]
    ends = {name: x[None] for name, x in shared.trainable.items()}
    moved = {name.replace("layers.4", "layers.5"): x for name, x in ends.items()}
    with torch.no_grad():
        target = _hidden(teacher, moved, {}, inputs, 1)
        near, far = (_hidden(student, ends, patch, inputs, 1) for patch in (shared.fixed, {}))
        distances = [float(relative_distance(x, target, inputs["attention_mask"])) for x in (near, far)]
    assert distances[0] < 0.9 * distances[1]


def test_nothing_of_the_patch_goes_into_the_model(there: Path, tmp_path: Path) -> None:
    config = json.loads((there / "on" / "adapter" / "adapter_config.json").read_text())
    assert {name.split(".")[2] for name in config["target_modules"]} == {"0", "1", "4"}
    plug(there / "on", str(there / "model"), out=tmp_path / "new")
    summary = json.loads((there / "on" / "summary.json").read_text())
    assert summary["bytes_down"] > json.loads((there / "off" / "summary.json").read_text())["bytes_down"]


def test_a_stopped_run_goes_on_to_the_same_bytes_and_so_do_spawned_clients(there: Path, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if event.report.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lichen.run(page(there), out=tmp_path / "stopped", observers=[stop])
    lichen.run(page(there), out=tmp_path / "stopped", resume=True)
    lichen.run(page(there, engine={"name": "spawned", "nodes": 1}), out=tmp_path / "spawned")
    expected = final(there / "on")
    for name in ("stopped", "spawned"):
        found = final(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(x, expected[key]) for key, x in found.items()), name


def test_what_does_not_go_with_it_is_refused(there: Path, tmp_path: Path) -> None:
    for more in (
        {"federation": {"aggregate": "fedex"}},
        {"model": {"adapter": {"kind": "bitfit"}}},
        {"wire": {"down": ["int8"]}},
        {"federation": {"layer_groups": 2}},
        {"federation": {"ranks": [2, 1]}},
    ):
        with pytest.raises(LichenError, match="offsite"):
            read_recipe(page(there, **more))
    emulate(str(there / "model"), out=tmp_path / "low", ends="0,2", layers=2)
    refused = page(there)
    refused["model"]["name"] = str(tmp_path / "low")
    with pytest.raises(LichenError) as error:
        lichen.run(refused, out=tmp_path / "run")
    assert error.value.where == "offsite.realign"
