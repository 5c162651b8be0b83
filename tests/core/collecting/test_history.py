"""What is retained of rounds gives their bytes again, whole or without a client; a forgotten client is in no file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lichen.algorithms.average import Average
from lichen.core import tree as trees
from lichen.core.collecting.history import History
from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, pack_message, take_client
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.engines.distributed import DistributedEngine
from lichen.engines.ranks import Ranks
from lichen.recipes.assemble.experiment import Experiment
from lichen.server.mean import Mean
from lichen.server.optimize import ServerAdam
from lichen.server.schedules import Synchronous
from support.forked_ranks import on_ranks
from support.small_experiment import engine, experiment

ROUNDS, CLIENTS = 3, 4


@dataclass(frozen=True)
class These:
    """The same clients in every round."""

    clients: tuple[int, ...]

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        return self.clients


def average(made: Experiment, history: History | None, clients: Iterable[int] = range(CLIENTS), **more: Any) -> Average:
    return Average(
        aggregator=Mean(),
        optimizer=ServerAdam(),
        sampler=These(tuple(clients)),
        weight_N=torch.ones(CLIENTS),
        rounds=ROUNDS,
        work="train lr=0.1",
        history=history,
        **more,
    )


def total_of(messages: Iterable[Message]) -> Any:
    mean = Mean()
    total = mean.zero()
    for message in messages:
        total = mean.add(total, message)
    return total


def replay(start: Shared, history: History, clients: Iterable[int] | None = None) -> Shared:
    shared, optimizer = start, ServerAdam().init(start)
    for round_ in history.rounds():
        some = None if clients is None else set(clients)
        total = total_of(message for message, _ in history.messages(some, [round_]))
        change, _ = Mean().close(total, shared)
        shared, optimizer = ServerAdam().update(change, optimizer, shared)
    return shared


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def trained(made: Experiment, folder: Path, history: History | None, **more: Any) -> ServerState:
    there = engine(made, folder / "state")
    return run(average(made, history, **more), there, lambda: made.start, rounds=ROUNDS, seed=5)


def test_replayed_rounds_have_their_bytes_and_nothing_is_private_to_them(tmp_path: Path) -> None:
    made, history = experiment(CLIENTS), History(tmp_path / "history")
    state = trained(made, tmp_path, history)
    assert trees.digest(replay(made.start, history).flat()) == trees.digest(state.shared.flat())
    plain = trained(made, tmp_path / "plain", None)
    assert trees.digest(plain.shared.flat()) == trees.digest(state.shared.flat())
    assert history.rounds() == [0, 1, 2]
    got = [(job.version, int(message.client_C[0]), job.clients) for message, job in history.messages([3, 1], [2, 0])]
    assert got == [(0, 1, (1,)), (0, 3, (3,)), (2, 1, (1,)), (2, 3, (3,))]
    assert all(job.work == "train lr=0.1" and not job.shared for _, job in history.messages())
    assert history.nbytes() == sum(map(len, contents(tmp_path / "history").values())) > 0
    for path in (tmp_path / "history", *(tmp_path / "history").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_total_without_a_client_is_that_of_a_round_without_it(tmp_path: Path) -> None:
    made, history, other = experiment(CLIENTS), History(tmp_path / "all"), History(tmp_path / "three")
    trained(made, tmp_path / "a", history)
    trained(made, tmp_path / "b", other, clients=(0, 1, 3))
    some = [message for message, _ in history.messages([0, 1, 3], [0])]
    assert [pack_message(m) for m in some] == [pack_message(m) for m, _ in other.messages(rounds=[0])]
    first = Mean().close(total_of(some), made.start)
    second = Mean().close(total_of(m for m, _ in other.messages(rounds=[0])), made.start)
    assert trees.digest(first[0].flat()) == trees.digest(second[0].flat())


def test_forgetting_leaves_no_byte_of_a_client(tmp_path: Path) -> None:
    made, history = experiment(CLIENTS), History(tmp_path / "history")
    trained(made, tmp_path, history)
    gone = [message for message, _ in history.messages([2])]
    assert len(gone) == ROUNDS
    (tmp_path / "history" / "1" / "0" / ".2.safetensors.77.part").write_bytes(b"half of it")
    history.forget(2)
    history.forget(2)
    left = contents(tmp_path / "history")
    assert len(left) == ROUNDS * (CLIENTS - 1)
    for message in gone:
        for x_C in message.tensors.values():
            assert not any(x_C.numpy().tobytes() in data for data in left.values())
    assert not any(Path(name).name.lstrip(".").startswith("2") for name in left)
    assert all(job.clients == tuple(message.client_C.tolist()) != (2,) for message, job in history.messages())
    for client in (0, 1, 3):
        history.forget(client)
    assert (history.rounds(), history.nbytes(), list((tmp_path / "history").iterdir())) == ([], 0, [])


def test_a_killed_round_is_overwritten_and_those_who_do_not_come_again_are_gone(tmp_path: Path) -> None:
    made, whole, resumed = experiment(CLIENTS), History(tmp_path / "whole"), History(tmp_path / "resumed")
    trained(made, tmp_path / "a", whole)
    there, file = engine(made, tmp_path / "b"), tmp_path / "server"
    run(average(made, resumed), there, lambda: made.start, rounds=2, seed=5, checkpoint=file)
    message, job = next(whole.messages([1], [0]))
    stray = replace(message, client_C=torch.tensor([77]))
    resumed.put(2, replace(message, weight_C=torch.tensor([9.0])), job)  # as a kill in round 2 may leave it
    resumed.put(2, stray, replace(job, clients=(77,)))
    (tmp_path / "resumed" / "2" / "0" / ".3.safetensors.77.part").write_bytes(b"half of it")
    run(average(made, resumed), there, lambda: made.start, rounds=ROUNDS, seed=5, checkpoint=file)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_a_round_without_a_step_is_not_retained(tmp_path: Path) -> None:
    made, history = experiment(CLIENTS), History(tmp_path / "history")
    trained(made, tmp_path, history, schedule=Synchronous(least=CLIENTS + 1))
    assert history.rounds() == []


def test_stacked_messages_are_split_by_client(tmp_path: Path) -> None:
    clients = (5, 1_000, 1_234_567)
    message = Message(
        group="g",
        client_C=torch.tensor(clients),
        version_C=torch.full((3,), 4),
        tensors={"w": torch.randn(3, 2, 2)},
        weight_C=torch.ones(3, dtype=torch.float64),
        metrics={"count": torch.arange(3, dtype=torch.float64)},
        texts=(("a",), (), ("b", "ä")),
    )
    history = History(tmp_path)
    history.put(4, message, Job(work="w", shared=Shared({"w": torch.ones(2)}), version=4, clients=clients, seed=1))
    assert (history.rounds(), history.clients(4)) == ([4], list(clients))
    for position, (one, job) in enumerate(history.messages()):
        assert pack_message(one) == pack_message(take_client(message, position))
        assert job == Job(work="w", shared=Shared(), version=4, clients=clients[position : position + 1], seed=1)
    file = tmp_path / "4" / "0" / "5.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LichenError, match="damaged"):
        list(history.messages([5]))


def test_each_rank_brings_its_own_clients(tmp_path: Path) -> None:
    made, alone = experiment(CLIENTS), History(tmp_path / "alone")
    trained(made, tmp_path, alone)

    def program(ranks: Ranks) -> None:
        there: Engine = DistributedEngine(engine(made, tmp_path / "ranks", block=1), ranks)
        run(average(made, History(tmp_path / "shared")), there, lambda: made.start, rounds=ROUNDS, seed=5)

    assert on_ranks(2, program) == [{"value": None}] * 2
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_a_client_store_forgets(tmp_path: Path) -> None:
    store, own_C = ClientStore(tmp_path), {"w": torch.randn(3, 5)}
    for version in (1, 2):
        store.stage((3, 4, 2_003), version, own_C)
    (tmp_path / "0" / "3" / ".2.safetensors.77.part").write_bytes(b"half of it")
    store.forget(3)
    store.forget(3)
    assert store.load((3,), 2) is None
    assert torch.equal(store.load((4, 2_003), 2)["w"], own_C["w"][1:])
    assert not any(own_C["w"][0].numpy().tobytes() in data for data in contents(tmp_path).values())
    assert sorted(os.listdir(tmp_path / "0")) == ["4"]
    store.forget(4)
    assert sorted(os.listdir(tmp_path)) == ["2"]
