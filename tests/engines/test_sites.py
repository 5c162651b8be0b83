"""What every transport to sites must do, and the engine over it: the same tests for each of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from lichen.core.collecting.collect import drain
from lichen.core.errors import LichenError
from lichen.core.files.answers import SavedAnswers
from lichen.core.message import Job, Message, concatenate_messages, pack_job, pack_message, take_client
from lichen.core.replies import Reply
from lichen.core.store import ClientStore
from lichen.engines import pipe_sites
from lichen.engines.federated import FederatedEngine, Patience
from lichen.engines.remote import worker as worker_module
from lichen.engines.remote.pieces import PIECE, Pieces, ask_long
from lichen.engines.remote.requests import CANCEL, FETCH, HAND, pack_values, unpack_outcomes, unpack_values
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.engines.sites import SiteError
from lichen.transforms.delta import snapshot_name
from support import compressed_run
from support.asking import ABOUT, all_of, fetch, frames, hand, order
from support.counting_site import RECIPE, trained
from support.small_experiment import experiment
from support.transports import KITS, NAMES, TRANSPORTS, Running, end, healthy, until

MADE = experiment(6)
CLIENTS = (0, 1, 2, 3, 4, 5)
JOB = Job(work=compressed_run.WORK, shared=MADE.start, version=0, clients=CLIENTS, seed=5)


def site_of(client: int) -> str:
    return NAMES[client % 3]


@pytest.fixture(scope="module", params=TRANSPORTS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    federation = partial(request.getfixturevalue, KITS[request.param])
    with TRANSPORTS[request.param](tmp_path_factory.mktemp("sites"), federation) as made:
        until(lambda: set(made.sites.seen()) == set(NAMES))
        yield made


@pytest.fixture(autouse=True)
def _mended(request: pytest.FixtureRequest) -> None:
    if "running" in request.fixturenames:
        healthy(request.getfixturevalue("running"))


@pytest.fixture
def state(request: pytest.FixtureRequest) -> str:
    """A private state of this test alone: sites that other tests have used know nothing of it."""
    return f"{zlib.crc32(request.node.name.encode())}"


def stop(pid: int) -> None:
    """Stop a process, and wait until it stands."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + 10.0
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < end
        time.sleep(0.005)


def failure(running: Running, site: str, kind: str, body: bytes = b"", within: float = 30.0) -> SiteError:
    with pytest.raises(SiteError) as caught:
        running.sites.ask(site, kind, body, within)
    assert caught.value.site == site
    return caught.value


# --- a transport -------------------------------------------------------------------------------------------------


def test_questions_of_any_length_come_back(running: Running) -> None:
    sites, bodies = running.sites, [b"", b"x", os.urandom(1 << 16), os.urandom(PIECE)]
    for body in bodies:
        assert sites.ask("north", "echo", body, 60) == body
    for length in (0, 1, PIECE - 49, PIECE - 48, PIECE, 40 << 20):
        body = os.urandom(length)
        assert ask_long(sites, "east", "long", body, 60) == body
    seen = sites.seen()["north"]
    assert seen.since <= seen.last <= time.time()
    assert all(seen.versions.values())


def test_threads_ask_pair_of_and_each_has_its_own_answer(running: Running) -> None:
    bodies = [(NAMES[n % 3], n.to_bytes(2, "little") * (1 + 997 * n)) for n in range(60)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda one: running.sites.ask(one[0], "echo", one[1], 60), bodies))
    assert answers == [body for _, body in bodies]


