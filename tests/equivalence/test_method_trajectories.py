"""One trajectory for every method: in blocks of any size, in another process, killed and resumed - the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import resume

import lichen
from lichen.recipes.assemble.run_folder import RunFolder
from support.tiny_llama import recipe, save_model, save_rows

FULL = {"adapter": {"kind": "full"}}
NESTEROV = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
METHODS: dict[str, dict[str, Any]] = {
    "coded": {"wire": {"up": ["topk:1/8", "int4"], "down": ["int4~"]}, "federation": {"clients_per_round": 3}},
    "coded turns": {"wire": {"up": ["int8"]}, "federation": {"aggregate": "rolora", "clients_per_round": 3}},
    "at home": {"federation": {"aggregate": "fedsa", "clients_per_round": 3}},
    "passes": {
        "federation": {
            "local_steps": None,
            "local_epochs": 2,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "weighting": "rows",
            "clients_per_round": 3,
        }
    },
    "unequal": {"federation": {"aggregate": "flexlora", "ranks": [2, 1], "clients_per_round": 3}},
    "pulled": {"personal": {"kind": "ditto"}, "federation": {"clients_per_round": 3}},
    "mixed": {"personal": {"kind": "apfl"}, "federation": {"clients_per_round": 3}},
    "learned start": {"personal": {"kind": "fedala", "start_rate": 9.0}, "federation": {"clients_per_round": 3}},
    "side by side": {"personal": {"kind": "feddpa", "in_turns": True}, "federation": {"clients_per_round": 3}},
    "side by side after": {"personal": {"kind": "feddpa", "steps": [1, 3]}},
    "rest of the world": {
        "personal": {"kind": "fedalt"},
        "federation": {"clients_per_round": 3, "weighting": "uniform"},
    },
    "paid in coordinates": {"federation": {"reward": "cgsv"}},
    "norms": {"model": FULL, "personal": {"kind": "norms"}, "optimizer": {"lr": [1e-3]}},
    "fine-tuned": {"personal": {"kind": "finetune", "steps": [1, 3]}},
    "stacked": {"federation": {"aggregate": "flora", "clients_per_round": 3}},
    "turned": {"federation": {"aggregate": "fedsvd"}},
    "layers": {"federation": {"layer_groups": 2}},
    "ia3": {"model": {"adapter": {"kind": "ia3", "target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}}},
    "prefix": {"model": {"adapter": {"kind": "prefix", "num_virtual_tokens": 3}}},
    "seeds": {"model": FULL, "optimizer": {"name": "kseed", "lr": [1e-4], "seeds": 32}},
    "controls": {
        "optimizer": {"name": "scaffold", "lr": [0.05], "weight_decay": 0.1},
        "federation": {"aggregate": "mean", "clients_per_round": 3, "layer_groups": 2, "server": {"lr": 0.7}},
    },
    "held": {
        "optimizer": {"name": "feddyn", "lr": [0.05], "alpha": 0.1},
        "federation": {"aggregate": "mean", "clients_per_round": 3},
    },
    "reaching": {
        "optimizer": {"name": "fednova", "lr": [0.05], "momentum": 0.5},
        "federation": {"aggregate": "mean", "clients_per_round": 3, "local_steps": None, "local_epochs": 1},
    },
    "slopes": {"optimizer": {"name": "mezo", "lr": [1e-4]}},
    "workers": {
        "model": FULL,
        "optimizer": {"lr": [1e-3]},
        "federation": {
            "keep_optimizer": True,
            "stream_fragments": 2,
            "drop_prob": 0.4,
            "server": NESTEROV,
            "aggregate": "mean",
        },
    },
    "asked": {
        "model": {"adapter": {"kind": "prompt", "num_virtual_tokens": 3}},
        "optimizer": {"name": "cma", "lr": [0.3], "dimensions": 8},
    },
}
OWN_CALLS = ("seeds", "workers", "asked", "norms")
"""Methods with which every client has a call of its own, so that no rows are packed."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair")
    return folder


def made(home: Path, method: str, **engine: Any) -> dict[str, Any]:
    """A method's recipe; its model section keeps the tiny model's name."""
    padded = {} if method in OWN_CALLS else {"packing": False}
    sections = {**METHODS[method], "engine": {**padded, **engine}}
    adapter = sections.pop("model", {}).get("adapter")
    known = recipe(home / "model", home / "rows.jsonl", "pair", **sections)
    return known if adapter is None else {**known, "model": {**known["model"], "adapter": adapter}}


def left_by(folder: Path) -> dict[str, bytes]:
    # The summary holds the recipe's digest, and that the engine's name.
    return {file: data for file, data in resume.result_bytes(folder).items() if file != "summary.json"}


def differing(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    return [file for file in a.keys() | b.keys() if a.get(file) != b.get(file)]


class Killed(BaseException):
    """What a kill is to the process itself."""


@pytest.mark.parametrize("name", METHODS)
def test_blocks_of_any_size_and_a_kill_give_the_same_bytes(
    home: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = left_by(lichen.run(made(home, name, clients_per_block=1), out=tmp_path / "one").folder)
    assert "state/final.safetensors" in whole
    save, saves = RunFolder.save, [0]

    def save_and_die(folder: RunFolder, path: Path, state: Any) -> None:
        saves[0] += 1
        if saves[0] == 2:
            raise Killed
        save(folder, path, state)

    monkeypatch.setattr(RunFolder, "save", save_and_die)
    # In blocks of another size and killed: where either changed a byte, it would be seen.
    with pytest.raises(Killed):
        lichen.run(made(home, name, clients_per_block=3), out=tmp_path / "cut")
    monkeypatch.undo()
    again = lichen.run(made(home, name, clients_per_block=3), out=tmp_path / "cut", resume=True)
    assert differing(whole, left_by(again.folder)) == []


@pytest.mark.parametrize("name", ["coded", "at home", "pulled", "passes", "seeds", "controls"])
def test_another_process_gives_the_same_bytes(home: Path, tmp_path: Path, name: str) -> None:
    here = left_by(lichen.run(made(home, name), out=tmp_path / "here").folder)
    there = left_by(lichen.run(made(home, name, name="spawned", nodes=1), out=tmp_path / "there").folder)
    assert differing(here, there) == []
