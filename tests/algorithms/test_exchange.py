"""Three unlike networks that share answers and no weights: on real digits, resumable, in counted bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lichen.algorithms.exchange import PredictionExchange, by_architecture, score_architectures
from lichen.core.collecting.admission import Admission, Limits
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.rounds import Observer, load_state, run
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.server.knowledge.ensemble import Ensemble
from lichen.server.sampling import Everyone, Uniform
from support.unlike_students import CLIENTS, KINDS, client_tasks, shards

ROUNDS = 3
WEIGHT = torch.ones(CLIENTS, dtype=torch.float64)


def exchange(**more: object) -> PredictionExchange:
    plain: dict[str, object] = {"sampler": Everyone(), "rounds": ROUNDS, "valid_every": ROUNDS}
    ensemble = Ensemble(classes=10, sharpen=0.05)
    return PredictionExchange(architectures=KINDS, weight_N=WEIGHT, **{"ensemble": ensemble, **plain, **more})  # type: ignore[arg-type]


STEPS, DIGEST = 20, 40


def engine(folder: Path, *, steps: int = STEPS, digest_steps: int = DIGEST, block: int = 8) -> LocalEngine:
    return LocalEngine(client_tasks(steps=steps, digest_steps=digest_steps), ClientStore(folder), block_size=block)


def right_N(engine: LocalEngine, version: int) -> torch.Tensor:
    """Accuracy of every client's own model on the common test rows."""
    job = Job(work="valid", shared=Shared(), version=version, clients=tuple(range(CLIENTS)), seed=0)
    _, metrics = score_architectures(engine, job, KINDS, lambda _: Shared())
    return metrics["confusion"].diagonal(dim1=1, dim2=2).sum(1) / metrics["count"]


@dataclass(frozen=True)
class Ran:
    state: ServerState
    reports: list[Report]
    right_N: torch.Tensor
    alone_N: torch.Tensor


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder, reports = tmp_path_factory.mktemp("exchange"), []
    there = engine(folder / "own")
    state = run(
        exchange(), there, Shared, rounds=ROUNDS, seed=5, checkpoint=folder / "state", observers=[reports.append]
    )
    # As many steps as the others took on own and public rows together.
    alone = engine(folder / "alone", steps=STEPS * ROUNDS + DIGEST * (ROUNDS - 1))
    job = Job(work="train", shared=Shared(), version=0, clients=tuple(range(CLIENTS)), seed=5)
    score_architectures(alone, job, KINDS, lambda _: Shared())
    return Ran(state, reports, right_N(there, 2 * ROUNDS), right_N(alone, 1))


def test_the_worst_network_and_the_mean_gain_over_training_alone(ran: Ran) -> None:
    def by_arch(x_N: torch.Tensor) -> dict[str, float]:
        return {kind: float(x_N[list(some)].mean()) for kind, some in KINDS.items()}

    alone, together = by_arch(ran.alone_N), by_arch(ran.right_N)
    worst = min(alone, key=lambda kind: alone[kind])
    assert together[worst] > alone[worst] + 0.02
    assert float(ran.right_N.mean()) > float(ran.alone_N.mean()) + 0.05


def test_the_ensemble_knows_more_than_its_members(ran: Ran) -> None:
    _, public, _ = shards()
    said_N = ran.state.shared.frozen["answers.index"][:, 0].numpy()
    right = float((said_N == public.labels).mean())
    assert right > float(ran.alone_N.max())
    assert right > float(ran.right_N.mean()) + 0.05


def test_bytes_are_answers_alone(ran: Ran) -> None:
    assert all(report.tokens > 0 for report in ran.reports)
    first, *later = ran.reports
    rows, classes = 400, 10
    assert first.bytes_up < CLIENTS * 1000
    assert first.bytes_down < CLIENTS * 1000
    for report in later:
        assert 0 <= report.bytes_up - CLIENTS * rows * classes * 2 < CLIENTS * 3000
        assert 0 <= report.bytes_down - CLIENTS * rows * classes * 3 < CLIENTS * 3000
    assert [("valid" in r.metrics) for r in ran.reports] == [False, False, True]
    assert {f"valid/{kind}" for kind in KINDS} <= ran.reports[-1].metrics.keys()


@pytest.mark.parametrize("work", ["train", "predict", "learn"])
def test_a_client_that_claims_more_than_it_can_bring_is_left_out_of_that_step_alone(work: str, tmp_path: Path) -> None:
    def limits(task: str, client: int) -> Limits:
        return Limits(weight=1e-3) if client == 2 and task.startswith(f"{work}/") else Limits()

    reports: list[Report] = []
    there = engine(tmp_path, steps=2, digest_steps=2)
    judged = exchange(admission=Admission(limits=limits))
    run(judged, there, Shared, rounds=2, seed=5, checkpoint=tmp_path / "state", observers=[reports.append])
    refused = [dict(report.attendance.refused) for report in reports]
    assert refused == ([{"weight": 1}, {}] if work == "train" else [{}, {"weight": 1}])
    assert all(refusal.client == 2 for report in reports for refusal in report.attendance.named)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(report: Report) -> None:
        if report.round == 2:
            raise KilledError  # the state of round 2 is not on disk, what the clients keep of it is

    def go(name: str, *observers: Observer, block: int = 8) -> ServerState:
        there = engine(tmp_path / name, steps=3, digest_steps=3, block=block)
        state = run(
            exchange(), there, Shared, rounds=ROUNDS, seed=5, checkpoint=tmp_path / f"{name}.state", observers=observers
        )
        return state

    whole = go("whole")
    with pytest.raises(KilledError):
        go("parts", kill)
    assert load_state(tmp_path / "parts.state").round == 1
    state = go("parts", block=1)
    assert digest(state.shared.flat()) == digest(whole.shared.flat())
    assert state.best_value == whole.best_value
    own, again = (ClientStore(tmp_path / name).load((4,), 2 * ROUNDS) for name in ("whole", "parts"))
    assert own is not None
    assert again is not None
    assert digest(own) == digest(again)


def test_who_comes_late_listens_before_it_speaks(tmp_path: Path) -> None:
    there, algorithm = engine(tmp_path, steps=2, digest_steps=2), exchange(sampler=Uniform(2), valid=None, rounds=4)
    state, reports = algorithm.init(Shared()), []
    for r in range(4):
        state, report = algorithm.round(state, there, 40 + r)
        reports.append(report)
    known: set[int] = set()
    for report in reports:
        spoke = report.metrics.get("clients", 0.0)
        assert spoke == len(known & set(report.clients))
        known |= set(report.clients)
    assert len({r.clients for r in reports}) > 1


def test_clients_are_parted_by_kind_and_each_has_one() -> None:
    assert dict(by_architecture(KINDS, (0, 4, 5))) == {"deep": (0,), "wide": (4,), "narrow": (5,)}
    for architectures in ({"a": (0, 1)}, {"a": (0, 1, 2), "b": (2, 3, 4, 5)}, {**KINDS, "d": (6,)}):
        with pytest.raises(LichenError, match="one architecture"):
            PredictionExchange(
                architectures=architectures,
                ensemble=Ensemble(classes=10),
                sampler=Everyone(),
                weight_N=WEIGHT,
                rounds=1,
            )
