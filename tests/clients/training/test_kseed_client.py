"""FedKSeed: the same model everywhere from the same sums, kilobytes on the wire, and it learns."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.kseed import INDEX, UNITS, FedKSeed, ReplayedWork
from lichen.clients.training.kseed_replay import SUMS, KSeedReplay
from lichen.clients.training.mezo import ZerothOrder
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.conventions.directions import UNIT, draw_direction
from lichen.core.errors import LichenError
from lichen.core.message import concatenate_messages, pack_message, size
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.kseed import KSeedOptimizer, SeedSums
from support.flat import closed, updated
from support.toy_cohorts import LoraLinear, Softmax, fold, job, rows

START = {"w": torch.arange(70_001) / 2**17, "b": torch.arange(12).view(3, 4) / 7}

PROGRAM = """
import torch
from lichen.clients.training.kseed_replay import SUMS, KSeedReplay
from lichen.core.tree import digest
start = {"w": torch.arange(70_001) / 2**17, "b": torch.arange(12).view(3, 4) / 7}
told = []
for kind in ("signs", "bell"):
    replay = KSeedReplay(start, lr=1e-3 / 7, root=5, count=64, kind=kind)
    sums = (torch.arange(64) * 1_000_003 % 4_000_037 - 2_000_000).to(torch.int32)
    for step in (0, 3, 0):
        told.append(digest(replay.tree({SUMS: sums * (torch.arange(64) >= step)})))
