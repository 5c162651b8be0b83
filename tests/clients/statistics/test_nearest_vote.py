"""Votes against brute force, whatever the batches and the company; and the bounds that noise rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lichen.clients.statistics.nearest_vote import NearestNeighborHistogram
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.fold import serve
from lichen.core.message import Job, Message, pack_message, size, take_client, unpack_message
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, TrainSource

SEEDS = st.integers(0, 2**20)


def features(batch: Batch) -> Tensor:
    return batch["x_CBF"]


def grid(count: int, seed: int, width: int = 3) -> Tensor:
    """Points on a coarse grid, so that ties are common."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (count, width), generator=g) / 4


def shards_of(counts: Sequence[int], seed: int, classes: int = 3) -> list[ArrayShard]:
    g = torch.Generator().manual_seed(seed + 1)
    return [
        ArrayShard(grid(n, seed + c).numpy(), labels=torch.randint(0, classes, (n,), generator=g).numpy())
        for c, n in enumerate(counts)
    ]


def voted(
    shards: Sequence[ArrayShard], shared: dict[str, Tensor], *, batch: int = 4, block: int = 8, **more: Any
) -> list[Message]:
    """One message a client, by client."""
    job = Job(work="vote", shared=Shared.of_flat(shared), version=0, clients=tuple(range(len(shards))), seed=5)
    client_task = ClientTask(
        work=NearestNeighborHistogram(features, **more), source=EvalSource(list(shards), batch_size=batch)
    )
    messages = serve(job, {"vote": client_task}, ClientStore(Path("nowhere")), block_size=block)
    ones = [take_client(message, k) for message in messages for k in range(len(message.client_C))]
    return sorted(ones, key=lambda one: int(one.client_C))


def brute(shard: ArrayShard, shared: dict[str, Tensor], top: int = 1, most: int | None = None) -> list[int]:
    """Rational arithmetic, one row and one candidate at a time."""
    points = [[Fraction(float(v)) for v in row] for row in shared["candidates"]]
    votes, used = [0] * len(points), 0
    for row, label in zip(shard.x, shard.labels.tolist(), strict=True):
        mine = [m for m in range(len(points)) if "labels" not in shared or int(shared["labels"][m]) == label]
        if not mine or (most is not None and used == most):
            continue
        used += 1
        x = [Fraction(float(v)) for v in row]
        far = {m: sum((a - b) ** 2 for a, b in zip(x, points[m], strict=True)) for m in mine}
        for m in sorted(mine, key=lambda m: (far[m], m))[:top]:
            votes[m] += 1
    return votes


@given(seed=SEEDS, top=st.sampled_from([1, 1, 2, 3]), most=st.sampled_from([None, 2, 5]), labelled=st.booleans())
def test_equals_brute_force_ties_to_the_first(seed: int, top: int, most: int | None, labelled: bool) -> None:
    shared = {"candidates": grid(6, seed + 99).half()}
    if labelled:
        shared["labels"] = torch.tensor([0, 1, 0, 1, 0, 0], dtype=torch.int16)  # nobody stands for label 2
    shards = shards_of([5, 0, 9], seed)
    for one, shard in zip(voted(shards, shared, top=top, most=most), shards, strict=True):
        assert one.tensors["votes"][0].tolist() == brute(shard, shared, top, most)


@given(seed=SEEDS, batch=st.integers(1, 9), block=st.integers(1, 4), cut=st.sampled_from([None, 2.5]))
def test_neither_batches_nor_company_turn_a_vote(seed: int, batch: int, block: int, cut: float | None) -> None:
    g = torch.Generator().manual_seed(seed)
    shards = [
        ArrayShard(torch.randn(n, 33, generator=g).numpy(), labels=torch.zeros(n, dtype=torch.int64).numpy())
        for n in (7, 7, 6)
    ]
    shared = {"candidates": torch.randn(20, 33, generator=g).half()}
    more: dict[str, Any] = {} if cut is None else {"clip": cut, "bits": 10, "noise": 0.3}
    whole = voted(shards, shared, batch=16, **more)
    for one, other in zip(whole, voted(shards, shared, batch=batch, block=block, **more), strict=True):
        assert torch.equal(one.tensors["votes"], other.tensors["votes"])


