"""A client that never took part: invited as ever, never answers, trained and scored in no column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lichen
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.rounds import load_state
from lichen.core.store import ClientStore, load_tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard
from lichen.engines.around import AroundEngine
from lichen.present.trace import read_trace
from lichen.recipes.assemble.column import local_engine
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.learning import federate
from lichen.server.lda import Lda
from lichen.server.ridge import Ridge
from support.tiny_llama import recipe as tiny
from support.tiny_llama import save_model, save_rows

SHORT = [
    "federation={rounds: 3, local_steps: 2, batch_size: 8, clients_per_round: 3}",
    "data.partition.clients=5",
    "optimizer.lr=0.1",
    "compare.baselines=[]",
]
GONE = 1


def digits(*more: str) -> Any:
    return read_recipe("digits", [*SHORT, *more])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and rows of five people with and without labels."""
    home = tmp_path_factory.mktemp("absent")
    save_model(home / "model")
    for shape in ("pair", "label"):
        save_rows(home / f"{shape}.jsonl", shape)  # type: ignore[arg-type]
    return home


def lora(home: Path, shape: str = "pair", **more: Any) -> Any:
    small = {"federation": {"rounds": 2, "local_steps": 1, "clients_per_round": 3, **more.pop("federation", {})}}
    return read_recipe(tiny(home / "model", home / f"{shape}.jsonl", shape, **small, **more))  # type: ignore[arg-type]


def without(recipe: Any, *names: str) -> Any:
    fed = recipe.federation.model_copy(update={"absent": names})
    return recipe.model_copy(update={"federation": fed})


def dropped(recipe: Any, gone: int, folder: Path) -> dict[str, torch.Tensor]:
    """By hand: the recipe with everybody's rows, in which every answer of one client is lost on its way."""
    experiment = open_recipe(recipe).experiment

    def lost(reply: Reply, job: Job) -> Sequence[Reply]:
        return () if gone in reply.clients else (reply,)

    inner = local_engine(experiment, ClientStore(folder / "clients", listed=True))
    engine = AroundEngine(inner, on_reply=lost)
    (lr,) = recipe.optimizer.lr
    state = federate(experiment.server, engine, lr, recipe.federation.rounds, folder / "state", lambda _: None)
    assert state.best_round > 0
    return state.best.flat()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["wire.up=[int8]", "federation.server={name: adam, lr: 0.05}", "federation.weighting=rows"],
        ["optimizer={name: scaffold, lr: 0.1}", "federation.sampling=weighted"],
        ["federation.fair=minmax"],
    ],
)
def test_students_learn_what_they_learn_when_its_answers_are_lost(tmp_path: Path, more: list[str]) -> None:
    one = digits("engine.clients_per_block=1", *more)
    done = lichen.run(without(one, f"client-{GONE:03d}"), out=tmp_path / "run").folder
    learned = load_state(done / "state" / "federated" / "lr=0.1" / "server.safetensors").best.flat()
    assert trees.digest(learned) == trees.digest(dropped(one, GONE, tmp_path / "by hand"))


@pytest.mark.parametrize("aggregate", ["fedit", "ffa", "fedex"])
def test_adapters_learn_what_they_learn_when_its_answers_are_lost(home: Path, tmp_path: Path, aggregate: str) -> None:
    alone = {"packing": False, "clients_per_block": 1}
    one = lora(home, federation={"aggregate": aggregate}, engine=alone)
    done = lichen.run(without(one, "person-3"), out=tmp_path / "run").folder
    learned = load_state(done / "state" / "federated" / "lr=0.02" / "server.safetensors").best.flat()
    assert trees.digest(learned) == trees.digest(dropped(one, 3, tmp_path / "by hand"))


@pytest.mark.parametrize("head", ["ridge", "lda"])
def test_a_head_in_closed_form_is_that_of_the_others_sums(home: Path, tmp_path: Path, head: str) -> None:
    made = tiny(home / "model", home / "label.jsonl", "label")
    made = {key: x for key, x in made.items() if key not in ("federation", "optimizer")}
    made |= {"task": "oneshot", "model": {"name": str(home / "model"), "head": head}}
    made["compare"] = {"baselines": ["alone", "pooled"], "partitions": 1}
    whole = lichen.run(read_recipe(made), out=tmp_path / "whole")
    less = lichen.run(read_recipe({**made, "federation": {"absent": ["person-3"]}}), out=tmp_path / "less")
    rows = [load_tree(whole.folder / "state" / "scores" / "features" / f"train-{c}.safetensors")[0] for c in range(5)]
    shards = [ArrayShard(x=one["x"].numpy(), labels=one["labels"].numpy()) for one in rows]
    sums = _sums([shard for c, shard in enumerate(shards) if c != 3])
    learned, _ = load_tree(less.folder / "state" / "final.safetensors")
    assert torch.equal(learned["head.weight"], _solved(head, sums)["head.weight"])
    assert not torch.equal(
        learned["head.weight"], load_tree(whole.folder / "state" / "final.safetensors")[0]["head.weight"]
    )
    assert less.summary["extra"]["partitions.largest_difference"] == 0
    assert [row["federated"] is None for row in less.clients()] == [False, False, False, True, False]
    (event,) = read_trace(less.folder)
    assert event.report.attendance.refused == {"absent": 1}
    assert event.report.bytes_up < read_trace(whole.folder)[0].report.bytes_up


