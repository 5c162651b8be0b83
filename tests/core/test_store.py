"""What a kill may not lose: states repeat byte for byte, private state follows the server's version."""

import os

import pytest
import torch

from lichen.core import tree as trees
from lichen.core.contracts import Report, ServerState
from lichen.core.errors import LichenError
from lichen.core.rounds import run
from lichen.core.store import ClientStore, load_state, load_tree, save_state, save_tree


def test_state_round_trip(tmp_path):
    state = ServerState(
        round=4,
        shared={"patch.a": torch.randn(2, 2), "b": torch.randn(3)},
        optimizer={"b.m": torch.randn(3)},
        best={"b": torch.randn(3)},
        best_round=2,
        best_value=1.25,
    )
    save_state(tmp_path / "s.safetensors", state)
    first = (tmp_path / "s.safetensors").read_bytes()
    back = load_state(tmp_path / "s.safetensors")
    save_state(tmp_path / "s.safetensors", back)
    assert (tmp_path / "s.safetensors").read_bytes() == first
    assert (back.round, back.best_round, back.best_value) == (4, 2, 1.25)
    assert trees.digest(back.shared) == trees.digest(state.shared)
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_damage_names_the_file(tmp_path):
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


def test_private_state_follows_the_servers_version(tmp_path):
    store = ClientStore(tmp_path)
    assert store.load((0, 1), 0) is None
    for version in range(1, 7):
        store.stage((0, 1), version, {"w": torch.full((2, 3), float(version))})
        for asked in range(max(version - 2, 0), version + 1):  # what a killed server may still ask for
            own = store.load((1, 0), asked)
            assert (own is None) if asked == 0 else torch.equal(own["w"], torch.full((2, 3), float(asked)))
    with pytest.raises(LichenError, match="no private state"):
        store.load((0, 5), 6)


class Count:
    """An algorithm whose state is a number drawn from the round's seed, so that order matters."""

    def init(self, shared):
        return ServerState(round=0, shared=shared)

    def round(self, state, engine, seed):
        w = state.shared["w"] * 0.5 + (seed % 1000)
        report = Report(round=state.round + 1, clients=(), metrics={}, tokens=0, bytes_up=0, bytes_down=0, seconds=0.0)
        return ServerState(round=state.round + 1, shared={"w": w}), report


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    def start():
        return {"w": torch.zeros(3)}

    whole = run(Count(), None, start, rounds=5, seed=7, checkpoint=tmp_path / "a")
    seen = []
    run(Count(), None, start, rounds=2, seed=7, checkpoint=tmp_path / "b", observers=[lambda r: seen.append(r.round)])
    part = run(
        Count(), None, start, rounds=5, seed=7, checkpoint=tmp_path / "b", observers=[lambda r: seen.append(r.round)]
    )
    assert seen == [1, 2, 3, 4, 5]
    assert torch.equal(whole.shared["w"], part.shared["w"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
