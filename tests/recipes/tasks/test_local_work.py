"""What a client does in a round and what it weighs: epochs, accumulation and n_k, from recipe to tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.collecting.collect import drain
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import load_tree
from lichen.present.trace import read_trace
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.workload import alone_rounds, pooled_experiment
from lichen.recipes.schema.read import read_recipe, write_recipe
from lichen.recipes.tasks.learning import federate
from support.small_experiment import engine, experiment
from support.tiny_llama import recipe, save_model, save_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair", rows=12)
    return folder


def run(home: Path, out: Path, federation: dict[str, Any], **more: Any) -> lichen.Result:
    return lichen.run(recipe(home / "model", home / "rows.jsonl", "pair", federation=federation, **more), out=out)


def final(result: lichen.Result) -> dict[str, torch.Tensor]:
    return load_tree(result.folder / "state" / "final.safetensors")[0]


@pytest.mark.parametrize("packing", [True, False])
def test_accumulated_steps_are_those_of_the_whole_batch(home: Path, tmp_path: Path, packing: bool) -> None:
    more: dict[str, Any] = {
        "engine": {"packing": packing, "clients_per_block": 2},
        "compare": {"baselines": ["alone", "pooled"]},
    }
    more["optimizer"] = {"name": "sgd", "lr": [0.5]}
    whole = run(home, tmp_path / "whole", {"batch_size": 6, "local_steps": 2}, **more)
    cut = run(home, tmp_path / "cut", {"batch_size": 2, "gradient_accumulation_steps": 3, "local_steps": 2}, **more)
    for name, x in final(whole).items():
        torch.testing.assert_close(final(cut)[name], x, rtol=0, atol=2e-6)
    assert whole.summary["columns"]["base"] is cut.summary["columns"]["base"] is None
    for column in ("federated", "alone", "pooled"):
        score = whole.summary["columns"][column]
        assert score == pytest.approx(cut.summary["columns"][column], rel=1e-5)
    assert [e.report.tokens for e in read_trace(cut.folder)] == [e.report.tokens for e in read_trace(whole.folder)]
    assert max(float(x.abs().max()) for name, x in final(whole).items() if name.endswith("lora_B")) > 1e-3


def test_epochs_train_on_every_row_so_many_times(home: Path, tmp_path: Path) -> None:
    known = read_recipe(
        recipe(
            home / "model",
            home / "rows.jsonl",
            "pair",
            federation={"rounds": 2, "local_steps": None, "local_epochs": 3, "batch_size": 5, "clients_per_round": 2},
            compare={"baselines": ["alone", "pooled"]},
        )
    )
    made = open_recipe(known).experiment
    each = [int(shard.length_N.sum()) for shard in made.clients.train]  # type: ignore[union-attr]
    result = lichen.run(known, out=tmp_path / "run")
    for event in read_trace(result.folder):
        if event.column != "pooled":
            assert event.report.tokens == 3 * sum(each[c] for c in event.report.clients)
    # The pooled trainer takes as many rows as the two invited clients do on average.
    federation = pooled_experiment(made).recipe.federation
    rows = 2 * 3 * sum(shard.size for shard in made.clients.train) / len(made.clients.train)
    assert abs(federation.fixed_steps * federation.batch_size - rows) <= federation.batch_size / 2
    assert alone_rounds(made.server) == 1
    assert read_recipe(json.loads(json.dumps(known.model_dump(mode="json")))) == known
    (tmp_path / "again.yaml").write_text(write_recipe(known))
    assert read_recipe(tmp_path / "again.yaml") == known


def test_weights_by_rows_are_the_mean_of_mcmahan(tmp_path: Path) -> None:
    made = experiment()
    changed = {}
    for weighting in ("examples", "rows", "uniform"):
        federation = made.recipe.federation.model_copy(update={"weighting": weighting, "rounds": 1})
        here = made.with_server(recipe=made.recipe.model_copy(update={"federation": federation}))
        there = engine(here, tmp_path / weighting)
        state = federate(here.server, there, 0.1, 1, tmp_path / weighting / "server.safetensors", lambda _: None)
        changed[weighting] = state.shared
    deltas = {}
    seed = derive(derive(made.recipe.seed, "run"), "round", 0)
    job = Job(
        work="train lr=0.1",
        shared=made.start,
        version=0,
        clients=(0, 1, 2, 3),
        seed=seed,
        settings={"lr_scale": 1.0},
    )
    for message in drain(engine(made, tmp_path / "each", block=1), job):
        deltas[int(message.client_C)] = message.tensors
    rows = [shard.size for shard in made.clients.train]
    assert len(set(rows)) == 4
    for name, start in made.start.trainable.items():
        mean = sum(n * deltas[c][name][0].double() for c, n in enumerate(rows)) / sum(rows)
        torch.testing.assert_close(changed["rows"].trainable[name].double(), start.double() + mean, rtol=0, atol=1e-6)
        # In fixed steps everybody has seen equally many rows, and "examples" is no more than "uniform".
        torch.testing.assert_close(
            changed["examples"].trainable[name], changed["uniform"].trainable[name], rtol=0, atol=1e-6
        )
    assert any(
        (changed["rows"].trainable[n] - changed["examples"].trainable[n]).abs().max() > 1e-4
        for n in made.start.trainable
    )


def test_all_training_stations_know_the_weights() -> None:
    """A key that a way of training would not heed must be refused, or heeded."""
    made = experiment()
    for name in ("adamw", "mezo"):
        changes = {"optimizer": made.recipe.optimizer.model_copy(update={"name": name})}
        changes["federation"] = made.recipe.federation.model_copy(update={"weighting": "rows"})  # type: ignore[assignment]
        known = client_tasks(made.with_server(recipe=made.recipe.model_copy(update=changes)))
        assert type(known["train lr=0.1"].work).__name__ == "ByRows"


CHAT: dict[str, Any] = {"task": "chat", "model": {"name": "m"}, "data": {"name": "d"}}
STUDENTS: dict[str, Any] = {
    "task": "classify",
    "model": {"students": [{"kind": "text-cnn"}]},
    "data": {"name": "d", "public": {"labelled": 0}},
    "exchange": {"kind": "feddf"},
    "compare": {"baselines": ["alone"]},
}


@pytest.mark.parametrize(
    ("base", "words", "where"),
    [
        (CHAT, ["federation.local_epochs=2", "federation.local_steps=4"], "federation.local_epochs"),
        (CHAT, ["federation.local_steps=null"], "federation.local_steps"),
        (
            CHAT,
            ["federation.local_epochs=2", "federation.keep_optimizer=true", "federation.aggregate=mean"],
            "keep_optimizer",
        ),
        (
            CHAT,
            ["federation.gradient_accumulation_steps=2", "federation.keep_optimizer=true", "federation.aggregate=mean"],
            "keep_opt",
        ),
        (
            CHAT,
            ["federation.gradient_accumulation_steps=2", "optimizer.name=mezo", "compare.baselines=[base]"],
            "federation.gradient_accumulation_steps",
        ),
        (
            CHAT,
            [
                "federation.local_epochs=2",
                "optimizer.name=kseed",
                "compare.baselines=[base]",
                "model.adapter.kind=full",
            ],
            "federation.local_epochs",
        ),
        (STUDENTS, ["federation.local_epochs=1"], "exchange"),
        (STUDENTS, ["federation.gradient_accumulation_steps=2"], "exchange"),
        (STUDENTS, ["federation.weighting=rows"], "federation.weighting"),
        (
            CHAT,
            ["federation.weighting=rows", "federation.fair=minmax", "federation.aggregate=mean"],
            "federation.weight",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(base: dict[str, Any], words: list[str], where: str) -> None:
    with pytest.raises(LichenError) as caught:
        read_recipe(base, words)
    assert where in str(caught.value)
    assert caught.value.fix