def test_a_candidate_listed_twice_ties_with_itself_however_wide() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(50, 384, generator=g), dim=1)
    points = torch.nn.functional.normalize(torch.randn(17, 384, generator=g), dim=1).half()
    shard = ArrayShard(rows.numpy(), labels=np.zeros(50, np.int64))
    votes = voted([shard], {"candidates": torch.cat([points, points])})[0].tensors["votes"][0]
    assert votes[17:].sum() == 0
    assert int(votes[:17].sum()) == 50


@given(seed=SEEDS, clip=st.sampled_from([0.5, 1.0, 3.0, 7.7]), top=st.integers(1, 3))
def test_a_clipped_histogram_is_inside_its_bound_and_points_the_same_way(seed: int, clip: float, top: int) -> None:
    shared = {"candidates": grid(6, seed).half()}
    shards = shards_of([30, 3], seed)
    plain = voted(shards, shared, top=top)
    for one, raw in zip(voted(shards, shared, top=top, clip=clip, bits=10), plain, strict=True):
        units, whole = one.tensors["votes"][0].double() / 1024, raw.tensors["votes"][0].double()
        assert float(units.norm()) <= clip
        expected = whole * min(1.0, clip / float(whole.norm()))
        assert bool(((units <= expected + 1e-9) & (units > expected - 2e-3)).all())


@given(seed=SEEDS, top=st.integers(1, 3), most=st.sampled_from([None, 3, 8]), swap=st.booleans(), at=st.integers(0, 9))
def test_a_row_more_or_another_moves_the_sum_by_no_more_than_said(
    seed: int, top: int, most: int | None, swap: bool, at: int
) -> None:
    shared = {"candidates": grid(7, seed).half(), "labels": torch.tensor([0, 0, 0, 1, 1, 2, 2])}
    shard = shards_of([10], seed)[0]
    keep = [i for i in range(10) if i != at]
    if swap:
        x, labels = shard.x.copy(), shard.labels.copy()
        x[at], labels[at] = -x[at], (labels[at] + 1) % 3
        near = ArrayShard(x, labels=labels)
    else:
        near = ArrayShard(shard.x[keep], labels=shard.labels[keep])
    a, b = (voted([s], shared, top=top, most=most)[0].tensors["votes"][0].double() for s in (shard, near))
    bound = NearestNeighborHistogram(features, top=top, most=most).sensitivity(
        "row", "replace" if swap else "add-or-remove"
    )
    assert float((a - b).norm()) <= bound + 1e-12


@given(seed=SEEDS, top=st.integers(1, 3), clip=st.sampled_from([None, 2.0, 40.0]))
def test_a_client_moves_the_sum_by_no_more_than_said(seed: int, top: int, clip: float | None) -> None:
    shared = {"candidates": grid(3, seed).half()}
    shards = shards_of([20, 20], seed)
    work = NearestNeighborHistogram(features, most=4, top=top, clip=clip, bits=10)
    ones = voted(shards, shared, most=4, top=top, clip=clip, bits=10)
    a, b = (one.tensors["votes"][0].double() / 1024 for one in ones)
    assert float(a.norm()) <= work.sensitivity("client", "add-or-remove") + 1e-12
    assert float((a - b).norm()) <= work.sensitivity("client", "replace") + 1e-12