def _sums(shards: Sequence[ArrayShard], bits: int = 18) -> dict[str, np.ndarray]:
    """Plain sums over rows, in the order in which they come: the features are multiples of 2^-18."""
    x = np.concatenate([np.concatenate([s.x, np.ones((s.size, 1))], axis=1) for s in shards]).astype(np.float64)
    x = np.round(x * 2.0**bits) * 2.0**-bits
    y = np.eye(3)[np.concatenate([np.asarray(s.labels) for s in shards])]
    return {"G": x.T @ x, "H": x.T @ y, "n": y.sum(0)}


def _solved(head: str, sums: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    from lichen.core.message import Message

    tensors = {name: torch.from_numpy(x)[None] for name, x in sums.items()}
    ones = torch.ones(1, dtype=torch.float64)
    zeros = torch.zeros(1, dtype=torch.int64)
    message = Message(group="", client_C=zeros, version_C=zeros, tensors=tensors, weight_C=ones)
    rule = Lda() if head == "lda" else Ridge(lam=1.0)
    return rule.close(rule.add(rule.zero(), message), Shared())[0].trainable


def test_it_is_on_the_roster_and_scored_in_no_column(tmp_path: Path) -> None:
    columns = ["compare.baselines=[alone, alone_best, pooled]", "compare.alone_epochs=1"]
    whole = lichen.run(digits(*columns), out=tmp_path / "whole")
    less = lichen.run(without(digits(*columns), "client-001"), out=tmp_path / "less")
    assert (whole.folder / "roster.json").read_bytes() == (less.folder / "roster.json").read_bytes()
    invited = [
        [event.report.clients for event in read_trace(run.folder) if event.column == "federated"]
        for run in (whole, less)
    ]
    assert invited[0] == invited[1]
    assert any(GONE in clients for clients in invited[1])
    row = less.clients()[GONE]
    assert (row["client"], row["train"]) == ("client-001", 0)
    assert all(row[column] is None for column in ("federated", "alone", "alone_best", "pooled"))
    assert not list((less.folder / "state").glob(f"*/*/clients/0/{GONE}/*"))
    for event in read_trace(less.folder):
        if event.column == "federated":
            named = {refusal.client for refusal in event.report.attendance.named}
            assert named == {GONE}
    values = [one["federated"] for one in less.clients() if one["federated"] is not None]
    assert less.summary["columns"]["federated"]["mean"] == pytest.approx(sum(values) / 4, abs=1e-12)


def test_nodes_that_hold_its_rows_and_a_resumed_run_give_the_same_bytes(home: Path, tmp_path: Path) -> None:
    one = without(lora(home, "label", engine={"packing": False}, federation={"rounds": 1}), "person-3")
    one = one.model_copy(update={"data": one.data.model_copy(update={"classes": ("calm", "glad", "sad")})})
    here = lichen.run(one, out=tmp_path / "here").folder
    before = (here / "state" / "final.safetensors").read_bytes()
    away = one.model_copy(update={"engine": one.engine.model_copy(update={"name": "spawned", "nodes": 1})})
    alone = lichen.run(away, out=tmp_path / "alone", server_alone=True)
    assert (alone.folder / "state" / "final.safetensors").read_bytes() == before
    assert alone.clients()[3]["federated"] is None
    with pytest.raises(LichenError, match="by a server that holds no rows"):
        lichen.forget(alone.folder, "person-0")
    (here / "summary.json").unlink()
    (here / "state" / "federated" / "lr=0.02" / "server.safetensors").unlink()
    assert (lichen.run(one, out=here, resume=True).folder / "state" / "final.safetensors").read_bytes() == before


def test_a_name_that_nobody_has_and_kinds_that_cannot_be_without_are_refused(home: Path, tmp_path: Path) -> None:
    run = partial(lichen.run, out=tmp_path / "run")
    with pytest.raises(LichenError, match=r"roster\.json: client-004") as refused:
        run(digits("federation.absent=[client-04]"))
    assert refused.value.where == "federation.absent"
    with pytest.raises(LichenError, match="nobody is left"):
        run(digits("data.partition.clients=2", "federation.absent=[client-000, client-001]"))
    for words, part in (
        (["audit.canaries=40"], "dealt to every client"),
        (["exchange={kind: fedmd}"], "own model"),
    ):
        with pytest.raises(LichenError, match=part):
            read_recipe("digits-unequal" if "exchange" in words[0] else "digits", [*words, "federation.absent=[a]"])
    assert json.dumps(without(lora(home), "person-1").model_dump(mode="json")["federation"]["absent"]) == '["person-1"]'
