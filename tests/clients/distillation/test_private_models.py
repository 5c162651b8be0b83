"""Private models digest public answers: nothing but answers need come, and labels of public rows never teach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lichen.clients.distillation.private_models import (
    ConcatSource,
    LocalInit,
    asking,
    private_client_tasks,
    unlabelled,
    with_answer_rows,
)
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, TextShard, TrainSource
from lichen.models.students.students import ImageMLP
from lichen.server.knowledge.ensemble import as_answers
from support.toy_cohorts import fold, job

MODEL = ImageMLP(5, hidden=(6,), classes=3)


def shard(seed: int, rows: int) -> ArrayShard:
    rng = np.random.default_rng(seed)
    return ArrayShard(rng.normal(size=(rows, 5)).astype(np.float32), labels=rng.integers(0, 3, rows))


OWN = TrainSource((shard(0, 7), shard(1, 9)), batch_size=4, steps=3)
PUBLIC = shard(2, 12)
START = MODEL.init(0)


def train(*, personal: bool = True) -> Train:
    return Train(MODEL, optimizer=ClientOptimizer("adamw", lr=0.05), personal=personal)


def client_tasks(**more: int) -> Any:
    wanted = {"digest_steps": 4, **more}
    return private_client_tasks(
        "a", train(), start=Shared.of_flat(START), own=OWN, public=PUBLIC, clients=(0, 1), **wanted
    )


def test_what_clients_can_make_themselves_need_not_come() -> None:
    batches = list(OWN.batches((0, 1), 1))
    came, own_came = fold(train(), job(START, (0, 1)), batches)
    there, own_there = fold(LocalInit(train(), start=Shared.of_flat(START)), job({}, (0, 1)), batches)
    assert trees.digest(own_came) == trees.digest(own_there)
    assert torch.equal(came.metrics["loss_sum"], there.metrics["loss_sum"])
    other = {name: x + 1 for name, x in START.items()}
    _, told = fold(LocalInit(train(), start=Shared.of_flat(START)), job(other, (0, 1)), batches)
    _, want = fold(train(), job(other, (0, 1)), batches)
    assert trees.digest(told) == trees.digest(want)  # what does come stands


def test_digesting_and_going_back_is_one_after_the_other() -> None:
    answers = as_answers(torch.rand(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1))
    learn = client_tasks()["learn/a"]
    assert isinstance(learn.source, ConcatSource)
    asked = job(answers, (0, 1))
    batches = list(learn.source.batches((0, 1), asked.seed))
    assert len(batches) == 4 + 3
    assert all(bool((b["labels_CB"] == -100).all() and (b["answer_CB"] >= 0).any()) for b in batches[:4])
    assert all("answer_CB" not in b and bool((b["labels_CB"] >= 0).any()) for b in batches[4:])
    _, whole = fold(learn.work, asked, batches)
    _, half = fold(learn.work, asked, batches[:4])
    _, rest = fold(learn.work, job({}, (0, 1)), batches[4:], half)
    assert trees.digest(whole) == trees.digest(rest)


def test_digested_answers_are_learnt() -> None:
    wanted = PUBLIC.labels
    answers = as_answers(torch.eye(3, dtype=torch.float64)[torch.from_numpy(wanted)] * 0.9 + 0.1 / 3)
    made = client_tasks(digest_steps=60)
    learn = private_client_tasks(
        "a",
        train(),
        start=Shared.of_flat(START),
        own=OWN,
        public=PUBLIC,
        clients=(0, 1),
        digest_steps=60,
        revisit=False,
    )["learn/a"]
    _, own = fold(learn.work, job(answers, (0, 1)), learn.source.batches((0, 1), 3))
    predict = made["predict/a"]
    said, _ = fold(predict.work, job({}, (0, 1)), predict.source.batches((0, 1), 0), own)
    right = said.tensors["logits"].argmax(-1) == torch.from_numpy(wanted)
    assert bool((right.double().mean(1) > 0.9).all())


def test_a_source_in_turn_costs_and_is_shaped_as_all_its_parts() -> None:
    both = ConcatSource((OWN, OWN))
    assert both.cost(0) == 2 * OWN.cost(0)
    assert both.shape(0) == (OWN.shape(0), OWN.shape(0))
    assert ConcatSource((asking(OWN, PUBLIC, (0,)), OWN)).cost(0) == PUBLIC.size + OWN.cost(0)
    first, second = list(both.batches((0,), 5))[:3], list(both.batches((0,), 5))[3:]
    assert any(not torch.equal(a["index_CB"], b["index_CB"]) for a, b in zip(first, second, strict=True))


def test_public_labels_are_hidden() -> None:
    text = TextShard([np.array([1, 2]), np.array([3])], labels=np.array([1, 0]), kind="classify")
    for some in (PUBLIC, text):
        assert set(np.asarray(unlabelled(some).labels).tolist()) == {-100}
        assert np.asarray(with_answer_rows(some).answer).tolist() == list(range(some.size))


def test_refuses_what_would_send_weights_or_do_nothing() -> None:
    with pytest.raises(LichenError, match="send no tensors"):
        private_client_tasks(
            "a",
            train(personal=False),
            start=Shared.of_flat(START),
            own=OWN,
            public=PUBLIC,
            clients=(0,),
            digest_steps=1,
        )
    with pytest.raises(LichenError, match="0 steps"):
        client_tasks(digest_steps=0)
    with pytest.raises(LichenError, match="no source"):
        ConcatSource(())
