"""FedDF on real digits: the ensemble of unlike networks teaches every one's average."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lichen.algorithms.average import Average
from lichen.algorithms.exchange import score_architectures
from lichen.algorithms.fusion import Fusion, join_architectures, of_architecture
from lichen.clients.distillation.predict import Predict
from lichen.clients.distillation.private_models import asking, with_answer_rows
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import TrainSource
from lichen.engines.local import LocalEngine
from lichen.server.knowledge.ensemble import Ensemble
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone, Poisson
from support.unlike_students import CLIENTS, everyone, models, shards, train

KINDS = {"wide": (0, 1, 3, 4), "narrow": (2, 5)}
WEIGHT = torch.ones(CLIENTS, dtype=torch.float64)
ROUNDS = 3


def local(steps: int = 15) -> TrainSource:
    return TrainSource(shards()[0], batch_size=20, steps=steps)


def engine(folder: Path, *, block: int = 8, steps: int = 15) -> LocalEngine:
    client_tasks = {}
    for kind in KINDS:
        client_tasks[f"train/{kind}"] = ClientTask(work=train(kind, personal=False), source=local(steps))
        client_tasks[f"valid/{kind}"] = ClientTask(work=Evaluate(models()[kind]), source=everyone(shards()[2]))
    return LocalEngine(client_tasks, ClientStore(folder), block_size=block)


def fusion(steps: int = 60, **more: object) -> Fusion:
    _, public, _ = shards()
    at_home = TrainSource((with_answer_rows(public),), batch_size=32, steps=steps)
    plain: dict[str, object] = {
        "architectures": KINDS,
        "predict": {
            kind: ClientTask(
                work=Predict(models()[kind], rows=public.size, personal=True),
                source=asking(local(), public, range(CLIENTS)),
            )
            for kind in KINDS
        },
        "distil": {kind: ClientTask(work=train(kind, personal=False, lr=0.005), source=at_home) for kind in KINDS},
        "aggregator": Mean(),
        "optimizer": ServerSGD(),
        "ensemble": Ensemble("logits", classes=10),
        "sampler": Everyone(),
        "weight_N": WEIGHT,
        "rounds": ROUNDS,
    }
    return Fusion(**{**plain, **more})  # type: ignore[arg-type]


def start() -> Shared:
    return join_architectures({kind: models()[kind].init(0) for kind in KINDS})


def right(state: ServerState, folder: Path) -> dict[str, float]:
    job = Job(work="valid", shared=Shared(), version=state.round, clients=tuple(range(CLIENTS)), seed=0)
    _, metrics = score_architectures(engine(folder), job, KINDS, lambda kind: of_architecture(state.shared, kind))
    right_N = metrics["confusion"].diagonal(dim1=1, dim2=2).sum(1) / metrics["count"]
    return {kind: float(right_N[list(some)].mean()) for kind, some in KINDS.items()}


def test_distilling_lifts_the_weaker_kind_over_averaging_alone(tmp_path: Path) -> None:
    taught = right(run(fusion(valid=None), engine(tmp_path), start, rounds=ROUNDS, seed=1), tmp_path)
    plain = right(run(fusion(steps=0, valid=None), engine(tmp_path), start, rounds=ROUNDS, seed=1), tmp_path)
    assert min(taught.values()) > min(plain.values()) + 0.05
    assert sum(taught.values()) > sum(plain.values())


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    algorithm = fusion(steps=3)

    def go(rounds: int, checkpoint: Path | None = None, block: int = 8) -> ServerState:
        there = engine(tmp_path, block=block, steps=2)
        return run(algorithm, there, start, rounds=rounds, seed=1, checkpoint=checkpoint)

    whole = go(ROUNDS)
    go(1, tmp_path / "state")
    again = go(ROUNDS, tmp_path / "state", block=1)
    assert digest(again.shared.flat()) == digest(whole.shared.flat())
    assert digest(again.best.flat()) == digest(whole.best.flat())
    assert again.best_round == whole.best_round > 0


def test_a_report_counts_what_was_trained_and_sent(tmp_path: Path) -> None:
    there, reports = engine(tmp_path, steps=3), list[Report]()
    run(fusion(steps=1, valid=None), there, start, rounds=2, seed=1, observers=[reports.append])
    assert [report.round for report in reports] == [1, 2]
    assert [report.tokens for report in reports] == [3 * 20 * len(report.clients) for report in reports]
    assert sum(report.bytes_up for report in reports) == there.bytes_up
    assert sum(report.bytes_down for report in reports) == there.bytes_down


def test_without_distilling_each_kind_is_plain_averaging(tmp_path: Path) -> None:
    ours, report = fusion(steps=0, valid=None).round(fusion().init(start()), engine(tmp_path), 9)
    for kind, some in KINDS.items():

        class Some:
            def invite(self, weight_N: torch.Tensor, seed: int, some: tuple[int, ...] = some) -> tuple[int, ...]:
                return some

        plain = Average(
            aggregator=Mean(),
            optimizer=ServerSGD(),
            sampler=Some(),
            weight_N=WEIGHT,
            rounds=2,
            work=f"train/{kind}",
            valid=None,
        )
        theirs, _ = plain.round(plain.init(Shared(models()[kind].init(0))), engine(tmp_path), 9)
        assert digest(of_architecture(ours.shared, kind).flat()) == digest(theirs.shared.flat())
    model_bytes = sum(x.numel() * 4 * len(KINDS[name.partition("/")[0]]) for name, x in start().trainable.items())
    assert 0 <= report.bytes_up - model_bytes < CLIENTS * 2000  # weights alone: answers stay at the server


def test_a_round_nobody_comes_to_only_advances_the_round(tmp_path: Path) -> None:
    algorithm = fusion(sampler=Poisson(1e-12), valid=None)
    begun = algorithm.init(start())
    after, report = algorithm.round(begun, engine(tmp_path), 1)
    assert after == replace(begun, round=1)
    assert (report.clients, report.bytes_up) == ((), 0)


def test_refuses_a_kind_the_server_cannot_teach() -> None:
    with pytest.raises(LichenError, match="cannot distil with 'narrow'"):
        fusion(distil={"wide": fusion().distil["wide"]})
