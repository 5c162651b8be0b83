"""Goes around any engine whose clients mask what they send, and hands over their sum in place of their messages.

The server's half of four stages: it passes keys and shares on, adds masked vectors modulo 2^64, and opens the sum of
those that came. A round that cannot be opened is begun again, with fresh keys, and given up after some attempts: then
nothing of it counts, and the reason is told.

The sum comes as one lifted message of all whose it is. So whoever listens, an algorithm or a column of scores, needs
nothing but an aggregator that adds, and metrics that are sums.

References: those of :mod:`lichen.clients.masking.masked`.

Legend: C clients, k neighbours of each.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch

from lichen.clients.masking.masked import ATTEMPT, Masked, context_of
from lichen.core.collecting.admission import Admission
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.masks.closing import Closing
from lichen.core.message import Job, Message, concatenate_messages
from lichen.core.replies import Reply
from lichen.core.tree import Tree
from lichen.engines.answering import AnsweringEngine
from lichen.engines.around import ForwardingEngine
from lichen.engines.turns import Answers

__all__ = ["UnmaskingEngine"]


@final
@dataclass(slots=True, eq=False)
class _Round:
    """A job under masks: the server's half, and what has come of its clients on this rank.

    ``first`` is the number of its first attempt, by which it is known; ``before`` says who lied in attempts before this
    one, and is not invited again.
    """

    first: int
    job: Job
    work: Masked
    closing: Closing
    opening: Expected
    before: tuple[Reply, ...] = ()
    finished: set[int] = field(default_factory=set)
    openings: list[Message] = field(default_factory=list)
    errors: list[Reply] = field(default_factory=list)

    def answer(self, question: Message, stage: int) -> Tree:
        """What the clients of a stage are told."""
        clients = question.client_C.tolist()
        arrays = {name: x_C.numpy() for name, x_C in question.tensors.items()}
        if stage == 0:
            ids, adverts = self.closing.keys(clients, arrays["advert"])
            return {"ids": torch.from_numpy(ids), "adverts": torch.from_numpy(adverts)}
        if stage == 1:
            sealed, present = self.closing.shares(clients, arrays["sealed"], arrays["commitments"])
            return {"sealed": torch.from_numpy(sealed), "present": torch.from_numpy(present)}
        self.closing.masked(clients, arrays["masked"])
        return {"alive": torch.from_numpy(self.closing.alive(clients))}

    def refusals(self, survivors: Collection[int]) -> list[Reply]:
        """Why clients of this rank are not in the sum."""
        survivors, liars = set(survivors), self.closing.liars
        out = list(self.before)
        for reply in self.errors:
            gone = tuple(client for client in reply.clients if client not in survivors and client not in liars)
            if gone:
                out.append(replace(reply, job=self.first, clients=gone))
        mine = self.finished.union(*(reply.clients for reply in self.errors))
        for client in sorted(mine & liars.keys() - survivors):
            error = LichenError(liars[client], where="masks")
            out.append(Reply(job=self.first, clients=(client,), error=error, reason="masks"))
        return out

    def caught(self) -> tuple[Reply, ...]:
        """Who has lied so far, of this rank: told once, at the end."""
        liars = set(self.closing.liars)
        known = {client for reply in self.before for client in reply.clients}
        one_by_one = (replace(r, clients=(client,)) for r in self.refusals(()) for client in r.clients)
        return (*self.before, *(r for r in one_by_one if r.clients[0] in liars - known))

    def given_up(self, error: LichenError) -> list[Reply]:
        """That nothing counts, told for those of this rank who came to the end."""
        named = {client for reply in self.errors for client in reply.clients} | self.closing.liars.keys()
        clients = tuple(sorted(self.finished - named))
        return [Reply(job=self.first, clients=clients, error=error, reason="masks")] if clients else []


@final
class UnmaskingEngine(ForwardingEngine):
    """An engine whose masked works give sums.

    Args:
        inner: Carries jobs, questions and answers.
        works: Those that mask, by the name a job calls them; all others pass.
        patience: Seconds of a stage, on the inner engine's clock; who has not spoken by then has dropped out.
        attempts: How often a round is begun.
    """

    def __init__(
        self, inner: Engine, works: Mapping[str, Masked], *, patience: float = math.inf, attempts: int = 3
    ) -> None:
        answers = Answers(answer=self._answer, at_once=False, patience=patience)
        self.inner: Engine = AnsweringEngine(inner, answers, Admission(works=works))
        self.works, self.attempts = dict(works), attempts
        self._rounds: dict[int, _Round] = {}  # by the number of the job as it was last begun
        self._newest: dict[int, int] = {}  # the number it is known by to the number it was last begun by
        self._over: set[int] = set()

    def submit(self, job: Job) -> int:
        """As the inner engine; a job under masks is begun."""
        if job.work not in self.works:
            return self.inner.submit(job)
        return self._start(job)

    def _start(self, job: Job, first: int | None = None, before: tuple[Reply, ...] = ()) -> int:
        work = self.works[job.work]
        terms = work.terms
        closing = Closing(context_of(terms, job), k=terms.k, threshold=terms.threshold, least=terms.least)
        number = self.inner.submit(job)
        first = number if first is None else first
        self._rounds[number] = _Round(first, job, work, closing, work.opening(job), before)
        self._newest[first] = number
        return number

    def _answer(self, question: Message, job: Job, stage: int) -> Tree:
        (round_,) = (one for one in self._rounds.values() if one.job is job)
        return round_.answer(question, stage)

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """Replies to jobs without masks as they come; of jobs with masks the sum, or why there is none."""
        while True:
            masked = {number: self._newest[number] for number in numbers if number in self._newest}
            others = [number for number in numbers if number not in masked and number not in self._over]
            for reply in self.inner.replies([*masked.values(), *others], until):
                if (round_ := self._rounds.get(reply.job)) is None:
                    yield reply
                else:
                    self._take(round_, reply)
            late = self.inner.now() >= until
            closed = [(number, self._close(number, late=late)) for number in sorted(masked)]
            for _, replies in closed:
                yield from replies or ()
            if all(replies is not None for _, replies in closed):
                return

    def _take(self, round_: _Round, reply: Reply) -> None:
        """Keep an opening, or why there is none."""
        if reply.message is None:
            round_.errors.append(reply)
            return
        message, refusals = Admission().admit(reply, round_.job, round_.opening, round_.finished)
        if message is not None:
            round_.openings.append(message)
        for refusal in refusals:
            error = LichenError(refusal.what, where=refusal.where, fix=refusal.fix)
            clients = (refusal.client,)
            round_.errors.append(Reply(job=round_.first, clients=clients, error=error, reason=refusal.reason))

    def _close(self, number: int, *, late: bool) -> list[Reply] | None:
        """What is told of a job; None where it was begun again."""
        round_ = self._rounds.pop(self._newest[number])
        mine = concatenate_messages(round_.openings) if round_.openings else None
        nobody = torch.empty(0, dtype=torch.int64)
        client_N, tree, _ = self.inner.join(
            nobody if mine is None else mine.client_C, Tree() if mine is None else Tree(mine.tensors)
        )
        try:
            if not len(client_N):
                raise LichenError("nobody opened the sum", where="masks", fix="let more clients come, or wait longer")
            units_N = round_.closing.total(client_N.tolist(), tree["opening"].numpy())
        except LichenError as error:
            attempt = int(round_.job.settings.get(ATTEMPT, 0)) + 1
            if attempt < self.attempts and not late:
                settings = {**round_.job.settings, ATTEMPT: float(attempt)}
                liars = round_.closing.liars
                clients = tuple(client for client in round_.job.clients if client not in liars)
                again = replace(round_.job, clients=clients, settings=settings)
                self._start(again, number, round_.caught())
                return None
            self._forget(number)
            return [*round_.refusals(()), *round_.given_up(error)]
        self._forget(number)
        survivors = torch.tensor(sorted(round_.closing.survivors), dtype=torch.int64)
        replies = round_.refusals(survivors.tolist())
        if mine is not None and int(client_N[0]) in mine.client_C.tolist():  # of several ranks one hands the sum over
            sum_ = round_.work.form(round_.job).messages(torch.from_numpy(units_N), survivors, round_.job.version)
            replies += (Reply(job=number, clients=tuple(one.client_C.tolist()), message=one) for one in sum_)
        return replies

    def _forget(self, number: int) -> None:
        del self._newest[number]
        self._over.add(number)

    def cancel(self, number: int) -> None:
        """As the inner engine."""
        newest = self._newest.pop(number, number)
        self._rounds.pop(newest, None)
        self._over.discard(number)
        self.inner.cancel(newest)
