"""Who is asked beside those at work, when a round has enough, and what an old answer weighs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.server.sampling import Uniform
from lichen.server.schedules import SYNCHRONOUS, Buffered, Synchronous


def uniform(count: int, clients: int) -> Any:
    return lambda seed: Uniform(count).invite(torch.ones(clients), seed)


def test_a_synchronous_round_is_the_samplers() -> None:
    draw = uniform(3, 10)
    assert SYNCHRONOUS.invite(draw, frozenset(), 7) == draw(7)
    assert not SYNCHRONOUS.enough(1000)
    assert SYNCHRONOUS.discount(5) == 1


def test_who_is_at_work_is_not_asked_again_and_as_many_are_at_work_as_are_to_be() -> None:
    schedule = Buffered(arrivals=2, concurrency=5)
    draw = uniform(5, 12)
    first = schedule.invite(draw, frozenset(), 1)
    assert first == draw(1)
    for seed in range(20):
        busy = frozenset(first[2:])
        more = schedule.invite(draw, busy, seed)
        assert len(more) == 2
        assert not busy & set(more)
        assert more == tuple(sorted(more)) == schedule.invite(draw, busy, seed)
    assert schedule.invite(draw, frozenset(range(5)), 3) == ()
    # Of a roster that is too small, all who are free.
    assert schedule.invite(lambda seed: (0, 1, 2, 3), frozenset({2}), 3) == (0, 1, 3)


def test_all_free_clients_are_as_likely() -> None:
    schedule, busy = Buffered(arrivals=1, concurrency=4), frozenset({0, 1})
    counts = torch.zeros(8)
    for seed in range(3000):
        counts[list(schedule.invite(uniform(4, 8), busy, seed))] += 1
    assert counts[:2].sum() == 0
    assert (counts[2:] / 3000 - 1 / 3).abs().max() < 0.03


def test_age_discounts_by_the_papers_power() -> None:
    schedule = Buffered(arrivals=1, concurrency=1, exponent=0.5, max_age=2)
    assert [schedule.discount(age) for age in range(4)] == [1.0, 2**-0.5, 3**-0.5, 0.0]
    assert Buffered(arrivals=1, concurrency=1, exponent=0.0).discount(9) == 1.0


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Synchronous, {"deadline": 0}),
        (Synchronous, {"least": 0}),
        (Buffered, {"arrivals": 0, "concurrency": 1}),
        (Buffered, {"arrivals": 3, "concurrency": 2}),
        (Buffered, {"arrivals": 1, "concurrency": 1, "exponent": -1.0}),
        (Buffered, {"arrivals": 1, "concurrency": 1, "max_age": -1}),
    ],
)
def test_nonsense_is_refused(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(LichenError) as caught:
        kind(**values)
    assert caught.value.where
    assert caught.value.fix
