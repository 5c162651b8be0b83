"""An engine whose clients' answers do not count when a test says so, in each of the ways in which that happens."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import final

import torch

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.engines.around import ForwardingEngine
from lichen.engines.remote.pieces import Pieces
from lichen.engines.remote.worker import SiteWorker
from lichen.engines.sites import Seen, SiteError

__all__ = ["HOW", "Losing", "Those", "WorkerSites"]

HOW = ("unreached", "late", "refused", "failed")
"""Never asked; at work, and heard of no more; an answer that is not admitted; an error after the work was done."""


@final
class Losing(ForwardingEngine):
    """Around an engine that trains: who is lost in which version, and how.

    Args:
        inner: Does the work, one client a block.
        lost: ``version`` to its clients and how their answers are lost; of training alone.
    """

    def __init__(self, inner: Engine, lost: Mapping[int, Mapping[int, str]]) -> None:
        self.inner, self.lost = inner, lost
        self.jobs: dict[int, Job] = {}
        self.sent: list[Job] = []

    def submit(self, job: Job) -> int:
        self.sent.append(job)
        ways = self._ways(job)
        number = self.inner.submit(replace(job, clients=tuple(c for c in job.clients if ways.get(c) != "unreached")))
        self.jobs[number] = job
        return number

    def _ways(self, job: Job) -> Mapping[int, str]:
        return self.lost.get(job.version, {}) if job.work.startswith("train") else {}

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        for reply in self.inner.replies(numbers, math.inf):
            (client,) = reply.clients
            way = self._ways(self.jobs[reply.job]).get(client)
            if way == "failed":
                yield replace(reply, message=None, error=LichenError("is told nothing"), reason="norm")
            elif way == "refused":
                assert reply.message is not None
                yield replace(reply, message=replace(reply.message, version_C=reply.message.version_C + 99))
            elif way is None:
                yield reply

    def cancel(self, number: int) -> None:
        self.inner.cancel(number)


@final
class Those:
    """A sampler that invites, round by round, whom it was given."""

    def __init__(self, rounds: list[tuple[int, ...]]) -> None:
        self.rounds = list(rounds)

    def invite(self, weight_N: torch.Tensor, seed: int) -> tuple[int, ...]:
        return self.rounds.pop(0)


@final
class WorkerSites:
    """Sites in threads of this process, by name, behind no transport; it starts them and ends them.

    Args:
        workers: What answers.
        stuck: Sites that take a job and never come to do it.
        away: Sites that are not there.
    """

    def __init__(
        self, workers: Mapping[str, SiteWorker], *, stuck: Collection[str] = (), away: Collection[str] = ()
    ) -> None:
        self.workers, self.away = dict(workers), set(away)
        self.answers = {name: Pieces(worker.answer) for name, worker in self.workers.items()}
        self.threads = [worker.start() for name, worker in self.workers.items() if name not in stuck]

    def start(self) -> None:
        pass

    def seen(self) -> dict[str, Seen]:
        return {name: Seen(since=0.0, last=0.0, instance=one.instance) for name, one in self.workers.items()}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        if site in self.away:
            raise SiteError(site, "gone", LichenError("nobody is there", where=site))
        try:
            return self.answers[site].answer(kind, body)
        except LichenError as error:
            raise SiteError(site, "refused", error) from None

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        for thread in self.threads:
            thread.join(10)

    def __enter__(self) -> WorkerSites:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
