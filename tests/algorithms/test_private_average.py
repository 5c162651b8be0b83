"""Rounds under privacy are charged before they begin, tell nothing of who came, and cost no less than what has left."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.algorithms.average import Average
from lichen.algorithms.private_average import PrivateAverage
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.admission import Admission
from lichen.core.contracts.algorithm import Report
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.rounds import load_state, run, save_state
from lichen.core.secret.budget import Budget
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, TrainSource
from lichen.engines.local import LocalEngine
from lichen.server.optimize import ServerSGD
from lichen.server.private_mean import PrivateMean
from lichen.server.sampling import Everyone
from lichen.transforms.bounds.clip_change import ClipChange
from lichen.transforms.transform import Transformed
from support.toy_cohorts import Softmax

CLIENTS, ROUNDS = 6, 5
MODEL = Softmax(dtype=torch.float32)
TERMS = {"sigma": 1.0}


def shards() -> tuple[ArrayShard, ...]:
    draws = [numpy_generator(3, client) for client in range(CLIENTS)]
    return tuple(ArrayShard(x=rng.normal(size=(4, 5)).astype("float32"), labels=rng.integers(0, 3, 4)) for rng in draws)


def work() -> Transformed:
    train = Train(MODEL, optimizer=ClientOptimizer(name="sgd", lr=0.5), weigh_by="one")
    return Transformed(train, (ClipChange(0.5, private=True),))


def engine(folder: Path) -> LocalEngine:
    source = TrainSource(shards(), batch_size=2, steps=2)
    return LocalEngine({"train": ClientTask(work=work(), source=source)}, ClientStore(folder), block_size=3)


def average(rate: float) -> Average:
    return Average(
        aggregator=PrivateMean(rate * CLIENTS, clip=0.5),
        optimizer=ServerSGD(),
        sampler=Everyone(),
        weight_N=torch.ones(CLIENTS),
        rounds=ROUNDS,
        work="train",
        valid=None,
        steps_always=True,
        admission=Admission(works={"train": work()}),
    )


def private(budget: Any, *, rate: float = 0.5, sigma: float = 1.0, seed: int = 0) -> PrivateAverage:
    key = SecretRandomness.of_seed(seed)
    return PrivateAverage(inner=average(rate), sigma=sigma, rate=rate, randomness=key, budget=budget)


def start() -> Shared:
    return Shared(MODEL.init(0))


def learned(folder: Path, *, reports: list[Report] | None = None, **more: Any) -> Shared:
    algorithm = private(Budget(folder / "budget.jsonl", terms=TERMS), **more)
    watch = [] if reports is None else [reports.append]
    return run(algorithm, engine(folder), start, rounds=ROUNDS, seed=0, observers=watch).shared


def test_a_report_tells_nothing_of_who_came_and_every_round_is_a_step(tmp_path: Path) -> None:
    rare, often = list[Report](), list[Report]()
    first = learned(tmp_path / "rare", reports=rare, rate=0.02)
    learned(tmp_path / "often", reports=often, rate=0.9)
    for report in (*rare, *often):
        assert report.clients == ()
        assert report.metrics.keys() == {"noise"}
        assert (report.tokens, report.seconds, report.attendance.summary()) == (None, 0.0, "")
    assert len({(report.bytes_up, report.bytes_down) for report in often}) == 1
    assert 0 < rare[0].bytes_up < often[0].bytes_up
    assert Budget(tmp_path / "rare" / "budget.jsonl", terms=TERMS).charges == ROUNDS
    # At this rate nobody came to most rounds; all of them had noise.
    assert all(not torch.equal(x, start().trainable[name]) for name, x in first.trainable.items())


def test_the_key_alone_says_who_comes_and_what_the_noise_is(tmp_path: Path) -> None:
    same = [learned(tmp_path / str(place)) for place in range(2)]
    other = learned(tmp_path / "other", seed=1)
    assert torch.equal(same[0].trainable["weight"], same[1].trainable["weight"])
    assert not torch.equal(same[0].trainable["weight"], other.trainable["weight"])


def test_without_noise_and_sampling_it_is_the_clipped_mean(tmp_path: Path) -> None:
    quiet = learned(tmp_path / "quiet", rate=1.0, sigma=0.0)
    from lichen.server.mean import Mean

    plain = replace(average(1.0), aggregator=Mean("uniform"))
    mean = run(plain, engine(tmp_path / "plain"), start, rounds=ROUNDS, seed=0).shared
    for name, x in quiet.trainable.items():
        assert torch.allclose(x, mean.trainable[name], atol=1e-6)


def test_it_refuses_an_averaging_that_would_tell_more() -> None:
    for change in ({"valid": "valid"}, {"steps_always": False}):
        with pytest.raises(LichenError, match="private averaging"):
            replace(private(None), inner=replace(average(0.5), **change))
    unbounded = replace(private(Unlimited()), inner=replace(average(0.5), admission=Admission()))
    with pytest.raises(LichenError, match="bounds"):
        unbounded.round(unbounded.init(start()), engine(Path("none")), 0)


class Unlimited:
    """Pays for everything."""

    def charge(self, round_: int) -> int:
        return 0

    def close(self, round_: int, attempt: int) -> None:
        return None


class KillError(Exception):
    """Stands for the end of the process."""


@dataclass
class Kills:
    """Ends the process at the n-th of the moments that it is told of; what the budget writes may be cut short.

    Attributes:
        at: Which moment.
        seen: Moments so far.
        left: Sums that were told to observers.
    """

    at: int
    seen: int = 0
    left: int = 0

    def moment(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise KillError


@dataclass
class KilledBudget:
    """A budget around which the process ends: before a line, in the middle of it, after it."""

    inner: Budget
    kills: Kills

    def _write(self, write: Callable[[], Any]) -> Any:
        self.kills.moment()
        before = self.inner.path.read_bytes() if self.inner.path.exists() else b""
        done = write()
        whole = self.inner.path.read_bytes()
        try:
            self.kills.moment()
        except KillError:
            if before and whole != before:  # the disk has half of the line
                self.inner.path.write_bytes(whole[: (len(before) + len(whole)) // 2])
            raise
        self.kills.moment()
        return done

    def charge(self, round_: int) -> int:
        return int(self._write(lambda: self.inner.charge(round_)))

    def close(self, round_: int, attempt: int) -> None:
        self._write(lambda: self.inner.close(round_, attempt))


class Listening:
    """An engine around which the process ends once a job is out, and which counts jobs that left uncharged."""

    def __init__(self, inner: LocalEngine, kills: Kills, path: Path) -> None:
        self._inner, self._kills, self._path = inner, kills, path
        self.unpaid = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def submit(self, job: Job) -> int:
        charged = Budget(self._path, terms=TERMS)._open(job.version) if self._path.exists() else None
        self.unpaid += charged is None
        number = self._inner.submit(job)
        self._kills.moment()
        return number


def lives(folder: Path, at: int, limit: int) -> tuple[Kills, int, int, int]:
    """A run that is killed once and goes on: kills, charges, rounds finished, and jobs that left uncharged."""
    kills, path, unpaid = Kills(at), folder / "budget.jsonl", 0
    checkpoint = folder / "state.safetensors"
    folder.mkdir()

    def save(file: Path, state: Any) -> None:
        kills.moment()
        save_state(file, state)
        kills.moment()

    for _ in range(2):
        budget = Budget(path, terms=TERMS, limit=limit)
        algorithm = private(KilledBudget(budget, kills))  # type: ignore[arg-type]
        mean = algorithm.inner.aggregator
        assert isinstance(mean, PrivateMean)
        listening = Listening(engine(folder / "clients"), kills, path)

        def seen(report: Report) -> None:
            kills.left += 1

        with suppress(KillError):
            run(
                algorithm,
                listening,  # type: ignore[arg-type]
                start,
                rounds=ROUNDS,
                seed=0,
                checkpoint=checkpoint,
                save=save,
                stop=lambda state: not budget.pays_for(state.round),  # noqa: B023
                observers=[seen],
            )
        unpaid += listening.unpaid
    finished = load_state(checkpoint).round if checkpoint.exists() else 0
    return kills, Budget(path, terms=TERMS).charges, finished, unpaid


@pytest.mark.parametrize("at", range(1, 31))
def test_thirty_kills_never_spend_less_than_has_left(tmp_path: Path, at: int) -> None:
    kills, charges, finished, unpaid = lives(tmp_path / "run", at, ROUNDS)
    assert kills.seen > at  # it was killed, and went on
    assert unpaid == 0
    closed = sum(b'"close"' in line for line in (tmp_path / "run" / "budget.jsonl").read_bytes().splitlines())
    assert charges >= closed >= max(finished, kills.left)
    # A second attempt is paid for, and so the last round may not be: the run ends before it, not past ε.
    assert charges <= ROUNDS
    assert finished in {ROUNDS, ROUNDS - 1}
    assert charges == ROUNDS if finished == ROUNDS - 1 else closed in {ROUNDS, charges}


def test_a_round_done_again_has_other_noise_and_other_clients(tmp_path: Path) -> None:
    path = tmp_path / "budget.jsonl"
    states = []
    for _ in range(2):
        algorithm = private(Budget(path, terms=TERMS))
        state, _ = algorithm.round(algorithm.init(start()), engine(tmp_path / "clients"), 7)
        states.append(state.shared.trainable["weight"])
    assert not torch.equal(*states)
    assert Budget(path, terms=TERMS).charges == 2