def test_bounds_are_those_of_the_worst_case() -> None:
    work = NearestNeighborHistogram(features, most=9)
    assert work.sensitivity("client", "add-or-remove") == 9
    assert NearestNeighborHistogram(features, most=9, clip=4.0, bits=10).sensitivity(
        "client", "replace"
    ) == 4 * math.sqrt(2)
    assert NearestNeighborHistogram(features).sensitivity("row", "add-or-remove") == 1
    assert NearestNeighborHistogram(features).sensitivity("row", "replace") == math.sqrt(2)
    with pytest.raises(LichenError, match="not bounded"):
        NearestNeighborHistogram(features).sensitivity("client", "replace")
    with pytest.raises(LichenError, match="client only"):
        NearestNeighborHistogram(features, clip=4.0, bits=10).sensitivity("row", "replace")


def test_says_nothing_of_a_client_but_its_votes_unless_told_to() -> None:
    shared = {"candidates": grid(6, 1).half()}
    shards = shards_of([9, 0], 3)
    quiet, empty = voted(shards, shared)
    assert quiet.metrics == {} == empty.metrics
    assert quiet.weight_C.tolist() == [1.0] == empty.weight_C.tolist()
    assert empty.tensors["votes"].abs().sum() == 0
    assert size(quiet) == size(empty) == len(pack_message(quiet))
    assert torch.equal(unpack_message(pack_message(quiet)).tensors["votes"], quiet.tensors["votes"])
    loud = voted(shards, shared, report=True)[0]
    near = torch.cdist(torch.from_numpy(shards[0].x).double(), shared["candidates"].double()).amin(1)
    assert float(loud.metrics["count"]) == 9
    assert float(loud.metrics["distance_sum"]) == pytest.approx(float(near.sum()))


def test_shares_of_noise_add_up_and_the_secret_is_the_nodes_own() -> None:
    shared = {"candidates": torch.randn(400, 3, generator=torch.Generator().manual_seed(0)).half()}
    shards = [ArrayShard(np.zeros((0, 3), np.float32), labels=np.zeros(0, np.int64))] * 16
    ones = voted(shards, shared, noise=6.0 / 4, bits=10)
    total = sum(one.tensors["votes"][0].double() / 1024 for one in ones)
    assert float(torch.as_tensor(total).std()) == pytest.approx(6.0, rel=0.12)
    assert not torch.equal(ones[0].tensors["votes"], ones[1].tensors["votes"])
    again = voted(shards, shared, noise=6.0 / 4, bits=10)
    own = voted(shards, shared, noise=6.0 / 4, bits=10, secret=9)
    assert torch.equal(again[0].tensors["votes"], ones[0].tensors["votes"])
    assert not torch.equal(own[0].tensors["votes"], ones[0].tensors["votes"])


def test_refuses_what_no_noise_could_account_for_or_nobody_could_count() -> None:
    shared = {"candidates": grid(4, 0).half()}
    shard = shards_of([3], 0)[0]
    job = Job(work="vote", shared=Shared.of_flat(shared), version=0, clients=(0,), seed=5)
    store = ClientStore(Path("nowhere"))
    endless = ClientTask(work=NearestNeighborHistogram(features), source=TrainSource([shard], batch_size=2, steps=3))
    with pytest.raises(LichenError, match="vote twice"):
        list(serve(job, {"vote": endless}, store))
    with pytest.raises(LichenError, match="candidates"):
        voted([shard], {})
    with pytest.raises(LichenError, match="labels"):
        voted([shard], {**shared, "labels": torch.zeros(3)})
    with pytest.raises(LichenError, match="features"):
        voted([shard], {"candidates": torch.zeros(4, 2)})
    with pytest.raises(LichenError, match="not finite"):
        voted([ArrayShard(np.full((1, 3), np.nan, np.float32), labels=np.zeros(1, np.int64))], shared)
    with pytest.raises(LichenError, match="rounded away"):
        NearestNeighborHistogram(features, clip=3.0)
    for bad in ({"top": 0}, {"most": 0}, {"bits": 40}, {"clip": -1.0, "bits": 10}, {"noise": math.nan, "bits": 10}):
        with pytest.raises(LichenError):
            NearestNeighborHistogram(features, **bad)  # type: ignore[arg-type]
