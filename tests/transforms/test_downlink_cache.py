"""What a node remembers of the shared tensors: the server's bits, for as long as somebody holds them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Job, link, pack_job, unpack_job
from lichen.core.wire.shared import Shared
from lichen.transforms.delta import snapshot_name
from lichen.transforms.downlink import DownlinkState
from lichen.transforms.downlink_cache import SnapshotCache
from lichen.transforms.parse import parse_codecs

CHAIN = parse_codecs(["topk:2/32", "int4"])


def shared(seed: int) -> Shared:
    generator = torch.Generator().manual_seed(seed)
    return Shared({"w": torch.randn(40, 50, generator=generator), "b": torch.randn(9, generator=generator)})


def sent(downlink: DownlinkState, client: int, version: int) -> Job:
    """The job as it comes out of the wire."""
    job = downlink.job(Job(work="w", shared=Shared(), version=version, clients=(client,), seed=1))
    return unpack_job(pack_job(job))


@pytest.mark.parametrize("agreed", [False, True])
def test_nodes_hold_the_servers_bits_whenever_they_come(agreed: bool) -> None:
    downlink = DownlinkState.initial(shared(0), 4, agreed=agreed)
    nodes = [SnapshotCache(CHAIN, shared(0) if agreed else None) for _ in range(4)]
    came = {0: range(12), 1: range(0, 12, 2), 2: (3, 4, 11), 3: (5, 6)}
    seen: list[tuple[int, str]] = []
    for version in range(12):
        for client, versions in came.items():
            if version in versions:
                for _ in range(1 + (version == 4)):  # asked twice: the second time nothing is sent
                    job = sent(downlink, client, version)
                    seen.append((client, link(job)))
                    assert (not job.shared) == (link(job) != "full")
                    whole = nodes[client].whole(job)
                    assert snapshot_name(whole.shared) == downlink.name == job.snapshot
                    assert all(
                        torch.equal(whole.shared.trainable[n], downlink.snapshot.trainable[n])
                        for n in downlink.snapshot.trainable
                    )
                    downlink = downlink.acknowledge((client,))
        downlink = downlink.advance(shared(version + 1), CHAIN, version)
        downlink = DownlinkState.of({name: x.clone() for name, x in downlink.tree().items()})
    first = "same" if agreed else "full"
    assert [how for client, how in seen if client == 0] == [first, *["step"] * 4, "same", *["step"] * 7]
    assert [how for client, how in seen if client == 1] == [first, "step", "step", "same", "step", "step", "step"]
    late = [how for client, how in seen if client == 2]
    assert late == ["step" if agreed else "full", "step", "same", "step"]
    assert all(len(node.trees) <= 2 for node in nodes)


def test_steps_are_kept_while_they_weigh_less_than_the_view() -> None:
    downlink = DownlinkState.initial(shared(0), 1, agreed=True)
    for version in range(100):
        downlink = downlink.advance(shared(version + 1), CHAIN, version)
    job = downlink.job(Job(work="w", shared=Shared(), version=0, clients=(0,), seed=1))
    assert 10 < len(downlink.deltas) < 100
    assert link(job) == "full"
    heavy = DownlinkState.initial(shared(0), 1, agreed=True).advance(shared(1), parse_codecs([]), 0)
    assert heavy.deltas == ()


def test_clients_of_one_node_share_a_view_and_what_nobody_holds_is_forgotten() -> None:
    downlink, node = DownlinkState.initial(shared(0), 3, agreed=False), SnapshotCache(CHAIN)
    trees = []
    for client in range(3):
        trees.append(node.whole(sent(downlink, client, 0)).shared)
        downlink = downlink.acknowledge((client,))
    assert len(node.trees) == 1
    downlink = downlink.advance(shared(1), CHAIN, 0)
    node.whole(sent(downlink, 0, 1))
    assert len(node.trees) == 2
    one = node.whole(sent(downlink.acknowledge((0,)), 1, 1)).shared
    assert one is node.trees[downlink.name]
    node.whole(sent(downlink, 2, 1))
    assert len(node.trees) == 1


def test_what_a_node_lacks_or_gets_wrong_is_refused() -> None:
    downlink = DownlinkState.initial(shared(0), 1, agreed=True)
    with pytest.raises(LichenError, match="holds no view"):
        SnapshotCache(CHAIN).whole(sent(downlink, 0, 0))
    downlink = downlink.advance(shared(1), CHAIN, 0)
    with pytest.raises(LichenError, match="holds no view"):
        SnapshotCache(CHAIN).whole(sent(downlink, 0, 1))
    with pytest.raises(LichenError, match="does not know how steps are coded"):
        SnapshotCache(None, shared(0)).whole(sent(downlink, 0, 1))
    job = sent(downlink, 0, 1)
    with pytest.raises(LichenError, match="came to view"):
        SnapshotCache(CHAIN, shared(0)).whole(replace(job, snapshot="0" * 16))
    plain = Job(work="w", shared=shared(3), version=0, clients=(0,), seed=1)
    assert SnapshotCache().whole(plain) is plain
