"""Several ranks are one: equal bytes for any number of them, one error for all, and nobody waits for the dead."""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.algorithms.alone import Alone
from lichen.algorithms.average import Average
from lichen.core.collecting.collect import drain
from lichen.core.contracts.algorithm import Report
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.engines.distributed import DistributedEngine, balanced_ranks
from lichen.engines.local import LocalEngine
from lichen.engines.ranks import Ranks, ranks_here
from lichen.recipes.assemble.parts import client_tasks
from lichen.server.mean import Mean
from lichen.server.optimize import ServerAdam
from lichen.server.sampling import Uniform
from support.forked_ranks import on_ranks, runs_on
from support.small_experiment import experiment

CLIENTS = 7


def engine(ranks: Ranks, folder: Path, clients: int = CLIENTS, **more: Any) -> DistributedEngine:
    return DistributedEngine(
        LocalEngine(client_tasks(experiment(clients, **more)), ClientStore(folder), block_size=3), ranks
    )


# --- spreading -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), max_size=7), st.integers(1, 3))
def test_the_busiest_rank_is_within_grahams_bound_of_the_best_possible(costs: list[int], ranks: int) -> None:
    def busiest(dealt: Any) -> int:
        return max(sum(cost for cost, rank in zip(costs, dealt, strict=True) if rank == r) for r in range(ranks))

    dealt = balanced_ranks(costs, ranks)
    assert len(dealt) == len(costs)
    best = min(busiest(way) for way in itertools.product(range(ranks), repeat=len(costs)))
    assert busiest(dealt) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.parametrize("work", ["train lr=0.1", "valid"])
def test_the_ranks_shares_part_the_job(tmp_path: Path, size: int, work: str) -> None:
    job = Job(work=work, shared=experiment(CLIENTS).start, version=0, clients=(6, 1, 4, 0, 5), seed=0)
    shares = [engine(Ranks(rank, size), tmp_path).share(job) for rank in range(size)]
    assert sorted(c for share in shares for c in share) == [0, 1, 4, 5, 6]
    for share in shares:
        assert list(share) == [c for c in job.clients if c in share]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- one result ----------------------------------------------------------------------------------------------------


def federated_and_alone(ranks: Ranks, folder: Path) -> list[Any]:
    made, seen = experiment(CLIENTS), list[Report]()
    average = Average(
        aggregator=Mean(),
        optimizer=ServerAdam(),
        sampler=Uniform(5),
        weight_N=made.server.roster.rows_N("train"),
        rounds=3,
        work="train lr=0.1",
    )
    alone = Alone(clients=CLIENTS, rounds=2, work="alone lr=0.1", valid="alone.valid")
    counted = []
    for algorithm, name, rounds in ((average, "average", 3), (alone, "alone", 2)):
        there = engine(ranks, folder / name / "clients")
        file = folder / name / "server.safetensors"
        ranks.wait()
        run(
            algorithm,
            there,
            lambda: made.start,
            rounds=rounds,
            seed=1,
            checkpoint=file,
            once=ranks.ask_first,
            observers=[seen.append],
        )
        counted.append([there.bytes_up, there.bytes_down])
    told = [[r.round, r.clients, dict(r.metrics), r.tokens, r.bytes_up, r.bytes_down] for r in seen]
    return [told, counted]


def test_any_number_of_ranks_gives_the_same_bytes(tmp_path: Path) -> None:
    results, told = {}, {}
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        ended = on_ranks(size, lambda ranks, folder=folder: federated_and_alone(ranks, folder))  # type: ignore[misc]
        assert all(one == ended[0] for one in ended)
        told[size] = ended[0]["value"]
        results[size] = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}
    assert told[1] == told[2] == told[4]
    assert results[1] == results[2] == results[4]
    assert len(results[1]) == 2 + CLIENTS * 3  # two servers, and what each client keeps alone
    reports, counted = told[1]
    assert [up for *_, up, _ in reports][:3] != [0, 0, 0]
    # Messages of the three rounds and of their validations; alone, nothing is reported though it is counted.
    assert counted[0] == [sum(r[4] for r in reports), sum(r[5] for r in reports)]


def test_one_rank_is_the_local_engine(tmp_path: Path) -> None:
    made = experiment(CLIENTS)
    job = Job(work="valid", shared=made.start, version=0, clients=tuple(range(CLIENTS)), seed=0)
    there, local = engine(Ranks(), tmp_path), LocalEngine(client_tasks(made), ClientStore(tmp_path), block_size=3)
    for a, b in zip(drain(there, job), drain(local, job), strict=True):
        assert a.client_C.tolist() == b.client_C.tolist()
        assert all(torch.equal(a.metrics[name], b.metrics[name]) for name in b.metrics)