def test_each_failure_has_its_cause(running: Running) -> None:
    declined, fault = failure(running, "north", "decline"), failure(running, "north", "fault")
    assert (declined.cause, declined.error.what, declined.error.fix) == ("refused", "not today", "come tomorrow")
    assert fault.cause == "failed"
    assert "row" not in str(fault.error)  # a fault's own words may cite one
    assert failure(running, "nowhere", "echo").cause == "gone"
    stop(running.pid("east"))
    start = time.monotonic()
    assert failure(running, "east", "echo", b"late", within=0.3).cause == "silent"
    assert time.monotonic() - start < 10
    assert running.sites.ask("south", "echo", b"beside", 30) == b"beside"
    os.kill(running.pid("east"), signal.SIGCONT)
    assert running.sites.ask("east", "echo", b"again", 30) == b"again"
    end(running, "south")
    assert failure(running, "south", "echo").cause == "gone"
    assert running.sites.ask("north", "echo", b"still", 30) == b"still"


def test_who_waits_for_a_site_that_dies_is_told(running: Running) -> None:
    stop(running.pid("north"))
    caught = list[SiteError]()
    thread = threading.Thread(target=lambda: caught.append(failure(running, "north", "echo", within=60)))
    thread.start()
    time.sleep(0.1)
    os.kill(running.pid("north"), signal.SIGKILL)
    thread.join(timeout=30)
    assert [one.cause for one in caught] == ["gone"]


def test_a_child_that_reads_nothing_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_sites, "_PATIENCE", 0.5)
    sites = pipe_sites.PipeSites({"deaf": [sys.executable, "-S", "-c", "import time; time.sleep(600)"]})
    sites.start()
    process = sites.children["deaf"].process
    with pytest.raises(SiteError) as caught:
        sites.ask("deaf", "echo", bytes(PIECE), 0.2)
    assert caught.value.cause == "silent"
    process.send_signal(signal.SIGSTOP)
    sites.close()
    assert process.poll() is not None


def test_a_site_that_comes_back_is_another_instance(running: Running) -> None:
    before = {name: seen.instance for name, seen in running.sites.seen().items()}
    assert len(set(before.values())) == 3
    end(running, "north")
    running.restart("north")
    assert running.sites.ask("north", "echo", b"x", 60) == b"x"
    after = {name: seen.instance for name, seen in running.sites.seen().items()}
    assert after["north"] not in before.values()
    assert all(after[name] == before[name] for name in NAMES[1:])


def test_a_transport_that_is_closed_hears_nobody_until_it_is_opened_again(running: Running) -> None:
    pids = [running.pid(name) for name in NAMES]
    running.sites.ask("north", "echo", b"", 60)
    running.sites.close()
    for pid in pids if running.children else ():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert failure(running, "north", "echo").cause == "gone"
    assert running.sites.seen() == {}
    running.reopen()
    assert [running.sites.ask(name, "echo", b"again", 60) for name in NAMES] == [b"again"] * 3
    assert running.children or [running.pid(name) for name in NAMES] == pids


def ask_site(running: Running, site: str, kind: str, state: str, **values: object) -> bytes:
    body = pack_values({**ABOUT, "recipe": RECIPE, "state": state, "session": state, **values})
    return ask_long(running.sites, site, kind, body, 60)


def test_an_order_that_is_handed_over_twice_is_done_once_and_its_outcome_stays_until_it_is_acknowledged(
    running: Running, state: str
) -> None:
    body = order(7, (0, 3), b"J", pack_job(replace(JOB, clients=(0, 3))), session=state, state=state)
    for _ in range(3):
        assert unpack_values(ask_long(running.sites, "north", HAND, body, 60))[0]["ok"]
    until(lambda: len(unpack_outcomes(ask_site(running, "north", FETCH, state, after=0, wait=5)).outcomes) == 2)
    first, second = (
        unpack_outcomes(ask_site(running, "north", FETCH, state, after=0, wait=0)).outcomes for _ in range(2)
    )
    assert first == second
    assert [(one.place, one.order, one.client) for one in first] == [(1, 7, 0), (2, 7, 3)]
    assert [kind for kind, _ in frames(first[0].frames)] == [b"M", b"."]
    assert unpack_outcomes(ask_site(running, "north", FETCH, state, after=1, wait=0)).outcomes == first[1:]
    assert unpack_outcomes(ask_site(running, "north", FETCH, state, after=0, wait=0)).outcomes == first[1:]
    assert log(running, "north", state) == ["0 0", "0 3"]


