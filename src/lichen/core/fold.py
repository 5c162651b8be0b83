"""The one loop every engine runs on a node: blocks of clients, batches, messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lichen.core.contracts import Source, Station
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message
from lichen.core.store import ClientStore
from lichen.core.tree import Tree

__all__ = ["blocks", "serve"]


def blocks(clients: Sequence[int], source: Source, size: int) -> list[tuple[int, ...]]:
    """Group clients of equal shape, at most ``size`` together, in a stable order."""
    by_shape: dict[object, list[int]] = {}
    for client in clients:
        by_shape.setdefault(source.shape(client), []).append(client)
    return [tuple(group[i : i + size]) for group in by_shape.values() for i in range(0, len(group), size)]


def serve(
    job: Job,
    stations: Mapping[str, Station],
    store: ClientStore,
    *,
    base: str = "",
    block_size: int = 8,
    device: str = "cpu",
) -> Iterator[Message]:
    """Do ``job`` for its clients and yield one message a block.

    Private state is staged under version ``job.version + 1``: it counts once the server has
    acknowledged that version, and is overwritten by a job that repeats it.

    Args:
        job: What is asked.
        stations: What this node can do, by the job's ``work``.
        store: Private state of the clients; it never leaves the node.
        base: Digest of the frozen base this node holds.
        block_size: Clients side by side.
        device: Where tensors and batches are brought before the work sees them.

    Raises:
        LichenError: if the node does not know the work, or holds another base model.
    """
    if job.work not in stations:
        raise LichenError(
            f"unknown work {job.work!r}", where="job", fix=f"this node knows: {', '.join(sorted(stations))}"
        )
    if job.base and base and job.base != base:
        raise LichenError(
            f"made for base model {job.base[:12]}, this node holds {base[:12]}",
            where="job",
            fix="load the same model at the same precision on both sides",
        )
    station = stations[job.work]
    job = replace(job, shared=_on(job.shared, device))
    for clients in blocks(job.clients, station.source, block_size):
        own_C = store.load(clients, job.version)
        state = station.work.init(job, clients, None if own_C is None else _on(own_C, device))
        for batch in station.source.batches(clients, job.seed):
            state = station.work.step(state, _on(batch, device))
        message, own_C = station.work.final(state)
        if own_C is not None:
            store.stage(clients, job.version + 1, own_C)
        yield message


def _on(tensors: Mapping[str, Tensor], device: str) -> Tree:
    return {name: x.to(device) for name, x in tensors.items()}
