"""Group knowledge transfer on real digits: weak halves, one strong half, and what crosses between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lichen.algorithms.scores import score
from lichen.clients.distillation.private_models import LocalInit
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message
from lichen.core.rounds import Observer, run
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, TrainSource
from lichen.engines.around import AroundEngine
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP
from lichen.research.gkt.features import FeatureUpload
from lichen.research.gkt.gather import GatherFeatures
from lichen.research.gkt.gkt import GKT, gkt_client_tasks
from lichen.research.gkt.stitched import Stem, Stitched
from lichen.server.sampling import Everyone, Uniform
from support.flat import closed
from support.unlike_students import CLIENTS, everyone, shards

STEM = Stem(64, widths=(12,), classes=10)
TOP = ImageMLP(12, hidden=(32,), classes=10, name="top")
BOTH = Stitched(STEM, TOP)
ROUNDS = 3


def stem_training(*, personal: bool = True) -> Train:
    return Train(STEM, optimizer=ClientOptimizer("adamw", lr=0.01), personal=personal)


def engine(folder: Path, *, steps: int = 10) -> LocalEngine:
    start, test = STEM.init(0), everyone(shards()[2])
    made = gkt_client_tasks(
        stem_training(),
        BOTH,
        start=Shared.of_flat(start),
        own=TrainSource(shards()[0], batch_size=20, steps=steps),
        valid=test,
    )
    made["small"] = ClientTask(work=LocalInit(Evaluate(STEM, personal=True), start=Shared.of_flat(start)), source=test)
    return LocalEngine(made, ClientStore(folder))


def gkt(**more: object) -> GKT:
    plain: dict[str, object] = {"sampler": Everyone(), "rounds": ROUNDS}
    return GKT(
        top=Train(TOP, optimizer=ClientOptimizer("adamw", lr=0.005)),
        batch=32,
        steps=40,
        weight_N=torch.ones(CLIENTS, dtype=torch.float64),
        **{**plain, **more},  # type: ignore[arg-type]
    )


def right_N(there: LocalEngine, work: str, shared: trees.Tree) -> torch.Tensor:
    job = Job(work=work, shared=Shared.of_flat(shared), version=2 * ROUNDS, clients=tuple(range(CLIENTS)), seed=0)
    _, metrics = score(there, job)
    return metrics["confusion"].diagonal(dim1=1, dim2=2).sum(1) / metrics["count"]


def test_both_parts_learn(tmp_path: Path) -> None:
    reports: list[Report] = []
    there = engine(tmp_path)
    state = run(gkt(), there, lambda: Shared(TOP.init(0)), rounds=ROUNDS, seed=2, observers=[reports.append])
    top = {name: x for name, x in state.shared.trainable.items() if name.startswith("top/")}
    untrained = trees.join("top/", TOP.init(0), {})
    together = float(right_N(there, "valid", top).mean())
    assert together > float(right_N(there, "valid", untrained).mean()) + 0.2
    assert together > float(right_N(there, "small", {}).mean()) - 0.03
    assert reports[-1].metrics["top_loss"] < reports[0].metrics["top_loss"]
    assert trees.digest(state.best.flat()) != trees.digest(untrained)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(report: Report) -> None:
        if report.round == 2:
            raise KilledError  # the state of round 2 is not on disk, what the clients keep of it is

    def go(name: str, *observers: Observer) -> ServerState:
        return run(
            gkt(valid=None),
            engine(tmp_path / name, steps=2),
            lambda: Shared(TOP.init(0)),
            rounds=ROUNDS,
            seed=2,
            checkpoint=tmp_path / f"{name}.state",
            observers=observers,
        )

    whole = go("whole")
    with pytest.raises(KilledError):
        go("parts", kill)
    assert trees.digest(go("parts").shared.flat()) == trees.digest(whole.shared.flat())
    own, again = (ClientStore(tmp_path / name).load((1, 2), 2 * ROUNDS) for name in ("whole", "parts"))
    assert own is not None
    assert again is not None
    assert trees.digest(own) == trees.digest(again)


def test_both_directions_are_counted(tmp_path: Path) -> None:
    rows = sum(s.size for s in shards()[0])
    state, there, reports = gkt().init(Shared(TOP.init(0))), engine(tmp_path), []
    for r in range(2):
        state, report = gkt(valid=None).round(state, there, r)
        reports.append(report)
    for report in reports:
        assert 0 <= report.bytes_up - rows * (12 * 2 + 10 * 2 + 2) < CLIENTS * 2000
    assert reports[0].bytes_down < CLIENTS * 1000
    assert 0 <= reports[1].bytes_down - rows * 10 * 3 < CLIENTS * 2000
    assert {n.split("/")[1] for n in state.shared.trainable if n.startswith("answers/")} == {
        str(c) for c in range(CLIENTS)
    }


def test_nobody_sees_another_clients_answers(tmp_path: Path) -> None:
    jobs = list[Job]()

    def watched(job: Job) -> Job:
        jobs.append(job)
        return job

    there, algorithm = AroundEngine(engine(tmp_path), on_job=watched), gkt(sampler=Uniform(3), valid=None)
    state: ServerState = algorithm.init(Shared(TOP.init(0)))
    for r in range(3):
        before = state
        state, _ = algorithm.round(state, there, r)
        for job in (j for j in jobs if j.work == "learn" and j.version == 2 * r):
            (client,) = job.clients
            for name, x in job.shared.trainable.items():
                assert torch.equal(x, before.shared.trainable[f"answers/{client}/{name.removeprefix('answers.')}"])
    assert any(job.work == "learn" for job in jobs)
    assert all(len(job.clients) == 1 and not any(n.startswith("top/") for n in job.shared.trainable) for job in jobs)


def offered(shard: ArrayShard, own_C: trees.Tree | None = None, batch: int = 4) -> Message:
    work = LocalInit(FeatureUpload(STEM), start=Shared(STEM.init(0)))
    state = work.init(Job(work="offer", shared=Shared(), version=0, clients=(3,), seed=0), (3,), own_C)
    for some in EvalSource({3: shard}, batch_size=batch).batches((3,), 0):
        state = work.step(state, some)
    return work.final(state)[0]


def test_an_offer_is_the_rows_in_order_and_broken_ones_are_none() -> None:
    shard = shards()[0][0].between(0, 10)
    message = offered(shard)
    params = STEM.init(0)
    features_NF = STEM.extract(params, torch.from_numpy(shard.x))
    torch.testing.assert_close(message.tensors["features"][0].float(), features_NF, rtol=1e-3, atol=1e-3)
    logp_NK = STEM.apply(params, torch.from_numpy(shard.x)).log_softmax(-1)
    torch.testing.assert_close(message.tensors["logits"][0].float(), logp_NK, rtol=2e-3, atol=2e-3)
    assert message.tensors["labels"][0].tolist() == shard.labels.tolist()
    assert message.weight_C.tolist() == [10]
    broken = trees.join("params/", trees.broadcast(params, 1), {})
    broken["params/layer0.weight"][0, 0, 0] = torch.nan
    nothing = offered(shard, broken)
    assert (nothing.weight_C.tolist(), nothing.tensors["labels"].shape) == ([0], (1, 0))
    assert not GatherFeatures().add((), nothing)
    empty = offered(ArrayShard(np.zeros((0, 64), np.float32), labels=np.zeros(0, np.int64)))
    assert not GatherFeatures().add((), empty)


def test_refuses_nonsense() -> None:
    own, test = TrainSource(shards()[0], batch_size=20, steps=10), everyone(shards()[2])
    with pytest.raises(LichenError, match="personal=True"):
        gkt_client_tasks(stem_training(personal=False), BOTH, start=Shared(STEM.init(0)), own=own, valid=test)
    with pytest.raises(LichenError, match="0 steps"):
        GKT(top=Train(TOP), batch=1, steps=0, sampler=Everyone(), weight_N=torch.ones(1), rounds=1)
    with pytest.raises(LichenError, match="nobody to keep"):
        GKT(top=stem_training(), batch=1, steps=1, sampler=Everyone(), weight_N=torch.ones(1), rounds=1)
    with pytest.raises(LichenError, match="one at a time"):
        FeatureUpload(STEM).init(Job(work="o", shared=Shared(), version=0, clients=(0, 1), seed=0), (0, 1), None)
    with pytest.raises(LichenError, match="no client offered"):
        closed(GatherFeatures(), (), {})
    with pytest.raises(LichenError, match="work FeatureUpload"):
        GatherFeatures().add((), replace(offered(shards()[0][0]), tensors={}))