def test_a_job_with_fewer_clients_than_ranks_and_one_for_nobody(tmp_path: Path) -> None:
    def program(ranks: Ranks) -> Any:
        there = engine(ranks, tmp_path)
        job = Job(work="valid", shared=experiment(CLIENTS).start, version=0, clients=(3,), seed=0)
        out = []
        for clients in ((3,), ()):
            told = [(m.client_C, dict(m.metrics)) for m in drain(there, replace(job, clients=clients))]
            client_N, metrics, _ = there.join(*(told[0] if told else (torch.empty(0, dtype=torch.int64), {})))
            out.append([len(told), client_N.tolist(), sorted(metrics)])
        return [*out, there.bytes_up > 0, there.bytes_down > 0]

    ended = [one["value"] for one in on_ranks(3, program)]
    assert sum(one[0][0] for one in ended) == 1
    assert all(one[0][1] == [3] and "loss_sum" in one[0][2] for one in ended)
    assert all(one[1] == [0, [], []] for one in ended)
    assert all(one[2:] == [True, True] for one in ended)


def test_bytes_cross_as_they_are() -> None:
    def program(ranks: Ranks) -> Any:
        mine = bytes(range(256)) * ranks.rank
        everybody = ranks.exchange(mine)
        asked = ranks.ask_first(lambda: {"rank": ranks.rank, "text": "ä\n", "nothing": None})
        with ranks.ahead():
            pass
        return [[len(data) for data in everybody], everybody[2] == bytes(range(256)) * 2, asked]

    for one in on_ranks(3, program):
        assert one["value"] == [[0, 256, 512], True, {"rank": 0, "text": "ä\n", "nothing": None}]


# --- one error -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "amid", "end"])
@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("kind", [LichenError, ValueError, KeyboardInterrupt])
def test_an_error_of_one_rank_ends_all_of_them(
    tmp_path: Path, place: str, culprit: int, kind: type[BaseException]
) -> None:
    def program(ranks: Ranks) -> Any:
        def maybe(now: str) -> None:
            if ranks.rank == culprit and place == now:
                raise LichenError("is broken", where="here", fix="mend it") if kind is LichenError else kind("broken")

        maybe("before")
        there, total = engine(ranks, tmp_path), Mean().zero()
        job = Job(work="train lr=0.1", shared=experiment().start, version=0, clients=tuple(range(CLIENTS)), seed=0)
        for message in drain(there, job):
            total = Mean().add(total, message)
            maybe("amid")
        there.merge(Mean(), total)
        maybe("end")
        return "well"

    ended = on_ranks(3, program)
    if kind is LichenError:
        assert [one.get("error") for one in ended] == ["here: is broken\n  fix: mend it"] * 3
    elif kind is KeyboardInterrupt:
        assert [one.get("fault") for one in ended] == ["KeyboardInterrupt"] * 3
    else:
        others = [one for rank, one in enumerate(ended) if rank != culprit]
        assert ended[culprit]["fault"] == "ValueError"
        assert [one["fault"] for one in others] == ["RankError"] * 2
        assert all(f"ValueError: broken (in rank {culprit})" in one["trace"] for one in others)
        assert all('maybe("' in one["trace"] for one in others)  # the culprit's own traceback


def test_what_every_rank_refuses_is_one_error(tmp_path: Path) -> None:
    def program(ranks: Ranks) -> Any:
        return list(
            drain(engine(ranks, tmp_path), Job(work="dance", shared=Shared(), version=0, clients=(0, 1), seed=0))
        )

    ended = on_ranks(2, program)
    assert ended[0] == ended[1]
    assert "unknown work 'dance'" in ended[0]["error"]


def test_a_rank_that_dies_is_missed_at_once() -> None:
    def program(ranks: Ranks) -> Any:
        ranks.wait()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.wait()

    ended = on_ranks(3, program)
    assert ended[1] == {}
    for rank in (0, 2):
        assert f"rank {rank} lost the others" in ended[rank]["error"]


def test_ranks_at_different_places_say_so_instead_of_mixing_up_bytes() -> None:
    ended = on_ranks(2, lambda ranks: ranks.exchange(b"x") if ranks.first else ranks.wait())
    assert all("not at the same place" in one["error"] for one in ended)


def test_ctrl_c_in_a_meeting_waits_until_it_is_whole() -> None:
    def program(ranks: Ranks) -> Any:
        for count in range(200):
            if ranks.rank == 1 and count == 100:
                # Comes amid one of the calls of this meeting or the next.
                signal.setitimer(signal.ITIMER_REAL, 0.002)
            ranks.exchange(bytes(1000))
        return "well"

    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def connected() -> Any:
        from lichen.engines.ranks import connect

        signal.signal(signal.SIGALRM, interrupted)
        with connect() as ranks:
            return program(ranks)

    assert [one.get("fault") for one in runs_on(2, connected)] == ["KeyboardInterrupt"] * 2


@pytest.mark.parametrize(("rank", "size"), [("3", "2"), ("-1", "2"), ("x", "2")])
def test_an_environment_that_names_no_rank_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(LichenError, match="name no rank"):
        ranks_here()