def test_a_busy_site_says_at_once_what_it_does_and_a_job_can_be_given_up(running: Running, state: str) -> None:
    job = replace(JOB, clients=(0, 3), settings={"slow": 3.0})
    ask_long(running.sites, "north", HAND, order(4, (0, 3), b"J", pack_job(job), session=state, state=state), 60)
    until(lambda: log(running, "north", state))
    start = time.monotonic()
    fetched = unpack_outcomes(ask_site(running, "north", FETCH, state, after=0, wait=0))
    assert time.monotonic() - start < 2.5
    assert (fetched.outcomes, fetched.busy, str(fetched.work)) == ((), True, "is at work on job 4, client 1 of 2")
    ask_long(
        running.sites,
        "north",
        HAND,
        order(5, (0,), b"J", pack_job(replace(job, clients=(0,))), session=state, state=state),
        60,
    )
    assert unpack_outcomes(ask_site(running, "north", FETCH, state, after=0, wait=0)).work.waiting == 1
    for number in (5, 4):
        ask_site(running, "north", CANCEL, state, order=number)
    until(lambda: unpack_outcomes(ask_site(running, "north", FETCH, state, after=0, wait=0)).work.order < 0)
    assert log(running, "north", state) == ["0 0"]


# --- the engine --------------------------------------------------------------------------------------------------

NO_THIRD = pytest.mark.parametrize("running", ["pipes", "network"], indirect=True)
"""Sites are started again and again, which takes seconds; one kind of network is enough for what engines do then."""


def engine(running: Running, **how: object) -> FederatedEngine:
    how = {"agreed": snapshot_name(MADE.start), "recipe": RECIPE, **how}
    return FederatedEngine(running.sites, site_of, **how)  # type: ignore[arg-type]


def by_client(messages: Sequence[Message]) -> dict[int, bytes]:
    return {int(m.client_C[c]): pack_message(take_client(m, c)) for m in messages for c in range(len(m.client_C))}


def log(running: Running, site: str, state: str) -> list[str]:
    """What a site has trained at a state."""
    return trained(running.folder / site / state)


def here(folder: Path, job: Job = JOB) -> dict[int, bytes]:
    """What the engine of this process makes of the job."""
    local = compressed_run.local(MADE, folder)
    return by_client(list(drain(local, job)))


def replies(made: FederatedEngine, job: Job = JOB) -> list[Reply]:
    return list(made.replies([made.submit(job)], made.now() + 60))


