"""Jobs of several versions in flight at real sites: bytes of rounds, order of arrival, and stops on either side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lichen.core.collecting.collect import collect
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.message import Job, pack_job
from lichen.core.replies import Reply
from lichen.core.rounds import load_state, run
from lichen.core.store import ClientStore
from lichen.engines.federated import FederatedEngine, Patience
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.present.trace import Event, event_line, event_of
from lichen.server.sampling import Everyone, Uniform
from lichen.server.schedules import Buffered
from lichen.transforms.delta import snapshot_name
from support import compressed_run
from support.asking import all_of, hand
from support.counting_site import PAUSE, RECIPE, trained
from support.small_experiment import experiment
from support.transports import NAMES, Running, end, pipes, until

MADE = experiment(6)
ROUNDS = 6


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pipes(tmp_path_factory.mktemp("sites"), lambda: Path()) as made:
        until(lambda: set(made.sites.seen()) == set(NAMES))
        yield made


@pytest.fixture
def paused(sites: Running) -> Iterator[Path]:
    """The site of clients 1 and 4 begins no training while this file is there."""
    file = sites.folder / "east" / PAUSE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    yield file
    file.unlink(missing_ok=True)


def over(sites: Running, state: str, **how: Any) -> FederatedEngine:
    how = {"agreed": snapshot_name(MADE.start), "recipe": RECIPE, "state": state, **how}
    return FederatedEngine(sites.sites, lambda client: NAMES[client % 3], **how)


def lines(sites: Running, state: str) -> list[str]:
    """What was begun at all sites."""
    return [line for name in NAMES for line in trained(sites.folder / name / state)]


def go(algorithm: Any, there: Any, file: Path, *, see: Any = lambda report: None, rounds: int = ROUNDS) -> ServerState:
    start = partial(getattr, MADE, "start")
    return run(algorithm, there, start, rounds=rounds, seed=3, checkpoint=file, observers=[see])


def average(**more: Any) -> Any:
    return compressed_run.average(MADE, **{"rounds": ROUNDS, "sampler": Everyone(), **more})


def test_a_buffer_of_the_whole_round_has_the_bytes_of_synchronous_rounds(sites: Running, tmp_path: Path) -> None:
    reports: list[Report] = []
    go(average(), compressed_run.local(MADE, tmp_path / "own"), tmp_path / "one")
    with over(sites, "waits") as there:
        go(average(), there, tmp_path / "two")
    with over(sites, "whole") as there:
        whole = average(schedule=Buffered(arrivals=6, concurrency=6))
        go(whole, there, tmp_path / "three", see=reports.append)
    bytes_ = [(tmp_path / name).read_bytes() for name in ("one", "two", "three")]
    assert bytes_[0] == bytes_[1] == bytes_[2]
    for report in reports:
        assert sorted(report.attendance.order) == [(client, report.round - 1) for client in range(6)]


def test_a_step_waits_for_no_slow_site_and_the_trace_tells_who_came_when(
    sites: Running, paused: Path, tmp_path: Path
) -> None:
    reports: list[Report] = []

    def see(report: Report) -> None:
        reports.append(report)
        if report.round == 4:
            paused.unlink()
            until(lambda: sum(line.startswith("0 ") for line in trained(sites.folder / "east" / "slow")) == 2)

    with over(sites, "slow") as there:
        state = go(
            average(sampler=Uniform(5), schedule=Buffered(arrivals=2, concurrency=5)),
            there,
            tmp_path / "state",
            see=see,
            rounds=12,
        )
    assert state.round == 12
    came = [one for report in reports for one in report.attendance.order]
    assert all(client not in (1, 4) for report in reports[:4] for client, _ in report.attendance.order)
    versions = {version for client, version in came if client in (1, 4)}
    assert min(versions) <= 2  # what the slow site was asked first counts later
    assert any(report.metrics.get("age", 0) > 0 for report in reports)
    assert len(came) == len(set(came))
    for report in reports:
        event = Event(column="federated", report=report, total_rounds=12, grid="")
        assert event_of(event_line(event)).report.attendance.order == report.attendance.order
    assert Counter(lines(sites, "slow")).most_common(1)[0][1] == 1, lines(sites, "slow")


def test_a_server_that_is_killed_fetches_what_sites_finished_meanwhile(
    sites: Running, paused: Path, tmp_path: Path
) -> None:
    file = tmp_path / "state"
    algorithm = average(schedule=Buffered(arrivals=4, concurrency=6))

    def kill(report: Report) -> None:
        if report.round == 4:
            raise KeyboardInterrupt

    first = over(sites, "killed")
    with pytest.raises(KeyboardInterrupt):
        go(algorithm, first, file, see=kill)
    first.close()
    flying = load_state(file).in_flight
    assert [(flight.job.version, flight.waiting) for flight in flying] == [(0, (1, 4))]
    paused.unlink()
    saved = sites.folder / "east" / "killed" / ".answers" / "0"
    until(lambda: saved.exists() and any(saved.iterdir()))
    with over(sites, "killed") as second:
        seen: list[Report] = []
        go(algorithm, second, file, see=seen.append, rounds=8)
    assert {(1, 0), (4, 0)} <= {one for report in seen for one in report.attendance.order}
    # Round four is done again; what was trained for it comes from the disks, and nobody has trained twice.
    assert Counter(lines(sites, "killed")).most_common(1)[0][1] == 1


def test_answers_stay_at_a_site_while_a_job_of_their_age_is_in_flight(sites: Running) -> None:
    job = Job(work=compressed_run.WORK, shared=MADE.start, version=0, clients=(1,), seed=5)
    first, east = over(sites, "ages"), sites.folder / "east" / "ages"
    first.submit(job)
    for version in (5, 6, 7):
        number = first.submit(replace(job, version=version, clients=(4,)))
        assert [reply.error for reply in first.replies([number])] == [None]
    first.close()
    until(lambda: len(trained(east)) == 4)
    with over(sites, "ages") as second:
        (reply,) = second.replies([second.submit(job)])
        assert reply.message is not None
        assert trained(east) == ["0 1", "5 4", "6 4", "7 4"]
        # Once it has come, and two versions later, it is not needed any more.
        for version in (8, 9, 10):
            list(second.replies([second.submit(replace(job, version=version, clients=(4,)))]))
        until(lambda: not (east / ".answers" / "0").exists())


def test_a_site_that_is_killed_with_jobs_in_flight_is_handed_them_again(
    sites: Running, paused: Path, tmp_path: Path
) -> None:
    reports: list[Report] = []

    def see(report: Report) -> None:
        reports.append(report)
        if report.round == 3:
            until(lambda: bool(trained(sites.folder / "east" / "ended")))
            end(sites, "east")
            paused.unlink()
            sites.sites.start()

    with over(sites, "ended", patience=Patience(gone=60.0)) as there:
        go(
            average(schedule=Buffered(arrivals=4, concurrency=6)),
            there,
            tmp_path / "state",
            see=see,
        )
        last = over(sites, "ended")
        go(average(schedule=Buffered(arrivals=6, concurrency=6)), last, tmp_path / "state", see=see, rounds=8)
        last.close()
    order = [one for report in reports for one in report.attendance.order]
    assert {(1, 0), (4, 0)} <= set(order)
    assert len(order) == len(set(order))
    assert not [report for report in reports if report.attendance.refused]
    times = Counter(lines(sites, "ended"))
    assert times["0 1"] == 2  # begun, killed, begun again
    assert all(count == 1 for line, count in times.items() if line != "0 1")


def test_a_job_past_its_deadline_is_given_up_and_its_clients_are_asked_again(sites: Running, paused: Path) -> None:
    schedule = Buffered(arrivals=6, concurrency=6, deadline=1.5, max_age=3)
    job = Job(work=compressed_run.WORK, shared=MADE.start, version=0, clients=tuple(range(6)), seed=5)
    with over(sites, "late") as there:
        came = collect(there, [job], schedule=schedule, version=0)
        assert came.attendance.missing == (1, 4)
        assert came.in_flight == ()
        paused.unlink()
        came = collect(there, [replace(job, version=1)], schedule=replace(schedule, deadline=60.0), version=1)
        assert came.attendance.missing == ()
        assert sorted(came.attendance.order) == [(client, 1) for client in range(6)]


def test_a_worker_deletes_what_is_needed_no_more(tmp_path: Path) -> None:
    tasks = compressed_run.coded(MADE)
    worker = SiteWorker(lambda state: Talks(tasks, ClientStore(tmp_path), agreed=MADE.start))
    thread = worker.start()
    job = Job(work=compressed_run.WORK, shared=MADE.start, version=0, clients=(0,), seed=5)
    try:
        for number, (version, needed) in enumerate([(0, None), (4, 0), (9, 4), (10, None)], start=1):
            about: dict[str, Any] = {} if needed is None else {"needed": needed}
            hand(worker, number, (0,), b"J", pack_job(replace(job, version=version)), **about)
            all_of(worker)
            here = {0: ["0"], 4: ["0", "4"], 9: ["4", "9"], 10: ["10", "9"]}[version]
            until(lambda here=here: sorted(p.name for p in (tmp_path / ".answers").iterdir()) == here)
    finally:
        worker.close()
        thread.join(timeout=30)


def test_of_several_replies_each_goes_to_its_own_job(sites: Running, paused: Path) -> None:
    job = Job(work=compressed_run.WORK, shared=MADE.start, version=0, clients=(1, 0), seed=5)
    with over(sites, "each") as there:
        old = there.submit(job)
        new = there.submit(replace(job, version=1, clients=(4, 3)))
        first: list[Reply] = []
        for reply in there.replies((old, new)):
            first.append(reply)
            if len(first) == 2:
                paused.unlink()
        assert {(reply.job, reply.clients[0]) for reply in first} == {(old, 1), (old, 0), (new, 4), (new, 3)}
        assert {reply.clients[0] for reply in first[:2]} == {0, 3}
        for reply in first:
            assert reply.message is not None
            assert int(reply.message.version_C[0]) == (reply.job == new)
