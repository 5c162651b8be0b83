"""Every method is a word in a recipe: two rounds of each on a real encoder and real reviews, and what it promises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.core.store import load_tree
from lichen.data.sources.catalog import fetch_entry
from lichen.recipes.schema.read import read_recipe
from support.peft_names import with_peft_names

NESTEROV = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
SMALL = [
    "data.max_clients=3",
    "data.max_rows=16",
    "data.max_length=16",
    "data.test_rows=4",
    "federation.rounds=2",
    "federation.clients_per_round=3",
    "federation.local_steps=2",
    "federation.batch_size=4",
    "federation.valid_every=1",
    "optimizer.lr=5e-3",
    "compare.baselines=[]",
]
RANK = "model.adapter.rank=4"
METHODS = {
    "fedit": ["federation.aggregate=fedit"],
    "ffa": ["federation.aggregate=ffa"],
    "ffa changes": ["federation.aggregate=ffa", "wire.down=float32"],
    "rolora": ["federation.aggregate=rolora"],
    "fedsa": ["federation.aggregate=fedsa"],
    "fedex": ["federation.aggregate=fedex", "federation.ranks=[4, 2]"],
    "flora": ["federation.aggregate=flora", "federation.ranks=[4, 2]"],
    "flexlora": ["federation.aggregate=flexlora", "federation.ranks=[4, 2]"],
    "florist": ["federation.aggregate=florist"],
    "fedsvd": ["federation.aggregate=fedsvd"],
    "hetlora": ["federation.aggregate=hetlora", "federation.ranks=[4, 2]"],
    "rslora": ["model.adapter.rslora=true"],
    "layers": ["federation.layer_groups=2"],
    "ia3": ["model.adapter.kind=ia3", "model.adapter.target_modules=[key, value]"],
    "prompt": ["model.adapter.kind=prompt", "model.adapter.num_virtual_tokens=4"],
    "prefix": ["model.adapter.kind=prefix", "model.adapter.num_virtual_tokens=4"],
    "bottleneck": ["model.adapter.kind=bottleneck", "model.adapter.width=4"],
    "bitfit": ["model.adapter.kind=bitfit"],
    "full": [
        "model.adapter={kind: full, modules_to_save: []}",
        *("data.max_clients=2", "federation.clients_per_round=2", "federation.local_steps=1"),
        "optimizer.lr=1e-4",
    ],
    "scaffold": ["optimizer={name: scaffold, lr: 0.1}", "federation.aggregate=mean"],
    "feddyn": ["optimizer={name: feddyn, lr: 0.1}", "federation.aggregate=mean"],
    "fednova": ["optimizer={name: fednova, lr: 0.1}", "federation.aggregate=mean"],
    "mezo": ["optimizer.name=mezo", "optimizer.lr=1e-3"],
    "kseed": [
        "optimizer={name: kseed, lr: 1e-5, seeds: 64}",
        "model.adapter={kind: full, exclude: [embeddings]}",
        "engine.clients_per_block=1",
    ],
    "nf4": ["model.quantize=nf4"],
    "diloco": ["federation.keep_optimizer=true", "federation.server={lr: 0.7, momentum: 0.9, nesterov: true}"],
    "int4": ["wire.up=['topk:1/32', int4]", "wire.down=['topk:1/8', int4]"],
    "sketch": ["wire.up=['sketch:2', bf16]"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of each method, made when it is first asked for."""
    for name in ("minilm-l6", "clothing-reviews"):
        try:
            fetch_entry(name)
        except LichenError as error:
            pytest.skip(f"{name} cannot be fetched here: {error}")
    done = {}

    def run(name: str) -> Any:
        if name not in done:
            rank = [] if any("adapter.kind" in word or "kind: full" in word for word in METHODS[name]) else [RANK]
            recipe = read_recipe("reviews-lora", [*SMALL, *rank, *METHODS[name]])
            done[name] = lichen.run(recipe, out=tmp_path_factory.mktemp(name) / "run")
        return done[name]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_learns_something_and_is_scored(runs: Any, name: str) -> None:
    result = runs(name)
    column = result.summary["columns"]["federated"]
    assert 0 <= column["mean"] <= 1
    state = load_state(next((result.folder / "state" / "federated").glob("*/server.safetensors")))
    assert state.round == 2
    assert math.isfinite(state.best_value)
    moved = [x for n, x in state.optimizer.items() if n.startswith("m/")] or list(state.shared.trainable.values())
    assert all(x.isfinite().all() for x in moved)
    assert result.summary["bytes_up"] > 0 < result.summary["bytes_down"]


