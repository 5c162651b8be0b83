"""A client's own model out of a run's folder: PEFT computes with it what the client's score was made of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lichen
from lichen.core.errors import LichenError
from lichen.present.clients import read_clients
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe
from support.own_runs import made, save_home

CLIENTS = 3
FEDERATION = {"rounds": 3, "clients_per_round": CLIENTS, "local_steps": 4, "batch_size": 4, "weighting": "uniform"}
KINDS: dict[str, dict[str, Any]] = {
    "ditto": {"kind": "ditto", "mu": 0.5},
    "apfl": {"kind": "apfl"},
    "fedala": {"kind": "fedala", "start_rate": 5.0},
    "finetune": {"kind": "finetune", "steps": [2, 6]},
    "feddpa": {"kind": "feddpa", "steps": [6], "anchors": 0},
    "feddpa in turns": {"kind": "feddpa", "in_turns": True, "anchors": 0},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_home(tmp_path_factory.mktemp("own"), clients=CLIENTS)


def grid(home: Path, personal: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Of two rates, unless one is given."""
    return made(home, personal, **{"federation": FEDERATION, "optimizer": {"lr": [0.02, 0.05]}, **more})


def perplexity(model: Any, shard: Any) -> float:
    """Of a client's test rows, one by one."""
    total, count = 0.0, 0
    for row in range(shard.size):
        ids, labels = (torch.tensor(x.astype("int64"))[None] for x in (shard.input_ids[row], shard.labels[row]))
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        number = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * number, count + number
    return math.exp(total / count)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_with_it_the_score_that_the_client_has(home: Path, tmp_path: Path, kind: str) -> None:
    known = grid(home, KINDS[kind])
    run = lichen.run(known, out=tmp_path / "run")
    rows = read_clients(run.folder)
    loaded = open_recipe(read_recipe(known))
    client = 1
    where = lichen.export(run.folder, client=rows[client]["client"])
    assert where.parent == run.folder / "own"
    assert where.stat().st_mode & 0o077 == 0
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    own = peft.PeftModel.from_pretrained(base, where).eval()
    shard = loaded.experiment.clients.test[client]
    assert perplexity(own, shard) == pytest.approx(rows[client]["personal"], rel=1e-4)
    assert perplexity(own, shard) != pytest.approx(rows[client]["federated"], rel=1e-4)
    merged = lichen.export(run.folder, client=rows[client]["client"], merge=True)
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert perplexity(whole, shard) == pytest.approx(rows[client]["personal"], rel=1e-4)


@pytest.mark.parametrize("personal", [{"kind": "feddpa", "in_turns": True}, {"kind": "fedalt"}], ids=str)
def test_a_pair_whose_weight_differs_is_written_as_two_and_says_so(
    home: Path, tmp_path: Path, personal: dict[str, Any]
) -> None:
    run = lichen.run(grid(home, personal), out=tmp_path / "run")
    name = read_clients(run.folder)[0]["client"]
    where = lichen.export(run.folder, client=name, out=tmp_path / "two")
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    both = peft.PeftModel.from_pretrained(base, where / "own", adapter_name="own")
    both.load_adapter(where / "other", adapter_name="other")
    assert json.loads((where / "own" / "adapter_config.json").read_text())["r"] == 2
    weights = load_file(where / "weights.safetensors")
    assert weights.keys() == {"center"} if personal["kind"] == "feddpa" else all("lora_gate" in x for x in weights)
    assert "side by side" in (where / "README.md").read_text()
    with pytest.raises(LichenError, match="leave it out"):
        lichen.export(run.folder, client=name, merge=True)


def test_a_students_own_model_has_the_form_of_the_shared_one(tmp_path: Path) -> None:
    words = ("personal.kind=ditto", "federation.rounds=1", "optimizer.lr=0.1", "compare.baselines=[]")
    run = lichen.run(read_recipe("digits", [*words, "data.partition.test=own"]), out=tmp_path / "run")
    where = lichen.export(run.folder, client="client-002")
    shared, own = (load_file(one / "model.safetensors") for one in (run.folder / "model", where))
    assert own.keys() == shared.keys()
    assert any(not torch.equal(own[name], x) for name, x in shared.items())
    assert (where / "config.json").read_bytes() == (run.folder / "model" / "config.json").read_bytes()
    with pytest.raises(LichenError, match="whole as it is"):
        lichen.export(run.folder, client="client-002", merge=True)


def test_who_has_nothing_of_its_own_is_told_so(home: Path, tmp_path: Path) -> None:
    plain = lichen.run(grid(home, None, optimizer={"lr": [0.02]}), out=tmp_path / "plain")
    with pytest.raises(LichenError, match="share one model"):
        lichen.export(plain.folder, client="person-0")
    own = lichen.run(grid(home, KINDS["ditto"], optimizer={"lr": [0.02]}), out=tmp_path / "own")
    with pytest.raises(LichenError, match=r"person-9(.|\n)*person-0"):
        lichen.export(own.folder, client="person-9")
