"""Folds a job's batches into one message a client: the loop that every engine runs on a node."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from lichen.core.contracts.client import ClientTask, ClientWork, Dialogue, Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message
from lichen.core.store import ClientStore
from lichen.core.tree import Tree

__all__ = [
    "BEST",
    "ClientsPerBlock",
    "Served",
    "answer",
    "blocks",
    "fold",
    "half_of",
    "is_dialogue",
    "is_out_of_memory",
    "serve",
    "task_and_blocks",
]

ClientsPerBlock = Callable[[Job, ClientTask], tuple[int, ClientTask]]
"""Finds how many clients of a job stand side by side, and the task they do: the one given, or one in less memory."""

BEST = "best_version"
"""A job's setting: the version whose private state must stay, because it belongs to the best round so far."""

_OUT_OF_MEMORY = "DefaultCPUAllocator"


def blocks(clients: Sequence[int], source: Source, size: int) -> list[tuple[int, ...]]:
    """Group clients of equal shape, at most ``size`` together, in a stable order."""
    by_shape: dict[object, list[int]] = {}
    for client in clients:
        by_shape.setdefault(source.shape(client), []).append(client)
    return [tuple(group[i : i + size]) for group in by_shape.values() for i in range(0, len(group), size)]


def fold(
    work: ClientWork | Dialogue, batches: Iterable[Batch], job: Job, clients: Sequence[int], own_C: Tree | None = None
) -> tuple[Message, Tree | None]:
    """The client's fold: ``init``, a ``step`` for every batch, ``final``.

    Args:
        work: What the clients do.
        batches: What they do it on.
        job: What is asked.
        clients: One block of clients, side by side.
        own_C: Their stacked private state; None at their first time.

    Returns:
        The message that leaves, and the private state that stays.

    Raises:
        LichenError: if the work asks back, and so is no fold.
    """
    if is_dialogue(type(work)):
        raise LichenError("the work asks back, and nobody answers here", where=f"work {job.work!r}")
    work = cast(ClientWork, work)
    state = work.init(job, clients, own_C)
    for batch in batches:
        state = work.step(state, batch)
    return work.final(state)


@lru_cache(maxsize=256)
def is_dialogue(work: type) -> bool:
    """Whether works of this class ask back; looked up once, since it is asked for every block."""
    return issubclass(work, Dialogue)


Served = tuple[tuple[int, ...], Message | LichenError]
"""A block's clients, and their message or why they have none."""


def answer(
    job: Job,
    client_tasks: Mapping[str, ClientTask],
    store: ClientStore,
    *,
    base: str = "",
    block_size: int | ClientsPerBlock = 8,
    device: str = "cpu",
) -> Iterator[Served]:
    """Do ``job`` for its clients and yield, a block after the other, its message or why there is none.

    A block that does not fit into memory is halved, and so are those after it; nothing of it was kept.

    Private state is staged under version ``job.version + 1``: it counts once the server has
    acknowledged that version, and is overwritten by a job that repeats it. What a client had at the version
    that the setting ``best_version`` names stays beside it. Who the job's ``rollback`` names goes on from what it had
    at that version.

    Args:
        job: What is asked.
        client_tasks: What this node can do, by the job's ``work``.
        store: Private state of the clients; it never leaves the node.
        base: Digest of the frozen base this node holds.
        block_size: Clients side by side, or what finds it for a job.
        device: Where tensors are brought before the work sees them; batches stay on the host.

    A block that cannot do it costs the others nothing. Nobody can where the node does not know the work or holds
    another base model.
    """
    job = replace(job, shared=job.shared.to(device))
    try:
        client_task, waiting = task_and_blocks(job, client_tasks, store, base=base, block_size=block_size)
    except LichenError as error:
        yield job.clients, error
        return
    while waiting:
        clients = waiting.popleft()
        try:
            done = _block(job, client_task, store, clients, device)
            half = 0 if done is not None else half_of(clients, device)
        except LichenError as error:
            if len(clients) > 1:  # whose fault it is shows when each does it alone
                waiting.extendleft((client,) for client in reversed(clients))
            else:
                yield clients, error
            continue
        if done is None:
            every = (clients, *waiting)
            waiting = deque(part[i : i + half] for part in every for i in range(0, len(part), half))
            continue
        message, own_C = done
        if own_C is not None:
            store.stage(clients, job.version + 1, own_C, best=int(job.settings.get(BEST, -1)))
        yield clients, message


def serve(
    job: Job,
    client_tasks: Mapping[str, ClientTask],
    store: ClientStore,
    *,
    base: str = "",
    block_size: int | ClientsPerBlock = 8,
    device: str = "cpu",
) -> Iterator[Message]:
    """The messages of :func:`answer`, whose arguments these are.

    Raises:
        LichenError: at the first block that cannot do it: if the node does not know the work, holds another base
            model, or has no room for a single client.
    """
    for _, served in answer(job, client_tasks, store, base=base, block_size=block_size, device=device):
        if isinstance(served, LichenError):
            raise served
        yield served


def task_and_blocks(
    job: Job,
    client_tasks: Mapping[str, ClientTask],
    store: ClientStore,
    *,
    base: str,
    block_size: int | ClientsPerBlock,
) -> tuple[ClientTask, deque[tuple[int, ...]]]:
    """``(task, the job's clients in blocks)``, once private state of answers that did not count is gone.

    Raises:
        LichenError: if the node does not know the work, or holds another base model.
    """
    if job.work not in client_tasks:
        raise LichenError(
            f"unknown work {job.work!r}", where="job", fix=f"this node knows: {', '.join(sorted(client_tasks))}"
        )
    if job.base and base and job.base != base:
        raise LichenError(
            f"made for base model {job.base[:12]}, this node holds {base[:12]}",
            where="job",
            fix="load the same model at the same precision on both sides",
        )
    client_task = client_tasks[job.work]
    size, client_task = (block_size, client_task) if isinstance(block_size, int) else block_size(job, client_task)
    here = set(job.clients)
    store.roll_back({client: before for client, before in job.rollback.items() if client in here}, job.version)
    split = store.split_by_state(job.clients, job.version)
    return client_task, deque(block for some in split for block in blocks(some, client_task.source, size))


def _block(
    job: Job, client_task: ClientTask, store: ClientStore, clients: Sequence[int], device: str
) -> tuple[Message, Tree | None] | None:
    """What these clients give, or None where memory ran out."""
    try:
        own_C = store.load(clients, job.version)
        own_C = None if own_C is None else _on(own_C, device)
        return fold(client_task.work, client_task.source.batches(clients, job.seed), job, clients, own_C)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory has run out, on whatever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _OUT_OF_MEMORY in str(error)


def half_of(clients: Sequence[int], device: str) -> int:
    """Half a block's clients, once its leavings are swept up.

    Raises:
        LichenError: if it was one client's already.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    if len(clients) == 1:
        raise LichenError(
            f"a single client's step does not fit into the memory of {device}",
            where=f"client {clients[0]}",
            fix="lower federation.batch_size or data.max_length, or set model.dtype: bfloat16",
        )
    return (len(clients) + 1) // 2


def _on(tensors: Mapping[str, Tensor], device: str) -> Tree:
    return {name: x.to(device) for name, x in tensors.items()}