def private(folder: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def test_rounds_at_two_rates_leave_the_files_of_the_local_engine(running: Running, tmp_path: Path) -> None:
    for state, work in (("lr=0.1", compressed_run.WORK), ("lr=0.3", compressed_run.WORK)):
        rounds = [replace(JOB, work=work, version=v, seed=v + (state == "lr=0.3")) for v in range(2)]
        local = compressed_run.local(MADE, tmp_path / "here" / state)
        with engine(running, state=state) as there:
            for job in rounds:
                assert by_client(list(drain(there, job))) == by_client(list(drain(local, job)))
            assert (there.bytes_up, there.bytes_down) == (local.bytes_up, local.bytes_down)
        for place, name in enumerate(NAMES):
            own = private(running.folder / name / state)
            assert own.keys() == {str(c) for c in CLIENTS if c % 3 == place}
            assert own.items() <= private(tmp_path / "here" / state).items()
    assert private(tmp_path / "here" / "lr=0.1") != private(tmp_path / "here" / "lr=0.3")


@NO_THIRD
def test_a_site_that_dies_costs_its_own_clients_the_round(running: Running, state: str, tmp_path: Path) -> None:
    with engine(running, state=state, patience=Patience(gone=0.2)) as made:
        number = made.submit(replace(JOB, settings={"slow": 1.0}))
        until(lambda: log(running, "east", state))
        end(running, "east")
        came = {reply.clients[0]: reply for reply in made.replies([number], made.now() + 60)}
        assert came.keys() == set(CLIENTS)
        assert {client for client, reply in came.items() if reply.error is not None} == {1, 4}
        running.restart("east")
        assert by_client([r.message for r in replies(made) if r.message]) == here(tmp_path / "own")


@NO_THIRD
def test_a_site_that_comes_back_is_handed_over_what_it_had_not_done(
    running: Running, state: str, tmp_path: Path
) -> None:
    job = replace(JOB, clients=(1, 4), settings={"slow": 0.5})
    with engine(running, state=state) as made:
        number = made.submit(job)
        until(lambda: len(log(running, "east", state)) == 2)  # one is done, the other at work
        end(running, "east")
        before = made.bytes_down
        running.restart("east")
        came = [reply.message for reply in made.replies([number], made.now() + 60) if reply.message]
        assert by_client(came) == here(tmp_path / "own", job)
        assert log(running, "east", state) == ["0 1", "0 4", "0 4"]
        assert made.bytes_down > before


@NO_THIRD
def test_a_server_that_goes_on_is_answered_from_the_sites_disks(running: Running, state: str, tmp_path: Path) -> None:
    first = engine(running, state=state)
    number = first.submit(JOB)
    next(first.replies([number]))
    until(lambda: all(len(log(running, name, state)) == 2 for name in NAMES))
    until(lambda: all(len(list((running.folder / name / state).glob(".answers/0/*"))) == 2 for name in NAMES))
    first.close()  # as a kill: what came is lost
    end(running, "south")
    running.restart("south")
    with engine(running, state=state) as second:
        came = [reply.message for reply in replies(second) if reply.message]
        assert by_client(came) == here(tmp_path / "own")
        assert [len(log(running, name, state)) for name in NAMES] == [2, 2, 2]
        later = [replace(JOB, version=version, seed=9) for version in (1, 2)]
        for job in later:
            assert len(replies(second, job)) == 6
        saved = [running.folder / name / state / ".answers" for name in NAMES]
        until(lambda: all(sorted(os.listdir(folder)) == ["1", "2"] for folder in saved))


def test_a_job_with_another_seed_or_without_its_private_state_is_trained_again(running: Running, state: str) -> None:
    with engine(running, state=state) as made:
        for job, times in ((JOB, 2), (JOB, 2), (replace(JOB, seed=6), 4), (replace(JOB, seed=6), 4), (JOB, 6)):
            assert all(reply.message for reply in replies(made, job))
            assert len(log(running, "north", state)) == times  # the private state is that of another seed
        ClientStore(running.folder / "north" / state).forget(3)
        assert all(reply.message for reply in replies(made))
        assert len(log(running, "north", state)) == 7


@NO_THIRD
def test_views_go_down_coded_and_whole_to_a_site_that_came_back(running: Running, state: str, tmp_path: Path) -> None:
    algorithm = compressed_run.average(
        MADE,
        weight_N=MADE.server.roster.rows_N("train"),
        sampler=compressed_run.Uniform(6),
        valid=None,
    )
    local = compressed_run.local(MADE, tmp_path / "here")
    ours, theirs = algorithm.init(MADE.start), algorithm.init(MADE.start)
    with engine(running, state=state, agreed="") as made:
        down = []
        for r in range(4):
            if r == 2:
                end(running, "north")
                running.restart("north")
            theirs, report = algorithm.round(theirs, made, r)
            ours, same = algorithm.round(ours, local, r)
            down.append(report.bytes_down - same.bytes_down)
    assert (down[0], down[1], down[3]) == (0, 0, 0)
    assert down[2] > 0
    assert all(torch.equal(x, theirs.shared.trainable[name]) for name, x in ours.shared.trainable.items())


def test_another_recipe_is_refused_by_both_digests(running: Running, state: str) -> None:
    with engine(running, state=state, recipe="7" * 64) as made:
        came = replies(made)
        assert sorted(reply.clients[0] for reply in came) == list(CLIENTS)
        assert all(RECIPE in str(reply.error) and "7" * 64 in str(reply.error) for reply in came)


def test_a_newer_engine_takes_the_place_of_an_older_one(running: Running, state: str) -> None:
    with (
        engine(running, state=state) as old,
        engine(running, state=state) as new,
        engine(running, state=f"{state}-2") as beside,
    ):
        assert all(reply.message for reply in replies(old))
        assert all(reply.message for reply in replies(new, replace(JOB, seed=1)))
        assert all(reply.message for reply in replies(beside, replace(JOB, seed=1)))
        came = replies(old, replace(JOB, seed=2))
        assert all("another server has taken this one's place" in str(reply.error) for reply in came)
        assert all(reply.message for reply in replies(new, replace(JOB, seed=3)))


def test_a_cancelled_job_is_silent_and_what_no_site_has_begun_is_not_done(running: Running, state: str) -> None:
    with engine(running, state=state) as made:
        slow = made.submit(replace(JOB, clients=(0, 3), settings={"slow": 1.0}))
        until(lambda: log(running, "north", state))
        queued = made.submit(replace(JOB, clients=(0,), version=1))
        made.cancel(queued)
        made.cancel(slow)
        assert list(made.replies([slow, queued], made.now() + 60)) == []
        assert [reply.clients for reply in replies(made, replace(JOB, clients=(3,), version=2))] == [(3,)]
        assert log(running, "north", state) == ["0 0", "2 3"]


# --- the pieces by themselves ------------------------------------------------------------------------------------


class Wire:
    """Sites in this process, whose answers are lost as a list says."""

    def __init__(self, pieces: Pieces, lost: Sequence[int]) -> None:
        self.pieces, self.lost, self.count = pieces, set(lost), 0

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        assert len(body) <= PIECE
        answer = self.pieces.answer(kind, body)
        assert len(answer) <= PIECE
        self.count += 1
        if self.count in self.lost:
            raise SiteError(site, "silent", LichenError("lost"))
        return answer


@pytest.mark.parametrize("lost", [(), (1,), (2,), (3,), (4,), (5,), (1, 3, 5, 7, 9)])
def test_a_lost_answer_costs_a_piece_and_never_the_bytes(lost: tuple[int, ...]) -> None:
    counted = list[int]()
    pieces = Pieces(lambda kind, body: counted.append(len(body)) or body[::-1])  # type: ignore[func-returns-value]
    body, wire = os.urandom((2 * PIECE) + 5), Wire(pieces, lost)
    for _ in lost:
        with suppress(SiteError):
            ask_long(wire, "a", "long", body, 1)  # type: ignore[arg-type]
    assert ask_long(wire, "a", "long", body, 1) == body[::-1]  # type: ignore[arg-type]
    assert set(counted) == {len(body)}


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_long_body_is_held_once_where_it_arrives(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.engines.remote.pieces._DATA", 1 << 16)
    body = os.urandom(8 << 20)
    question, answer = (body, b"") if way == "up" else (b"", body)
    wire = Wire(Pieces(lambda kind, body: answer), ())
    tracemalloc.start()
    assert ask_long(wire, "a", "long", question, 1) == answer  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert wire.count > 100
    assert len(body) < peak < 1.4 * len(body)  # it grows by an eighth


def test_pieces_that_are_spoilt_or_lost_are_refused_or_sent_again() -> None:
    pieces = Pieces(lambda kind, body: body)
    head = bytes(32) + (4).to_bytes(8, "little") + bytes(8)
    assert pieces.answer("put", head + b"four") == (4).to_bytes(8, "little")
    with pytest.raises(LichenError, match="another digest"):
        pieces.answer("long", b"l" + bytes(32) + (4).to_bytes(8, "little"))
    assert pieces.answer("long", b"l" + bytes(32) + (4).to_bytes(8, "little")) == b"m"
    with pytest.raises(LichenError, match="at most"):
        pieces.answer("put", bytes(32) + b"\xff" * 16)


def test_a_worker_hands_out_nothing_of_a_session_that_is_over(tmp_path: Path) -> None:
    talks = Talks(compressed_run.coded(MADE), ClientStore(tmp_path))
    worker = SiteWorker(lambda state: talks, instance="first")
    job = pack_job(replace(JOB, clients=(0,)))
    assert hand(worker, 1, (0,), b"J", job) == {"instance": "first", "ok": True}
    assert hand(worker, 2, (0,), b"J", job, instance="another") == {"instance": "first", "ok": False}
    assert hand(worker, 1, (0,), b"J", job, session="two")["ok"]
    thread = worker.start()
    assert [number for number, *_ in all_of(worker, session="two")] == [1]
    for call in (lambda: fetch(worker), lambda: hand(worker, 3, (0,), b"J", job)):
        with pytest.raises(LichenError, match="another server"):
            call()
    with pytest.raises(LichenError, match="no name of a private state"):
        fetch(worker, state="../lr")
    worker.close()
    thread.join()
    assert talks.trained == 1


def test_a_hand_is_answered_with_what_has_come_and_places_of_another_instance_do_not_count(tmp_path: Path) -> None:
    talks = Talks(compressed_run.coded(MADE), ClientStore(tmp_path))
    worker = SiteWorker(lambda rate: talks, instance="second")
    thread = worker.start()

    def handed(number: int, **values: object) -> list[tuple[int, int]]:
        body = order(number, (0,), b"J", pack_job(replace(JOB, clients=(0,))), **values)  # type: ignore[arg-type]
        came = unpack_outcomes(worker.answer(HAND, body))
        return [(one.place, one.order) for one in came.outcomes]

    assert handed(1, after=7, of="first", wait=20.0) == [(1, 1)]
    assert handed(1, after=7, of="first", wait=20.0) == [(1, 1)]
    assert handed(2, after=1, of="second", wait=20.0) == [(2, 2)]
    worker.close()
    thread.join()


def test_a_saved_answer_is_whole_or_none(tmp_path: Path) -> None:
    saved = SavedAnswers(tmp_path)
    for version in range(4):
        saved.save(version, 3, "ab" * 32, b"answer", "state")
    assert saved.load(3, 3, "ab" * 32, "state") == saved.load(3, 3, "ab" * 32) == b"answer"
    assert saved.load(3, 3, "ab" * 32, "") is saved.load(3, 4, "ab" * 32, "state") is None
    (path,) = (tmp_path / ".answers" / "3").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert saved.load(3, 3, "ab" * 32) is None
    saved.acknowledge(3)
    assert sorted(os.listdir(tmp_path / ".answers")) == ["2", "3"]
    ClientStore(tmp_path).forget(3)
    assert not list((tmp_path / ".answers").glob("*/*"))


def test_clients_of_one_job_stack_as_one_message(running: Running, tmp_path: Path) -> None:
    job = replace(JOB, work="valid")
    with engine(running) as made:
        whole = concatenate_messages(list(drain(made, job)))
    assert by_client([whole]) == here(tmp_path / "own", job)


def test_a_server_cannot_fill_a_site_with_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_MOST_STATES", 2)
    made = list[str]()

    def talks(state: str) -> Talks:
        made.append(state)
        return Talks(compressed_run.coded(MADE), ClientStore(tmp_path / state))

    worker = SiteWorker(talks, instance="first")
    thread = worker.start()
    job = pack_job(replace(JOB, clients=(0,)))
    for state in ("a", "b", "a", "c"):
        hand(worker, 1, (0,), b"J", job, state=state, session=state)
        all_of(worker, state=state, session=state)
    worker.close()
    thread.join()
    assert made == ["a", "b"]
