"""FedBuff and deadlines: the synchronous run as a limit, the discount by hand, dropouts, and stops in mid-flight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_average import average, same

from lichen.algorithms.average import Average
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.message import Job, Message
from lichen.core.replies import Reply
from lichen.core.rounds import load_state, run
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.engines.around import AroundEngine
from lichen.engines.clock import ClockEngine, Delays
from lichen.recipes.assemble.experiment import Experiment
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Uniform
from lichen.server.schedules import Buffered, Synchronous
from lichen.transforms.downlink import WHOLE, Deltas, Downlink
from lichen.transforms.parse import parse_codecs
from support.small_experiment import engine, experiment


def downlink(word: str | None) -> Downlink:
    """Steps coded by this codec, or everything whole."""
    return Deltas(parse_codecs([word]), agreed=True) if word else WHOLE


def clock(made: Experiment, folder: Path, around: Callable[[Reply, Job], Any] | None = None, **delays: Any) -> Any:
    inner: Any = engine(made, folder)
    inner = inner if around is None else AroundEngine(inner, on_reply=around)
    return ClockEngine(inner, Delays(**delays), seed=9, timed=lambda job: job.work.startswith("train"))


def told(report: Report) -> tuple[Any, ...]:
    return (replace(report, seconds=0.0), dict(report.metrics))


def finished(algorithm: Average, made: Experiment, there: Any, *, file: Path | None = None, rounds: int = 6) -> Any:
    seen: list[Report] = []
    state = run(
        replace(algorithm, rounds=rounds),
        there,
        lambda: made.start,
        rounds=rounds,
        seed=3,
        checkpoint=file,
        observers=[seen.append],
    )
    return state, [told(report) for report in seen]


@pytest.mark.parametrize("down", [None, "int8"])
def test_nobody_late_and_a_full_buffer_is_the_synchronous_run(tmp_path: Path, down: str | None) -> None:
    made = experiment(6)
    more: dict[str, Any] = {"sampler": Uniform(3), "downlink": downlink(down)}
    there = {name: clock(made, tmp_path / name, median=0) for name in ("waits", "buffer")}
    waits, told_waits = finished(average(made, **more), made, there["waits"], file=tmp_path / "waits.file")
    full = average(made, schedule=Buffered(arrivals=3, concurrency=3), **more)
    _, told_buffer = finished(full, made, there["buffer"], file=tmp_path / "buffer.file")
    assert (tmp_path / "waits.file").read_bytes() == (tmp_path / "buffer.file").read_bytes()
    assert told_waits == told_buffer
    # And the clock itself changes nothing.
    plain, told_plain = finished(average(made, **more), made, engine(made, tmp_path / "plain"))
    assert same(plain.shared.flat(), waits.shared.flat())
    assert [(r.bytes_up, r.bytes_down, r.metrics["loss"]) for r, _ in told_plain] == [
        (r.bytes_up, r.bytes_down, r.metrics["loss"]) for r, _ in told_waits
    ]


def test_without_jobs_in_flight_a_state_has_the_bytes_it_had(tmp_path: Path) -> None:
    made = experiment()
    finished(average(made), made, engine(made, tmp_path), file=tmp_path / "file")
    tree, header = load_tree(tmp_path / "file")
    assert set(header) == {"round", "best_round"}
    assert not [name for name in tree if name.startswith("flight")]


class Three:
    """Answers at 1, 2 and 40 seconds: one client is two steps behind when it comes."""

    def __init__(self) -> None:
        self.change = {0: 1.0, 1: 2.0, 2: 4.0}

    def message(self, job: Job, client: int) -> Message:
        return Message(
            group="",
            client_C=torch.tensor([client]),
            version_C=torch.tensor([job.version]),
            tensors={"w": torch.tensor([[self.change[client] + job.version]])},
            weight_C=torch.ones(1, dtype=torch.float64),
        )


class ByHand:
    """An engine of three clients whose answers come at given times."""

    def __init__(self) -> None:
        self.bytes_up = self.bytes_down = 0
        self.time, self.jobs, self.due = 0.0, dict[int, Job](), list[tuple[float, int, int]]()

    def submit(self, job: Job) -> int:
        self.jobs[len(self.jobs)] = job
        for client in job.clients:
            self.due.append((self.time + (1.0, 1.5, 2.7)[client], len(self.jobs) - 1, client))
        return len(self.jobs) - 1

    def replies(self, numbers: Any, until: float = math.inf) -> Any:
        while due := sorted(one for one in self.due if one[1] in numbers):
            self.due.remove(due[0])
            self.time, number, client = due[0]
            yield Reply(job=number, clients=(client,), message=Three().message(self.jobs[number], client))

    def cancel(self, number: int) -> None:
        self.due = [one for one in self.due if one[1] != number]

    def now(self) -> float:
        return self.time

    def merge(self, aggregator: Any, total: Any) -> Any:
        return total

    def join(self, client_N: Any, metrics: Any, lines: Any = ()) -> Any:
        order = client_N.argsort()
        return client_N[order], {name: x[order] for name, x in metrics.items()}, tuple(map(tuple, lines))


def test_the_discount_of_three_clients_is_that_computed_by_hand() -> None:
    made, there = experiment(3), ByHand()
    algorithm = average(
        made,
        sampler=Uniform(3),
        schedule=Buffered(arrivals=1, concurrency=3),
        optimizer=ServerSGD(),
        valid=None,
        rounds=9,
    )
    state = ServerState(round=0, shared=Shared({"w": torch.zeros(1)}))
    values, ages = [], []
    for r in range(4):
        state, report = algorithm.round(state, there, r)
        values.append(float(state.shared.trainable["w"]))
        ages.append(report.metrics.get("age", 0.0))
    # At 1.0 client 0 for version 0; at 1.5 client 1 for version 0; at 2.0 client 0 for 1; at 2.7 client 2 for 0.
    # A mean of one answer is that answer, however it is discounted.
    assert values == [1.0, 3.0, 5.0, 9.0]
    assert ages == [0, 1, 1, 3]

    # In pairs: client 2's answer for version 0 meets client 0's for version 1, and weighs 2^-1/2 of it.
    late = 2**-0.5
    for mean, divisor in (
        (Mean(), 1 + late),
        (Mean("uniform"), 1 + late),
        (Mean("uniform", divisor="plain"), 2),  # FedBuff's own: over the number of answers
    ):
        there = ByHand()
        algorithm = replace(algorithm, aggregator=mean, schedule=Buffered(arrivals=2, concurrency=3))
        state, values = ServerState(round=0, shared=Shared({"w": torch.zeros(1, dtype=torch.float64)})), []
        for r in range(2):
            state, _ = algorithm.round(state, there, r)
            values.append(float(state.shared.trainable["w"]))
        assert values[0] == pytest.approx((1.0 + 2.0) / 2)
        # Sent at 1.5: client 0 comes at 2.5, client 1 at 3.0; client 2 of version 0 comes at 2.7.
        assert values[1] - values[0] == pytest.approx((2.0 + late * 4.0) / divisor, rel=1e-7)


def test_a_deadline_cuts_the_tail_and_who_was_late_may_come_again(tmp_path: Path) -> None:
    made = experiment(6)
    algorithm = average(made, schedule=Synchronous(deadline=12.0))
    state, reports = finished(algorithm, made, clock(made, tmp_path, median=10, sigma=1))
    missing = [set(report.attendance.missing) for report, _ in reports]
    assert any(missing)
    assert all(report.clients == tuple(range(6)) for report, _ in reports)
    times = [metrics["time"] for _, metrics in reports]
    assert all(0 < b - a <= 12.0 for a, b in zip([0.0, *times], times, strict=False))
    assert state.in_flight == ()

    class Those:
        def __init__(self) -> None:
            self.rounds = [tuple(sorted(set(range(6)) - late)) for late in missing]

        def invite(self, weight_N: torch.Tensor, seed: int) -> tuple[int, ...]:
            return self.rounds.pop(0)

    without, _ = finished(average(made, sampler=Those()), made, engine(made, tmp_path / "without"))
    assert same(without.shared.flat(), state.shared.flat())


def test_too_few_in_time_make_no_step(tmp_path: Path) -> None:
    made = experiment(4)
    algorithm = average(made, schedule=Synchronous(deadline=12.0, least=4), valid=None)
    _, reports = finished(algorithm, made, clock(made, tmp_path, median=10, sigma=1))
    assert {report.attendance.arrived < 4 for report, _ in reports} == {True, False}
    assert all((report.attendance.arrived < 4) == ("skipped" in metrics) for report, metrics in reports)


@pytest.mark.parametrize("schedule", [Synchronous(deadline=50.0), Buffered(arrivals=2, concurrency=4, deadline=50.0)])
@pytest.mark.parametrize("dropout", [0.4, 1.0])
def test_dropouts_never_end_a_run(tmp_path: Path, schedule: Any, dropout: float) -> None:
    made = experiment(6)
    there = clock(made, tmp_path, median=5, sigma=1, dropout=dropout)
    state, reports = finished(average(made, sampler=Uniform(4), schedule=schedule), made, there, rounds=12)
    assert state.round == 12
    assert any(report.attendance.missing for report, _ in reports)
    assert same(state.shared.flat(), made.start.flat()) == (dropout == 1.0)


def test_answers_that_are_too_old_are_given_up(tmp_path: Path) -> None:
    made = experiment(8)
    schedule = Buffered(arrivals=1, concurrency=4, max_age=1)
    there = clock(made, tmp_path, median=5, sigma=2)
    state, reports = finished(average(made, sampler=Uniform(4), schedule=schedule), made, there, rounds=12)
    assert all(metrics.get("age", 0) <= 1 for _, metrics in reports)
    assert any(report.attendance.missing for report, _ in reports)
    assert all(state.round - flight.job.version <= 2 for flight in state.in_flight)


def flying(made: Experiment) -> Average:
    return average(made, sampler=Uniform(5), schedule=Buffered(arrivals=2, concurrency=5, max_age=4, deadline=200.0))


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("down", [None, "int4~"])
def test_a_stopped_run_goes_on_with_what_was_in_flight(tmp_path: Path, after: int, down: str | None) -> None:
    made = experiment(9)
    algorithm = replace(flying(made), downlink=downlink(down))
    delays: dict[str, Any] = {"median": 20, "sigma": 1.5, "dropout": 0.1}
    whole, told_whole = finished(
        algorithm, made, clock(made, tmp_path / "a", **delays), file=tmp_path / "whole", rounds=8
    )
    assert whole.in_flight
    file = tmp_path / "part"
    finished(algorithm, made, clock(made, tmp_path / "b", **delays), file=file, rounds=after)
    middle = load_state(file)
    assert middle.in_flight
    assert middle.clock > 0
    _, rest = finished(algorithm, made, clock(made, tmp_path / "b", **delays), file=file, rounds=8)
    assert file.read_bytes() == (tmp_path / "whole").read_bytes()
    assert rest == told_whole[after:]


@pytest.mark.parametrize("at", [2, 4, 6, 8])
def test_a_run_that_is_killed_in_a_round_loses_that_round_alone(tmp_path: Path, at: int) -> None:
    made, delays = experiment(9), {"median": 20.0, "sigma": 1.5}
    finished(flying(made), made, clock(made, tmp_path / "a", **delays), file=tmp_path / "whole", rounds=8)
    heard = [0]

    def kill(reply: Reply, job: Job) -> tuple[Reply, ...]:
        heard[0] += job.work.startswith("train")
        if heard[0] == at:
            raise KeyboardInterrupt
        return (reply,)

    file = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        finished(flying(made), made, clock(made, tmp_path / "b", kill, **delays), file=file, rounds=8)
    assert not file.exists() or load_state(file).in_flight
    finished(flying(made), made, clock(made, tmp_path / "b", **delays), file=file, rounds=8)
    assert file.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_state_keeps_the_tensors_of_versions_that_somebody_works_on(tmp_path: Path) -> None:
    made, file = experiment(9), tmp_path / "state"
    shared: dict[int, Shared] = {}

    def look(report: Report) -> None:
        if file.exists():
            state = load_state(file)
            shared[state.round] = state.shared
            assert sum(len(flight.waiting) for flight in state.in_flight) <= 5
            for flight in state.in_flight:
                assert flight.waiting
                assert set(flight.waiting) <= set(flight.job.clients)
                assert same(flight.job.shared.flat(), shared.get(flight.job.version, made.start).flat())

    algorithm = replace(flying(made), rounds=8)
    there = clock(made, tmp_path / "a", median=20, sigma=1.5)
    run(algorithm, there, lambda: made.start, rounds=8, seed=3, checkpoint=file, observers=[look])
    assert len(shared) == 7
