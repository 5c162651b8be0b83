"""Two periods compared by sums: as if all rows lay in one place, under masks too, quiet where nothing has changed.

Legend: C clients, N rows, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lichen.clients.drift.distances import DistanceBins, median_distance
from lichen.clients.drift.embedding_sums import BANDWIDTH, EmbeddingSums, numbers_of
from lichen.clients.drift.periods import DriftReport, compare_periods
from lichen.clients.masking.masked import Masked, MaskTerms
from lichen.core.collecting.admission import Admission
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job, concatenate_messages
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.data.batches.two_periods import TwoPeriods
from lichen.engines.distributed import DistributedEngine
from lichen.engines.local import LocalEngine
from lichen.engines.masking.unmasking import UnmaskingEngine
from lichen.engines.ranks import Ranks
from lichen.fl.testing import check_client_task, check_expected
from lichen.server.drift.fourier import BITS, random_fourier
from lichen.server.drift.mmd import SUMS
from support.forked_ranks import on_ranks

Rows = Sequence[Any]
"""One array ``(N, ...)`` a client."""


def shards(rows: Rows) -> list[ArrayShard]:
    return [ArrayShard(x=np.asarray(x, np.float32), labels=np.zeros(len(x), np.int64)) for x in rows]


def source(then: Rows, now: Rows, batch_size: int = 4) -> TwoPeriods:
    return TwoPeriods(
        then=EvalSource(shards(then), batch_size=batch_size), now=EvalSource(shards(now), batch_size=batch_size)
    )


def tasks(then: Rows, now: Rows, batch_size: int = 4, **more: Any) -> dict[str, ClientTask]:
    both, width = source(then, now, batch_size), math.prod(np.asarray(then[0]).shape[1:])
    return {
        "drift": ClientTask(work=EmbeddingSums(numbers_of, width=width, **more), source=both),
        "distances": ClientTask(work=DistanceBins(numbers_of), source=both),
    }


def compared(then: Rows, now: Rows, folder: Path, *, seed: int = 0, block: int = 8, **more: Any) -> DriftReport:
    bandwidth = more.pop("bandwidth", None)
    engine = LocalEngine(tasks(then, now, **more), ClientStore(folder), block_size=block)
    return compare_periods(engine, range(len(then)), seed=seed, bandwidth=bandwidth)


def drawn(seed: int, counts: Sequence[int], width: int = 3, shift: float = 0.0) -> list[Any]:
    """Each client's rows lie around a place of its own."""
    rng = np.random.default_rng([seed, 1])
    places = np.random.default_rng(5).normal(size=(len(counts), width)) * 2
    return [(rng.normal(size=(n, width)) + places[c] + shift).astype(np.float32) for c, n in enumerate(counts)]


