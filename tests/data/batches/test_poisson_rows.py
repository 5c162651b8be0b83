"""Poisson batches: every row by a coin of its own, empty steps too, and the same alone and in company."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.secret.randomness import SecretRandomness
from lichen.data.batches.poisson_rows import PoissonRows
from lichen.data.batches.shards import ArrayShard, TextShard, TrainSource

SIZES, RATES = (9, 4, 0, 30), (0.3, 0.5, 0.5, 0.1)


def source(kind: str = "array", steps: int = 5, batch_rows: int = 3, **more: Any) -> PoissonRows:
    draw = np.random.default_rng(0)
    shards: list[Any] = []
    for size in SIZES:
        labels = draw.integers(0, 3, size)
        if kind == "array":
            shards.append(ArrayShard(draw.random((size, 4), dtype=np.float32), labels=labels))
        else:
            rows = [draw.integers(2, 97, draw.integers(1, 9)).tolist() for _ in range(size)]
            shards.append(TextShard(rows, labels=labels, kind="classify"))
    local = TrainSource(shards, batch_size=4, steps=steps, fixed_width=8, **more)
    return PoissonRows(local, rate_N=RATES, randomness=SecretRandomness.of_seed(1), batch_rows=batch_rows)


def steps_of(some: PoissonRows, client: int, seed: int = 3) -> list[list[int]]:
    """The rows of each step of one client."""
    steps: list[list[int]] = [[]]
    for batch in some.batches([client], seed):
        assert bool(batch["active_C"][0])
        steps[-1] += [row for row in batch["index_CB"][0].tolist() if row >= 0]
        if bool(batch["ends_step_C"][0]):
            steps.append([])
    assert steps.pop() == []
    return steps


@pytest.mark.parametrize("kind", ["array", "text"])
def test_a_client_alone_sees_its_slice_of_any_block(kind: str) -> None:
    some, clients = source(kind), (0, 1, 2, 3)
    together = list(some.batches(clients, 3))
    for place, c in enumerate(clients):
        for batch, mine in zip_longest(together, some.batches((c,), 3)):
            if mine is None:
                assert not bool(batch["active_C"][place])
                assert not bool(batch["ends_step_C"][place])
                continue
            for name, x in mine.items():
                assert torch.equal(batch[name][place : place + 1], x)


def test_every_step_is_taken_once_and_the_micro_batch_has_no_say() -> None:
    for c, size in enumerate(SIZES):
        steps = steps_of(source(), c)
        assert len(steps) == (5 if size else 0)
        assert steps == steps_of(source(batch_rows=1), c) == steps_of(source(batch_rows=64), c)
        assert all(len(set(rows)) == len(rows) for rows in steps)
    assert steps_of(source(), 0, seed=4) != steps_of(source(), 0, seed=3)


def test_rows_come_with_their_chance_and_independently_and_steps_may_be_empty() -> None:
    """2,000 steps: counts of rows, of pairs and of empty steps lie within five deviations of the binomial."""
    steps, rate = steps_of(source(steps=2000), 1), RATES[1]
    ones = Counter(row for rows in steps for row in rows)
    pairs = Counter((a, b) for rows in steps for a in rows for b in rows if a < b)

    def near(count: int, chance: float) -> bool:
        return abs(count - 2000 * chance) < 5 * (2000 * chance * (1 - chance)) ** 0.5

    assert len(ones) == 4
    assert len(pairs) == 6
    assert all(near(count, rate) for count in ones.values())
    assert all(near(count, rate**2) for count in pairs.values())
    assert near(sum(not rows for rows in steps), (1 - rate) ** 4)


def test_cost_is_what_it_has_on_average() -> None:
    some = source("text", steps=400)
    tokens = sum(int((b["attention_mask_CBT"].sum(2) * (b["index_CB"] >= 0)).sum()) for b in some.batches([3], 1))
    assert abs(tokens - some.cost(3)) < 0.1 * tokens
    assert source(steps=10).cost(0) == round(10 * 0.3 * 9)


def test_what_is_no_sample_is_refused() -> None:
    with pytest.raises(LichenError, match="passes"):
        source(epochs=1)
    with pytest.raises(LichenError, match="batch_rows"):
        source(batch_rows=0)
    some = source()
    with pytest.raises(LichenError, match="sampling rate is 0"):
        next(PoissonRows(some.local, rate_N=[0.0], randomness=some.randomness).batches([0], 1))