def test_what_is_frozen_or_at_home_is_not_sent(runs: Any) -> None:
    up = {name: runs(name).summary["traffic"]["client_up"] for name in ("fedit", "ffa", "fedsa", "rolora")}
    assert up["ffa"] < 0.75 * up["fedit"]
    assert up["fedsa"] < 0.75 * up["fedit"]
    assert up["ffa"] <= up["rolora"] <= up["fedit"]
    shared = load_tree(runs("fedsa").folder / "state" / "final.safetensors")[0]
    assert all(not x.any() for n, x in shared.items() if n.endswith("lora_B"))
    down = {name: runs(name).summary["traffic"]["client_down"] for name in ("fedit", "ffa changes")}
    assert down["ffa changes"] < 0.75 * down["fedit"]


def test_coded_messages_are_small(runs: Any) -> None:
    plain, coded = runs("fedit").summary["traffic"], runs("int4").summary["traffic"]
    assert coded["client_up"] < plain["client_up"] / 60
    assert coded["client_down"] < plain["client_down"] / 10


def test_a_patch_is_exported_with_the_adapter(runs: Any) -> None:
    folder = lichen.export(runs("flora").folder, merge=True)
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(x.isfinite().all() for x in model.parameters())


@pytest.mark.parametrize("name", ["full", "bottleneck", "bitfit", "ia3", "prompt", "prefix"])
def test_what_was_learned_loads_elsewhere(runs: Any, name: str) -> None:
    import peft
    import transformers

    folder = runs(name).folder
    if name in ("ia3", "prompt", "prefix"):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(fetch_entry("minilm-l6"), num_labels=5)
        model = peft.PeftModel.from_pretrained(with_peft_names(base), folder / "adapter")
    elif name == "bottleneck":
        with pytest.raises(LichenError, match="bottleneck"):
            lichen.export(folder, merge=True)
        return
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(lichen.export(folder, merge=True))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[101, 2307, 102]])).logits
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()


def test_a_language_model_is_pre_trained_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))
    words = [f"the {a} {b} {c}" for a in ("old", "new", "big") for b in ("cat", "dog") for c in ("sat", "ran", "ate")]
    rows = [{"client": who, "text": " ".join(words[k:] + words[:k])} for who in ("ann", "bob") for k in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "task": "chat",
        "model": {"scratch": {"vocabulary": 300, "width": 16, "layers": 2, "heads": 2}, "adapter": {"kind": "full"}},
        "data": {"name": str(tmp_path / "rows.jsonl"), "form": "stream", "max_length": 16},
        "optimizer": {"lr": [5e-3]},
        "federation": {"rounds": 3, "local_steps": 6, "keep_optimizer": True, "server": NESTEROV},
        "compare": {"baselines": ["base"]},
    }
    result = lichen.run(recipe, out=tmp_path / "run")
    columns = result.summary["columns"]
    assert columns["federated"]["mean"] < 0.8 * columns["base"]["mean"]
    model = transformers.AutoModelForCausalLM.from_pretrained(lichen.export(result.folder, merge=True))
    assert model.config.num_hidden_layers == 2
    assert len(list((tmp_path / "cache" / "private").glob("scratch-*"))) == 1


def test_a_target_tells_what_it_took_to_get_there(tmp_path: Path) -> None:
    few = ["federation.rounds=4", "compare.baselines=[]"]
    near = lichen.run(read_recipe("digits", [*few, "compare.target=2.29"]), out=tmp_path / "near").summary["extra"]
    far = lichen.run(read_recipe("digits", [*few, "compare.target=0.0"]), out=tmp_path / "far").summary["extra"]
    assert 1 <= near["target.rounds"] <= 4
    assert near["target.bytes"] > 0
    assert far["target.rounds"] is None
    assert far["target.bytes"] is None
