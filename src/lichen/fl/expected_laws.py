"""The law of what client works declare: a server that holds messages against it admits every honest one."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lichen.core.collecting.admission import Admission
from lichen.core.contracts.client import ClientTask, Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.fold import serve
from lichen.core.message import Job, Message, pack_message, take_client, unpack_message
from lichen.core.replies import Reply
from lichen.core.seeds import derive
from lichen.core.store import ClientStore

__all__ = ["check_expected"]


def check_expected(task: ClientTask, job: Job, *, rounds: int = 3) -> None:
    """Hold a client work to what it declares: its messages are admitted, stacked, alone, and after a trip as bytes.

    They are in rounds one after the other, so that private state and what changes with the version are in them. So
    are those of clients without a row, where the work takes such clients.

    Args:
        task: The work and its source, as a node knows them.
        job: What is asked; its ``work`` may have any name.
        rounds: How many, from the job's version on.

    Raises:
        AssertionError: with the reason and the sentence of the first refusal.
    """
    admission = Admission(works={job.work: task.work})
    idle = ClientTask(work=task.work, source=_Nothing(task.source))
    with tempfile.TemporaryDirectory() as folder:
        stores = [ClientStore(Path(folder) / name) for name in ("some", "none")]
        for round_ in range(rounds):
            this = replace(job, version=job.version + round_, seed=derive(job.seed, round_))
            _admits(admission, this, task, stores[0])
            with suppress(LichenError):  # a work may refuse a client without rows
                _admits(admission, this, idle, stores[1])


def _admits(admission: Admission, job: Job, task: ClientTask, store: ClientStore) -> None:
    expected = admission.expected(job)
    for message in serve(job, {job.work: task}, store, block_size=len(job.clients)):
        crossed = unpack_message(pack_message(message))
        for one in (message, crossed, *(take_client(crossed, k) for k in range(len(crossed.client_C)))):
            _admit(admission, job, one)
    if admission.expected(job) != expected:
        raise AssertionError("what is expected must follow from the job alone")


def _admit(admission: Admission, job: Job, message: Message) -> None:
    reply = Reply(job=0, clients=tuple(message.client_C.tolist()), message=message)
    _, refused = admission.admit(reply, job, admission.expected(job), set())
    for refusal in refused:
        raise AssertionError(f"{refusal.reason}: client {refusal.client} {refusal.what}")


@final
@dataclass(frozen=True, slots=True)
class _Nothing:
    """A source whose clients have no row."""

    inner: Source

    def shape(self, client: int) -> Hashable:
        """The source's."""
        return self.inner.shape(client)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """None."""
        return iter(())
