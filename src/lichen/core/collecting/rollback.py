"""What clients are told of answers that did not count: the server's memory of it, and the jobs that say it.

An answer counts where it was admitted and its round made a step. Any other leaves no trace at the server, and must
leave none at its client: too late, refused, dropped on its way, or one of too few. The client cannot know; it learns it
with its next job, which names the version of the first answer since the last that counted, and goes on from what it had
kept then. Whether it had got the former job, and how far it came, makes no difference: private state, and so a run, is
a function of the answers that counted alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lichen.core.collecting.collect import Collected
from lichen.core.message import Job

__all__ = ["rollback_after", "with_rollback"]


def rollback_after(
    rollback: Mapping[int, int], came: Collected, *, counted: bool, old: Mapping[int, int] | None = None
) -> dict[int, int]:
    """What is to be told after a round.

    Args:
        rollback: What was to be told before it.
        came: What came of its jobs.
        counted: The round made a step: those who came count.
        old: Clients that were given up before it, and the versions of their jobs.

    Returns:
        By client, ascending, the version of the first answer that did not count since the last that did.
    """
    after = dict(rollback)
    lost = [*(old or {}).items(), *came.lost]
    answered = list(zip(came.client_N.tolist(), came.version_N.tolist(), strict=True))
    if counted:
        for client, _ in answered:
            after.pop(client, None)
    else:
        lost += answered
    for client, version in lost:
        after.setdefault(client, version)
    return dict(sorted(after.items()))


def with_rollback(job: Job, rollback: Mapping[int, int], busy: Collection[int] = ()) -> Job:
    """A job that tells its clients which of their answers did not count.

    Args:
        job: As it would go out.
        rollback: As :func:`rollback_after` gives it.
        busy: Clients that have yet to answer another job: what they stage with it may count.
    """
    some = {client: rollback[client] for client in job.clients if client in rollback and client not in busy}
    return replace(job, rollback=some) if some or job.rollback else job
