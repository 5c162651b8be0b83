"""Virtual time: answers come in order of arrival, late ones are cut, who drops out is missed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.engines.clock import ClockEngine, Delays
from support.small_experiment import engine, experiment

MADE = experiment()


def clock(folder: Path, seed: int = 0, **delays: Any) -> ClockEngine:
    return ClockEngine(
        engine(MADE, folder), Delays(**delays), seed=seed, timed=lambda job: job.work.startswith("train")
    )


def job(version: int = 0, clients: tuple[int, ...] = (0, 1, 2, 3), work: str = "train lr=0.1") -> Job:
    return Job(work=work, shared=MADE.start, version=version, clients=clients, seed=5)


def heard(there: ClockEngine, *numbers: int, until: float = math.inf) -> list[tuple[int, int, float]]:
    return [(reply.job, reply.clients[0], there.now()) for reply in there.replies(numbers, until)]


def test_answers_come_by_arrival_whatever_job_they_are_of(tmp_path: Path) -> None:
    there = clock(tmp_path, median=10, sigma=1)
    first = there.submit(job(0, (0, 1)))
    there.set_time(8)
    second = there.submit(job(1, (2, 3)))
    came = heard(there, first, second)
    delays = Delays(median=10, sigma=1)
    wanted = [(delays.arrival(0, c, 0, 0.0), first, c) for c in (0, 1)]
    wanted += [(delays.arrival(0, c, 1, 8.0), second, c) for c in (2, 3)]
    assert [(number, c) for number, c, _ in came] == [(number, c) for _, number, c in sorted(wanted)]
    assert [time for _, _, time in came] == [max(8, time) for time, _, _ in sorted(wanted)]


def test_each_answer_is_the_inner_engines_and_so_are_the_bytes(tmp_path: Path) -> None:
    there, inner = clock(tmp_path / "a", median=10, sigma=1), engine(MADE, tmp_path / "b")
    mine = {reply.clients[0]: reply.message for reply in there.replies((there.submit(job()),))}
    for reply in inner.replies((inner.submit(job()),)):
        assert reply.message is not None
        for place, client in enumerate(reply.clients):
            one = mine[client]
            assert one is not None
            assert one.client_C.tolist() == [client]
            assert all(torch.equal(x[0], reply.message.tensors[name][place]) for name, x in one.tensors.items())
    assert (there.bytes_up, there.bytes_down) == (inner.bytes_up, inner.bytes_down)


def test_until_cuts_the_tail_and_the_rest_can_be_heard_later(tmp_path: Path) -> None:
    delays = Delays(median=10, sigma=2)
    due = sorted((delays.arrival(0, c, 0, 0.0), c) for c in range(4))
    there = clock(tmp_path, median=10, sigma=2)
    number = there.submit(job())
    up = due[1][0]
    assert [c for _, c, _ in heard(there, number, until=up)] == [due[0][1], due[1][1]]
    assert there.now() == up
    half = there.bytes_up
    assert [c for _, c, _ in heard(there, number)] == [due[2][1], due[3][1]]
    assert there.bytes_up == 2 * half
    assert there.now() == due[3][0]


def test_who_drops_out_does_nothing_and_the_clock_goes_to_the_deadline(tmp_path: Path) -> None:
    there = clock(tmp_path, seed=1, dropout=0.5)
    dropped = {c for c in range(4) if there.delays.arrival(1, c, 0, 0.0) == math.inf}
    assert 0 < len(dropped) < 4
    number = there.submit(job())
    assert {c for _, c, _ in heard(there, number, until=1e6)} == set(range(4)) - dropped
    assert there.now() == 1e6
    assert there.bytes_down == engine(MADE, tmp_path / "x").bytes_down + 4 * (there.bytes_down // 4)
    # Without a deadline nothing more can come, and nobody waits for ever.
    other = there.submit(job(1))
    assert len(heard(there, other)) < 5


def test_scoring_takes_no_time(tmp_path: Path) -> None:
    there = clock(tmp_path)
    assert len(list(there.replies((there.submit(job(work="valid")),)))) > 0
    assert there.now() == 0


def test_nobody_waits_for_a_job_that_was_given_up(tmp_path: Path) -> None:
    there = clock(tmp_path)
    first, second = there.submit(job(0, (0, 1))), there.submit(job(1, (2,)))
    there.cancel(first)
    assert [number for number, _, _ in heard(there, first, second)] == [second]


def test_a_client_begins_by_day() -> None:
    never, always = Delays(median=0, hours=6), Delays(median=0)
    for client in range(50):
        assert always.arrival(3, client, 0, 1000.0) == 1000.0
        begins = never.arrival(3, client, 0, 1000.0)
        assert begins - 1000 <= 18 * 3600
        assert never.arrival(3, client, 0, begins + 1) == begins + 1 or begins == 1000
        assert never.arrival(3, client, 4, 1000.0 + 24 * 3600) == pytest.approx(begins + 24 * 3600)
    there = sum(never.arrival(3, client, 0, 1000.0) == 1000 for client in range(4000))
    assert there / 4000 == pytest.approx(6 / 24, abs=0.03)


def test_delays_have_their_median_and_spread_and_stay_with_clients_as_they_are_told() -> None:
    def logs(persistence: float) -> torch.Tensor:
        delays = Delays(median=20, sigma=1.5, persistence=persistence)
        return torch.tensor([[delays.arrival(0, c, v, 0.0) for v in range(20)] for c in range(300)]).double().log()

    for persistence in (0.0, 0.5, 1.0):
        log_CV = logs(persistence)
        assert float(log_CV.mean()) == pytest.approx(math.log(20), abs=0.2)
        assert float(log_CV.std()) == pytest.approx(1.5, abs=0.15)
        assert float(log_CV.var(1).mean()) == pytest.approx(2.25 * (1 - persistence), abs=0.15)


@pytest.mark.parametrize("wrong", [{"median": -1}, {"sigma": -0.1}, {"dropout": 2}, {"hours": 0}, {"persistence": 2}])
def test_delays_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LichenError, match=r"out of range"):
        Delays(**wrong)  # type: ignore[arg-type]
