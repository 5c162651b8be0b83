"""What a server that learns sums alone says of its clients' scores, and that it sees where they do not add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lichen.clients.masking.own_score import BINS, SCORE, SCORED, OwnScore
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.sides.summed_scores import read_scores
from lichen.recipes.schema.read import read_recipe
from lichen.tasks.classify import ACCURACY

RECIPE = read_recipe(
    {
        "name": "digits",
        "task": "classify",
        "data": {"name": "digits", "partition": {"by": "iid", "clients": 12}},
        "model": {"student": {"kind": "image-mlp"}},
        "compare": {"metric": "accuracy"},
    }
)
RIGHT = (10, 3, 7, 5, 9, 2, 8, 6, 4, 1, 10)
"""Of ten rows of each client; one more has no rows."""


class Confusions:
    """Clients whose confusion is given."""

    def expected(self, job: Job) -> Expected:
        return Expected(group="test")

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> tuple[int, ...]:
        return tuple(clients)

    def step(self, state: Any, batch: Any) -> Any:
        return state

    def final(self, state: tuple[int, ...]) -> tuple[Message, Tree | None]:
        rows = [[[right, 10 - right], [0, 0]] for right in RIGHT] + [[[0, 0], [0, 0]]]
        confusion = torch.tensor([rows[client] for client in state], dtype=torch.float64)
        client_C = torch.tensor(state)
        message = Message(
            group="test",
            client_C=client_C,
            version_C=torch.zeros_like(client_C),
            tensors={},
            weight_C=confusion.sum((1, 2)),
            metrics={"confusion": confusion, "count": confusion.sum((1, 2))},
        )
        return message, None


def sums() -> Tree:
    """Of all twelve clients, as masks would give them."""
    clients = tuple(range(len(RIGHT) + 1))
    work = OwnScore(Confusions(), ACCURACY.values, bins=ACCURACY.bins)
    job = Job(work="test", shared=Shared(), version=0, clients=clients, seed=0)
    message, own_C = work.final(work.init(job, clients, None))
    assert own_C is None
    assert message.metrics[BINS].sum(1).tolist() == [1.0] * len(RIGHT) + [0.0]
    assert {SCORE, SCORED, BINS} <= work.expected(job).metrics.keys()
    return {name: x.sum(0, keepdim=True) for name, x in message.metrics.items()}


def test_the_mean_is_exact_and_the_worst_tenth_right_to_half_a_bin() -> None:
    scores = read_scores(RECIPE, sums(), clients=len(RIGHT) + 1)
    assert scores is not None
    assert scores.mean == pytest.approx(math.fsum(RIGHT) / 110)
    assert scores.worst_decile == pytest.approx(0.1, abs=0.0025001)
    assert scores.deciles[4] == pytest.approx(0.6, abs=0.0025001)


@pytest.mark.parametrize(
    ("name", "place", "more"),
    [
        (SCORED, 0, 5.0),
        (SCORED, 0, 0.25),
        (SCORED, 0, -11.0),
        (BINS, (0, 7), -1.0),
        (BINS, (0, 7), 1.0),
        (SCORE, 0, 40.0),
    ],
)
def test_sums_that_are_nobodys_scores_are_seen(name: str, place: Any, more: float) -> None:
    found = sums()
    found[name][place] += more
    assert read_scores(RECIPE, found, clients=len(RIGHT) + 1) is None


def test_where_no_client_has_a_score_there_is_no_mean_and_nobody_has_lied() -> None:
    found = {name: x * 0 for name, x in sums().items()}
    scores = read_scores(RECIPE, found, clients=len(RIGHT) + 1)
    assert scores is not None
    assert (scores.scored, math.isnan(scores.mean), scores.worst_decile) == (0, True, None)


def test_fewer_than_ten_clients_are_not_counted_in_bins() -> None:
    found = sums()
    found[SCORED][0], found[SCORE][0] = 9.0, 4.5
    scores = read_scores(RECIPE, {name: found[name] for name in (SCORE, SCORED)}, clients=9)
    assert scores is not None
    assert (scores.scored, scores.mean, scores.worst_decile, scores.deciles) == (9, 0.5, None, ())
