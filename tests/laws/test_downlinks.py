"""The laws of every downlink: who is sent what, what clients then hold, and that its state is all it remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core.message import Job, pack_job, unpack_job
from lichen.core.store import load_tree, save_tree
from lichen.core.tree import Tree, digest
from lichen.core.wire.shared import Shared
from lichen.server.lowrank.submodel import Capacity
from lichen.transforms.codec import Chain
from lichen.transforms.downlink import WHOLE, Deltas, Direct, Downlink
from lichen.transforms.downlink_cache import SnapshotCache
from lichen.transforms.parse import parse_codecs

CLIENTS = 5
INT4 = parse_codecs(["topk:2/8", "int4"])
FAMILY: dict[str, tuple[Downlink, Chain | None]] = {
    "whole": (WHOLE, None),
    "tiers": (Direct(Capacity((2, 1, 2, 1, 2), last_N=(None, 1, None, None, None), scaling=0.5)), None),
    "deltas": (Deltas(INT4), INT4),
    "deltas, agreed": (Deltas(INT4, agreed=True), INT4),
    "deltas, exact": (Deltas(Chain()), Chain()),
}
"""Each member, and what its nodes must know."""

member = pytest.mark.parametrize(("downlink", "chain"), FAMILY.values(), ids=FAMILY)


def shared(seed: int) -> Shared:
    draw = torch.Generator().manual_seed(seed)
    trainable = {f"layers.{i}.q.lora_A": torch.randn(2, 32, generator=draw) for i in range(2)}
    trainable |= {f"layers.{i}.q.lora_B": torch.randn(24, 2, generator=draw) for i in range(2)}
    return Shared(trainable, frozen={"answers.index": torch.arange(seed + 1)})


def job(version: int, clients: tuple[int, ...]) -> Job:
    return Job(work="w", shared=shared(version), version=version, clients=clients, seed=version, settings={"x": 1.0})


def same(a: Shared, b: Shared) -> bool:
    return digest(a.flat()) == digest(b.flat())


def rounds(downlink: Downlink, nodes: SnapshotCache, through: Any = lambda state: state) -> list[list[Job]]:
    """The jobs of six rounds, each node doing what it is sent; half of the clients come to each."""
    out, state = list[list[Job]](), downlink.init(shared(0), CLIENTS, first=True)
    for version in range(6):
        asked = job(version, tuple(c for c in range(CLIENTS) if (c + version) % 2))
        out.append(list(downlink.jobs(asked, state)))
        for part in out[-1]:
            for client in part.clients:
                sent = unpack_job(pack_job(replace(part, clients=(client,))))
                assert same(nodes.whole(sent).shared, part.shared)
            state = downlink.acknowledge(part, part.clients, state)
        state = through(downlink.advance(shared(version + 1), state, seed=version))
    return out


@member
def test_everyone_on_the_job_is_asked_once_and_for_the_same_thing(downlink: Downlink, chain: Chain | None) -> None:
    for version, jobs in enumerate(rounds(downlink, SnapshotCache(chain, shared(0)))):
        asked = job(version, tuple(c for c in range(CLIENTS) if (c + version) % 2))
        assert sorted(c for part in jobs for c in part.clients) == list(asked.clients)
        for part in jobs:
            assert replace(part, shared=asked.shared, clients=asked.clients, snapshot="", deltas=(), acked={}) == asked


@member
def test_a_whole_job_is_one_over_what_is_held(downlink: Downlink, chain: Chain | None) -> None:
    state = downlink.init(shared(0), CLIENTS, first=True)
    for version in range(3):
        (whole,) = downlink.jobs(job(version, (0, 1, 2, 3, 4)), state, whole=True)
        assert same(whole.shared, downlink.snapshot(shared(version), state))
        state = downlink.advance(shared(version + 1), state, seed=version)


@member
def test_its_state_is_all_that_it_remembers(downlink: Downlink, chain: Chain | None, tmp_path: Path) -> None:
    def through(state: Tree) -> Tree:
        save_tree(tmp_path / "state", state, {})
        return load_tree(tmp_path / "state")[0]

    here = rounds(downlink, SnapshotCache(chain, shared(0)))
    there = rounds(downlink, SnapshotCache(chain, shared(0)), through)
    for jobs, others in zip(here, there, strict=True):
        for one, other in zip(jobs, others, strict=True):
            assert same(one.shared, other.shared)
            assert (one.snapshot, one.acked) == (other.snapshot, other.acked)
            assert [digest(step) for _, step in one.deltas] == [digest(step) for _, step in other.deltas]


@member
def test_to_hear_of_nobody_or_twice_changes_nothing(downlink: Downlink, chain: Chain | None) -> None:
    state = downlink.advance(shared(1), downlink.init(shared(0), CLIENTS, first=True), seed=3)
    (part,) = downlink.jobs(job(1, (0, 2)), state, whole=True)
    once = downlink.acknowledge(part, (0, 2), state)
    assert digest(downlink.acknowledge(part, (), state)) == digest(state)
    assert digest(downlink.acknowledge(part, (0, 2), once)) == digest(once)
    assert same(downlink.snapshot(shared(1), once), downlink.snapshot(shared(1), state))


@member
def test_nobody_holds_what_was_never_sent(downlink: Downlink, chain: Chain | None) -> None:
    for first in (True, False):
        state = downlink.init(shared(0), CLIENTS, first=first)
        (part,) = downlink.jobs(job(0, (0, 1)), state, whole=True)
        assert bool(part.acked) == (downlink.agreed and first)