@given(seed=st.integers(0, 2**20), cuts=st.lists(st.integers(0, 30), max_size=5), batch=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_any_partition_gives_what_pooled_rows_give(seed: int, cuts: list[int], batch: int) -> None:
    (then, now), fourier = drawn(seed, (30, 30)), random_fourier(3, 64, bandwidth=1.5, seed=4)
    order = np.random.default_rng(seed).permutation(30)
    edges_then, edges_now = [0, *sorted(cuts), 30], [0, *sorted(30 - cut // 2 for cut in cuts), 30]
    # Rows of now are cut elsewhere, so that clients have them in other numbers; equal cuts make clients without any.
    parts = [
        (then[order[a:b]], now[order[c:d]])
        for (a, b), (c, d) in zip(pairwise(edges_then), pairwise(edges_now), strict=True)
    ]
    work = EmbeddingSums(numbers_of, width=3, dimension=64, permutations=3)
    job = Job(work="w", shared=Shared(), version=0, clients=(0,), seed=4, settings={BANDWIDTH: 1.5})
    total = SUMS.zero()
    for x, y in parts:
        state = work.init(job, (0,), None)
        for piece in source([x], [y], batch).batches((0,), 0):
            state = work.step(state, piece)
        total = SUMS.add(total, work.final(state)[0])
    sums = SUMS.close(total, Shared())[0].trainable
    mean_then, mean_now = ((fourier.units(torch.from_numpy(x)) * 2.0**-BITS).mean(0) for x in (then, now))
    pooled = float((mean_now - mean_then).square().sum())
    federated = sums["now"][0] / 30 - (sums["all"] - sums["now"][0]) / 30
    assert abs(float(federated.square().sum()) - pooled) <= 1e-12
    assert sums["rows"].tolist() == [30, 30]
    assert torch.equal(sums["now"][0], fourier.units(torch.from_numpy(now)).sum(0) * 2.0**-BITS)


def test_permutations_move_a_clients_own_rows_and_no_others(tmp_path: Path) -> None:
    rows_then, rows_now = [[[0.0]] * 3, [[9.0]] * 2], [[[1.0]] * 5, [[9.5]]]
    engine = LocalEngine(tasks(rows_then, rows_now, dimension=16, permutations=40), ClientStore(tmp_path))
    job = Job(work="drift", shared=Shared(), version=0, clients=(0, 1), seed=2, settings={BANDWIDTH: 1.0})
    number = engine.submit(job)
    message = concatenate_messages([reply.message for reply in engine.replies((number,)) if reply.message is not None])
    fourier = random_fourier(1, 16, bandwidth=1.0, seed=2)
    for c in range(2):
        old, new = (fourier.units(torch.tensor(x[c])[:1])[0] * 2.0**-BITS for x in (rows_then, rows_now))
        before, after = len(rows_then[c]), len(rows_now[c])
        for sum_D in message.tensors["now"][c]:
            moved = [k for k in range(min(before, after) + 1) if torch.equal(sum_D, (after - k) * new + k * old)]
            assert len(moved) == 1, "as many rows as before, of the client's own"
        assert torch.equal(message.tensors["all"][c], before * old + after * new)
    assert len({tuple(row) for row in message.tensors["now"][0].tolist()}) > 2


def test_a_client_alone_and_in_company_sends_the_same_and_what_it_declares() -> None:
    then, now = drawn(1, (5, 6, 0)), drawn(2, (7, 5, 4))
    for name, task in tasks(then, now, permutations=5, noise=0.5).items():
        job = Job(work=name, shared=Shared(), version=0, clients=(0, 1, 2), seed=3, settings={BANDWIDTH: 1.0})
        check_client_task(task, job)
        check_expected(task, job)


def test_blocks_and_batches_of_any_size_give_one_report(tmp_path: Path) -> None:
    then, now = drawn(1, (9, 8, 4, 0)), drawn(2, (7, 8, 0, 3))
    whole = compared(then, now, tmp_path, block=8)
    assert compared(then, now, tmp_path, block=1, batch_size=1) == whole
    assert compared(then, now, tmp_path, block=3, batch_size=32) == whole
    assert (whole.mmd.rows_then, whole.mmd.rows_now, whole.clients) == (21, 18, 4)
    assert compared(then, now, tmp_path, seed=1).mmd != whole.mmd


def test_ranks_have_one_report_and_it_is_that_of_one_process(tmp_path: Path) -> None:
    then, now = drawn(1, (9, 8, 4, 0)), drawn(2, (7, 8, 0, 3))

    def on_each_rank(ranks: Ranks) -> dict[str, Any]:
        local = LocalEngine(tasks(then, now, permutations=19), ClientStore(tmp_path / "ranks"), block_size=2)
        return asdict(compare_periods(DistributedEngine(local, ranks), range(4), seed=0))

    one = asdict(compared(then, now, tmp_path / "one", permutations=19))
    assert [said["value"] for said in on_ranks(2, on_each_rank)] == [one, one]


def test_the_bandwidth_is_the_median_distance_within_clients(tmp_path: Path) -> None:
    then, now = drawn(1, (20, 12)), drawn(2, (20, 12))
    apart = [torch.pdist(torch.from_numpy(np.concatenate([x, y])).double()) for x, y in zip(then, now, strict=True)]
    median = float(torch.cat(apart).median())
    assert abs(math.log2(compared(then, now, tmp_path).bandwidth / median)) <= 1 / 16 + 0.01
    with pytest.raises(LichenError, match="no client has two rows that differ"):
        compared([np.zeros((3, 2))], [np.zeros((3, 2))], tmp_path)
    with pytest.raises(LichenError, match="no client has two rows"):
        median_distance(torch.zeros(320))


def test_under_masks_the_server_learns_the_same_from_the_sum_alone(tmp_path: Path) -> None:
    then, now = drawn(1, (6, 5, 4, 5)), drawn(2, (6, 5, 4, 0), shift=2.0)
    plain = compared(then, now, tmp_path / "plain", permutations=19, dimension=32)
    terms = MaskTerms(k=3, threshold=3)
    masked = {
        name: ClientTask(work=Masked(inner=task.work, terms=terms, aggregator=SUMS), source=task.source)
        for name, task in tasks(then, now, permutations=19, dimension=32).items()
    }
    works: Any = {name: task.work for name, task in masked.items()}
    engine = UnmaskingEngine(LocalEngine(masked, ClientStore(tmp_path / "masked")), works)
    assert compare_periods(engine, range(4), seed=0, admission=Admission(works=works)) == plain


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_p_is_uniform_where_nothing_has_changed(tmp_path: Path, noise: float) -> None:
    counts_then, counts_now = (20, 6, 3, 1), (2, 6, 9, 0)
    ps = []
    for seed in range(200):
        then, now = drawn(2 * seed, counts_then), drawn(2 * seed + 1, counts_now)
        report = compared(
            then, now, tmp_path, seed=seed, permutations=19, dimension=64, noise=noise, bandwidth=2.0, batch_size=20
        )
        ps.append(report.mmd.p)
    grid = np.arange(1, 21) / 20
    reached = np.array([np.mean(np.array(ps) <= p + 1e-9) for p in grid])
    # Kolmogorov's distance of 200 draws is below 0.115 in 99 % of cases; the seeds are fixed.
    assert np.abs(reached - grid).max() < 0.115
    assert min(ps) == 1 / 20


def digits(turned: Sequence[int], clients: int = 10) -> tuple[list[Any], list[Any]]:
    """Digits dealt out by class, 30 then and 30 now each; at some clients those of now are turned by 90 degrees."""
    data = load_digits()
    order = np.argsort(data.target, kind="stable")
    images = (data.images[order] / 16).astype(np.float32)
    each = [images[np.random.default_rng(c).permutation(np.arange(c * 170, c * 170 + 170))] for c in range(clients)]
    now = [np.rot90(x[30:60], axes=(1, 2)) if c in turned else x[30:60] for c, x in enumerate(each)]
    return [x[:30] for x in each], [np.ascontiguousarray(x) for x in now]


def test_digits_turned_at_half_of_the_clients_are_seen(tmp_path: Path) -> None:
    quiet = compared(*digits(()), tmp_path, batch_size=30)
    assert not quiet.alarm
    assert quiet.mmd.p > 0.05
    for noise in (0.0, 1.0):
        turned = compared(*digits(range(5)), tmp_path, noise=noise, batch_size=30)
        assert turned.alarm
        assert turned.mmd.p == 1 / 200
    assert turned.mmd.squared > 3 * quiet.mmd.squared


def test_a_secret_of_the_node_draws_other_permutations(tmp_path: Path) -> None:
    then, now = drawn(1, (9,)), drawn(2, (9,))
    first = compared(then, now, tmp_path, permutations=19)
    second = compared(then, now, tmp_path, permutations=19, secret=77)
    assert first.mmd.squared == second.mmd.squared
    assert {compared(then, now, tmp_path, permutations=19, secret=s).mmd.p for s in range(9)} != {first.mmd.p}


def test_bad_input_is_refused(tmp_path: Path) -> None:
    for more in ({"permutations": 0}, {"dimension": 0}, {"noise": -1.0}):
        with pytest.raises(LichenError, match="use"):
            EmbeddingSums(numbers_of, width=3, **more)
    with pytest.raises(LichenError, match="no client has rows of these periods"):
        compared([np.zeros((0, 2))], [np.zeros((0, 2))], tmp_path)
    with pytest.raises(LichenError, match="0 rows then"):
        compared([np.zeros((0, 2))], [np.eye(2)], tmp_path)
    engine = LocalEngine(tasks(drawn(1, (3,)), drawn(2, (3,))), ClientStore(tmp_path))
    with pytest.raises(LichenError, match="level"):
        compare_periods(engine, (0,), seed=0, level=0.0)
    with pytest.raises(LichenError, match="bandwidth"):
        compare_periods(engine, (0,), seed=0, bandwidth=-1.0)
    with pytest.raises(LichenError, match="not finite"):
        compared([np.full((3, 2), np.nan)], [np.eye(2)], tmp_path, bandwidth=1.0)
