"""Heads in closed form at their clients: each its own, and counts of what a head says of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lichen.clients.statistics.closed_head import HeadConfusion, OwnHead, predict
from lichen.clients.statistics.sufficient import Statistics
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.ridge import Ridge
from support.toy_cohorts import fold, job, rows

RULE = Ridge(lam=0.1)


def features(batch: Batch) -> Any:
    return batch["x_CBF"]


def solve(message: Message) -> Tree:
    return RULE.close(RULE.add(RULE.zero(), message), Shared())[0].trainable


def made(batch: Batch) -> tuple[Message, Tree]:
    statistics = Statistics(features, classes=3, width=batch["x_CBF"].shape[-1])
    message, own_C = fold(OwnHead(statistics, solve), job({}, range(2)), [batch])
    assert own_C is not None
    return message, own_C


def test_each_client_keeps_the_head_of_its_own_rows_and_sends_none() -> None:
    batch = rows(0, range(2), count=9)
    message, own_C = made(batch)
    assert (message.tensors, message.metrics["count"].tolist()) == ({}, [9, 9])
    for c in range(2):
        alone = {name: x[c : c + 1] for name, x in batch.items()}
        own = solve(fold(Statistics(features, classes=3, width=batch["x_CBF"].shape[-1]), job({}, [c]), [alone])[0])
        assert {name.removeprefix("params/"): x[c].tolist() for name, x in own_C.items()} == {
            name: x.tolist() for name, x in own.items()
        }


def test_counts_are_of_true_and_predicted_classes_of_counted_rows() -> None:
    batch = rows(0, range(2), count=9)
    _, own_C = made(batch)
    batch["labels_CB"][0, 2] = -100
    batch["index_CB"][1, 5] = -1
    personal = HeadConfusion(features, classes=3, personal=True)
    shared = {name.removeprefix("params/"): x[1] for name, x in own_C.items()}
    both = [
        fold(personal, job({}, range(2)), [batch], own_C)[0],
        fold(HeadConfusion(features, classes=3), job(shared, range(2)), [batch])[0],
    ]
    for message, heads in zip(both, ((0, 1), (1, 1)), strict=True):
        assert message.metrics["count"].tolist() == [8, 8]
        for c, dropped in ((0, 2), (1, 5)):
            head = {name.removeprefix("params/"): x[heads[c]] for name, x in own_C.items()}
            found, expected = predict(head, batch["x_CBF"][c]), torch.zeros(3, 3)
            for b in set(range(9)) - {dropped}:
                expected[batch["labels_CB"][c, b], found[b]] += 1
            assert message.metrics["confusion"][c].tolist() == expected.tolist()


def test_a_head_that_is_not_there_cannot_be_scored() -> None:
    with pytest.raises(LichenError, match="no head to score"):
        fold(HeadConfusion(features, classes=3, personal=True), job({}, range(2)), [rows(0, range(2), count=9)])