print(" ".join(told))
"""


def replay_of(start: Any = START, **more: Any) -> Any:
    return KSeedReplay(start, **{"lr": 0.01, "root": 3, "count": 40, **more})


def some_sums(seed: int, count: int = 40, share: float = 0.5) -> Any:
    g = torch.Generator().manual_seed(seed)
    sums = torch.randint(-(2**20), 2**20, (count,), generator=g, dtype=torch.int32)
    return {SUMS: sums * (torch.rand(count, generator=g) < share)}


@pytest.mark.parametrize("kind", ["signs", "bell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tensors_are_the_formula(kind: str, dtype: torch.dtype) -> None:
    start = {n: x.to(dtype) for n, x in START.items()}
    replay, shared = replay_of(start, kind=kind), some_sums(0)
    got = replay.tree(shared)
    for name, x in start.items():
        total = torch.zeros(x.numel(), dtype=torch.int64)
        for s, units in enumerate(shared[SUMS].tolist()):
            total += units * draw_direction(replay.seed(s), name, 0, x.numel(), kind).long()
        expected = x.double().flatten() - total.double() * (0.01 * 2.0**-16 * UNIT[kind])
        assert torch.equal(got[name], expected.view(x.shape).to(dtype))
    assert trees.digest(replay.tree(replay.shared())) == trees.digest(start)


@given(path=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.05, 0.6, 1.0])), min_size=1, max_size=5))
def test_from_scratch_and_by_what_changed_are_the_same_bits(path: Any) -> None:
    start = {"w": torch.arange(300) / 7}
    replay = replay_of(start)
    for seed, share in path:
        shared = some_sums(seed, share=share)
        assert torch.equal(replay.tree(shared)["w"], replay_of(start).tree(shared)["w"])


def test_threads_and_processors_rebuild_the_same_bits() -> None:
    def told(**settings: Any) -> Any:
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM], env={**os.environ, **settings}, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.split()

    first = told(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="default", NPY_DISABLE_CPU_FEATURES="AVX2 FMA3")
    assert len(set(first)) == 4
    assert first[0] == first[2]
    assert told(OMP_NUM_THREADS="2") == first


def test_what_comes_out_is_fresh_and_the_start_stays() -> None:
    replay, before = replay_of(), trees.digest(START)
    shared = some_sums(1)
    one = replay.tree(shared)
    one["w"].zero_()
    assert trees.digest(replay.tree(shared)) == trees.digest(replay_of().tree(shared))
    assert trees.digest(START) == before


def test_nodes_that_would_differ_have_other_digests() -> None:
    same, others = replay_of(), [replay_of(lr=0.02), replay_of(root=4), replay_of(count=41), replay_of(kind="bell")]
    others += [replay_of({**START, "b": START["b"] + 1}), replay_of(bits=15)]
    assert len({same.base, *(r.base for r in others)}) == 7
    assert replay_of().base == same.base


def softmax(**more: Any) -> Any:
    model = Softmax(dtype=torch.float32)
    replay = KSeedReplay(model.init(0), lr=0.05, root=1, count=64, **more)
    return model, replay


@pytest.mark.parametrize("bits", [1, 16])
def test_a_clients_pairs_rebuild_what_it_had(bits: int) -> None:
    """However coarse the slopes are: the client itself went by the rounded ones."""
    model, replay = softmax(bits=bits)
    work = FedKSeed(model, replay, steps=4)
    batches = [rows(t, range(3), active=[True, t < 2, True]) for t in range(4)]
    state = work.init(job(replay.shared(), range(3)), range(3), None)
    for batch in batches:
        state = work.step(state, batch)
    message, own = work.final(state)
    assert own is None
    assert message.metrics["steps"].tolist() == [4, 2, 4]
    assert message.weight_C.tolist() == [16, 8, 16]
    assert (message.tensors[INDEX] >= 0).sum(1).tolist() == [4, 2, 4]
    assert message.tensors[INDEX].dtype == torch.int16
    for c in range(3):
        sums = torch.zeros(64, dtype=torch.int32)
        for s, units in zip(message.tensors[INDEX][c].tolist(), message.tensors[UNITS][c].tolist(), strict=True):
            if s >= 0:
                sums[s] += units
        for name, x in replay.tree({SUMS: sums}).items():
            torch.testing.assert_close(state.params_C[name][c], x, rtol=0, atol=1e-6)


def test_together_and_alone_give_the_same_bytes() -> None:
    model, replay = softmax()
    work, shared = FedKSeed(model, replay, steps=3), {SUMS: some_sums(2, 64)[SUMS] // 64}
    together, _ = fold(work, job(shared, range(3)), [rows(t, range(3), active=[True, t != 1, True]) for t in range(3)])
    alone = [
        fold(work, job(shared, [c]), [rows(t, [c], active=[t != 1 or c != 1]) for t in range(3)])[0] for c in range(3)
    ]
    assert pack_message(together) == pack_message(concatenate_messages(alone))


def test_a_diverged_client_sends_nothing() -> None:
    model, replay = softmax()
    batch = rows(0, range(2))
    batch["x_CBF"][1, 0, 0] = torch.inf
    message, _ = fold(FedKSeed(model, replay, steps=2), job(replay.shared(), range(2)), [batch, batch])
    assert message.metrics["failed"].tolist() == [0, 1]
    assert message.weight_C.tolist() == [8, 0]
    assert message.tensors[INDEX][1].tolist() == [-1, -1]
    assert not message.tensors[UNITS][1].any()


def test_the_clip_and_the_schedule_are_in_the_slope() -> None:
    model, replay = softmax()

    def units(**settings: Any) -> Any:
        work = FedKSeed(model, replay, steps=1, clip=settings.pop("clip", 100.0))
        message, _ = fold(work, job(replay.shared(), [0], settings=settings), [rows(0, [0])])
        return int(message.tensors[UNITS][0, 0])

    assert units(lr_scale=0.5) == pytest.approx(units() / 2, abs=1)
    assert abs(units(clip=0.001)) == round(0.001 * 2**16)


@pytest.mark.parametrize("features", [5, 200_000])
def test_a_round_takes_less_than_eighteen_kilobytes_at_any_size(features: Any) -> None:
    model = Softmax(features=features, dtype=torch.float32)
    replay = KSeedReplay(model.init(0), lr=1e-6, root=1, count=4096)
    work = FedKSeed(model, replay, steps=20)
    asked = job(replay.shared(), [7], work="train lr=1e-06", settings={"lr_scale": 1.0}, base="a" * 64)
    message, _ = fold(work, asked, [rows(0, [7], features=features)] * 2)
    assert size(asked) + size(message) <= 18_000
    assert size(message) <= 1_200
    whole, _ = fold(ZerothOrder(model, lr=1e-6), job(model.init(0), [7]), [])
    if features > 5:
        assert size(whole) > 100 * (size(asked) + size(message))


def test_rounds_of_it_learn_and_evaluation_sees_it() -> None:
    model, replay = softmax()
    batch = rows(0, range(4), count=16)
    batch["labels_CB"] = batch["x_CBF"][..., :3].argmax(-1)
    work, judge = FedKSeed(model, replay, steps=8), ReplayedWork(Evaluate(model), replay)
    rule, server, shared = SeedSums(64), KSeedOptimizer(), replay.shared()

    def loss(shared: Tree) -> Any:
        message, _ = fold(judge, job(shared, range(4)), [batch])
        return float(message.metrics["loss_sum"].sum() / message.metrics["count"].sum())

    before = loss(shared)
    for t in range(15):
        message, _ = fold(work, job(shared, range(4), version=t, seed=t), [batch] * 8)
        change, told = closed(rule, rule.add(rule.zero(), message), shared)
        shared, _ = updated(server, change, server.init(Shared.of_flat(shared)), shared)
        assert told["clients"] == 4
    assert shared[SUMS].dtype == torch.int32
    assert loss(shared) < before - 0.1
    plain, _ = fold(Evaluate(model), job(replay.tree(shared), range(4)), [batch])
    assert float(plain.metrics["loss_sum"].sum() / plain.metrics["count"].sum()) == loss(shared)


def test_a_patch_and_private_state_pass_through() -> None:
    model = LoraLinear()
    replay, batch = KSeedReplay(model.init(0), lr=0.01, root=1, count=8), rows(0, [0], features=6, classes=4)
    patch = {"patch.layer.dense": torch.ones(4, 6)}
    judge = ReplayedWork(Evaluate(model), replay)
    with_patch, _ = fold(judge, job({**replay.shared(), **patch}, [0]), [batch])
    expected, _ = fold(Evaluate(model), job({**model.init(0), **patch}, [0]), [batch])
    assert torch.equal(with_patch.metrics["loss_sum"], expected.metrics["loss_sum"])
    message, own = fold(ReplayedWork(Train(model, personal=True), replay), job(replay.shared(), [0]), [batch])
    assert message.tensors == {}
    assert "params/layer.lora_B" in own


def test_refuses_what_does_not_fit() -> None:
    model, replay = softmax()
    work = FedKSeed(model, replay, steps=1)
    with pytest.raises(LichenError, match=r"more than 1 batches.*\n.*raise it"):
        fold(work, job(replay.shared(), [0]), [rows(0, [0])] * 2)
    with pytest.raises(LichenError, match="beside the seed sums"):
        fold(work, job({**replay.shared(), "w": torch.ones(1)}, [0]), [])
    with pytest.raises(LichenError, match="of 64 integers, found none"):
        fold(work, job({}, [0]), [])
    for wrong in (torch.zeros(63, dtype=torch.int32), torch.zeros(64)):
        with pytest.raises(LichenError, match="64 integers"):
            replay.tree({SUMS: wrong})
    for bad in ({"count": 0}, {"bits": 40}, {"lr": -1}, {"kind": "cauchy"}):
        with pytest.raises(LichenError):
            replay_of(**bad)
    with pytest.raises(LichenError, match="steps"):
        FedKSeed(model, replay, steps=0)
    with pytest.raises(LichenError, match="32 bits"):
        FedKSeed(model, replay, steps=1, clip=1e6)
