"""What a kill may not lose: states repeat byte for byte, private state follows the server's version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core import tree as trees
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, TensorSpec
from lichen.core.fold import serve
from lichen.core.message import Job, Message
from lichen.core.rounds import load_state, run, save_state
from lichen.core.store import ClientStore, load_tree, save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared


def test_state_round_trip(tmp_path: Path) -> None:
    state = ServerState(
        round=4,
        shared=Shared.of_flat({"patch.a": torch.randn(2, 2), "b": torch.randn(3)}),
        optimizer={"b.m": torch.randn(3)},
        best=Shared({"b": torch.randn(3)}),
        best_round=2,
        best_value=1.25,
    )
    save_state(tmp_path / "s.safetensors", state)
    first = (tmp_path / "s.safetensors").read_bytes()
    back = load_state(tmp_path / "s.safetensors")
    save_state(tmp_path / "s.safetensors", back)
    assert (tmp_path / "s.safetensors").read_bytes() == first
    assert (back.round, back.best_round, back.best_value) == (4, 2, 1.25)
    assert trees.digest(back.shared.flat()) == trees.digest(state.shared.flat())
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_damage_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(LichenError, match="no such file"):
        load_tree(path)
    save_tree(path, {"a": torch.ones(4)})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(LichenError, match="damaged"):
        load_tree(path)
    save_tree(path, {"a": torch.ones(4)})
    with pytest.raises(LichenError, match="not a server state"):
        load_state(path)


def test_private_state_follows_the_servers_version(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    assert store.load((0, 1), 0) is None
    for version in range(1, 7):
        store.stage((0, 1), version, {"w": torch.full((2, 3), float(version))})
        for asked in range(max(version - 2, 0), version + 1):  # what a killed server may still ask for
            own = store.load((1, 0), asked)
            assert (own is None) if asked == 0 else torch.equal(own["w"], torch.full((2, 3), float(asked)))
    with pytest.raises(LichenError, match="no private state"):
        store.load((0, 5), 6)


def test_what_no_server_asks_for_any_more_is_gone(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for version in (1, 2, 5, 6, 9):
        store.stage((1_234_567,), version, {"w": torch.full((1, 2), float(version))})
    left = sorted(int(f.stem) for f in (tmp_path / "1234" / "567").iterdir())
    assert left == [6, 9]  # a server at 7 or 8 reads 6
    assert store.load((1_234_567,), 8)["w"].tolist() == [[6.0, 6.0]]
    assert store.load((1_234_567,), 5) is None


def test_what_belongs_to_the_best_round_stays_beside_the_newest(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for version, best in ((1, -1), (2, -1), (3, 2), (6, 2), (9, 2), (12, 4)):
        store.stage((7,), version, {"w": torch.full((1, 2), float(version))}, best=best)
    left = sorted(int(f.stem) for f in (tmp_path / "0" / "7").iterdir())
    assert left == [2, 9, 12]  # at version 4 it still had what it made at 2... 3 was overtaken before 4 was the best
    store.stage((7,), 15, {"w": torch.full((1, 2), 15.0)}, best=12)
    assert store.load((7,), 12)["w"].tolist() == [[12.0, 12.0]]
    assert sorted(int(f.stem) for f in (tmp_path / "0" / "7").iterdir()) == [12, 15]


def test_a_thousand_clients_of_a_folder(tmp_path: Path) -> None:
    clients = (3, 999, 1000, 999_999, 10**9)
    store = ClientStore(tmp_path)
    own_C = {"w": torch.arange(10.0).view(5, 2), "n": torch.arange(5)}
    store.stage(clients, 1, own_C)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "1000000", "999"]
    found = ClientStore(tmp_path).load(clients[::-1], 4)
    assert torch.equal(found["w"], own_C["w"].flip(0))
    assert torch.equal(found["n"], own_C["n"].flip(0))
    assert not list(tmp_path.rglob("*.part"))


def test_newcomers_and_those_who_have_state_stand_apart(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "state")
    assert store.split_by_state((4, 2), 0) == ((), (4, 2))
    store.stage((2, 9), 3, {"w": torch.ones(2, 1)})
    assert store.split_by_state((4, 9, 2), 3) == ((9, 2), (4,))
    assert store.split_by_state((4, 9, 2), 2) == ((), (4, 9, 2))


class Counting:
    """A work whose private state is how often a client has come."""

    def expected(self, job: Any) -> Expected:
        return Expected(group="g", tensors={"n": TensorSpec(())})

    def init(self, job: Any, clients: int, own_C: Tree | None) -> Any:
        return clients, job.version, own_C["n"] if own_C else torch.zeros(len(clients))

    def step(self, state: Any, batch: Batch) -> Any:
        return state

    def final(self, state: Any) -> Any:
        clients, version, n_C = state
        count = len(clients)
        message = Message(
            group="g",
            client_C=torch.tensor(clients),
            version_C=torch.full((count,), version),
            tensors={"n": n_C + 1},
            weight_C=torch.ones(count),
        )
        return message, {"n": n_C + 1}


class NoBatches:
    def shape(self, client: int) -> Any:
        return ()

    def batches(self, clients: int, seed: int) -> Any:
        return iter(())


def test_a_round_of_old_and_new_clients_is_served(tmp_path: Path) -> None:
    client_tasks, seen = {"count": ClientTask(work=Counting(), source=NoBatches())}, {}
    for version, clients in enumerate([(0, 1, 2), (1, 3), (0, 1, 4)]):
        job = Job(work="count", shared=Shared(), version=version, clients=clients, seed=0)
        for message in serve(job, client_tasks, ClientStore(tmp_path / "state"), block_size=4):
            seen |= dict(zip(message.client_C.tolist(), message.tensors["n"].tolist(), strict=True))
    assert seen == {0: 2.0, 1: 3.0, 2: 1.0, 3: 1.0, 4: 1.0}


def test_a_kill_while_writing_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, clients = ClientStore(tmp_path), tuple(range(100))  # more than are held open at once
    store.stage(clients, 1, {"w": torch.ones(100, 2)})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.stage(clients, 2, {"w": torch.zeros(100, 2)})
    monkeypatch.undo()
    assert torch.equal(store.load(clients, 2)["w"], torch.ones(100, 2))
    store.stage(clients, 2, {"w": torch.full((100, 2), 2.0)})
    assert torch.equal(store.load(clients, 2)["w"], torch.full((100, 2), 2.0))
    assert torch.equal(store.load(clients, 1)["w"], torch.ones(100, 2))
    assert not list(tmp_path.rglob("*.part"))


def test_damaged_private_state_is_named(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.stage((7,), 1, {"w": torch.ones(1, 2)})
    file = tmp_path / "0" / "7" / "1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LichenError, match="damaged") as told:
        store.load((7,), 1)
    assert told.value.where == str(file)


class Count:
    """An algorithm whose state is a number drawn from the round's seed, so that order matters."""

    def init(self, shared: Shared) -> Any:
        return ServerState(round=0, shared=shared)

    def round(self, state: Any, engine: Any, seed: int) -> Any:
        w = state.shared.trainable["w"] * 0.5 + (seed % 1000)
        report = Report(round=state.round + 1, clients=(), metrics={}, tokens=0, bytes_up=0, bytes_down=0, seconds=0.0)
        return ServerState(round=state.round + 1, shared=Shared({"w": w})), report


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    def start() -> Any:
        return Shared({"w": torch.zeros(3)})

    whole = run(Count(), None, start, rounds=5, seed=7, checkpoint=tmp_path / "a")
    seen = []
    run(Count(), None, start, rounds=2, seed=7, checkpoint=tmp_path / "b", observers=[lambda r: seen.append(r.round)])
    part = run(
        Count(), None, start, rounds=5, seed=7, checkpoint=tmp_path / "b", observers=[lambda r: seen.append(r.round)]
    )
    assert seen == [1, 2, 3, 4, 5]
    assert torch.equal(whole.shared.trainable["w"], part.shared.trainable["w"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
