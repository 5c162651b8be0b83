"""Goes around any engine and answers what clients ask within a job, so that only messages and refusals come back.

A question is answered at once, or when all clients of its job who are still there have asked as much. In both forms
the answer is a function of questions stacked by client, so that the order in which they come changes nothing. Where
all are answered at a time the ranks of a run meet: each computes the same answer from everybody's questions. Where each
is answered at once, a rank answers its own clients.

What clients may ask is declared by their work. A question that is not so, out of turn, or one too many costs its client
the round and nobody else anything: it is refused by name, as a message would be. Who does not ask in time is missing.

Legend: C clients, N clients of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import final

import torch

from lichen.core.collecting.admission import Admission, rows_of
from lichen.core.contracts.client import Dialogue
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message
from lichen.core.replies import Refusal, Reply
from lichen.core.tree import Tree
from lichen.engines.around import ForwardingEngine
from lichen.engines.turns import Answers, Turns, join_questions, stacks

__all__ = ["AnsweringEngine"]

MISSING = Refusal(client=-1, reason="form", what="is not in the question that came for it")


@final
class AnsweringEngine(ForwardingEngine):
    """An engine whose clients' questions are answered.

    Args:
        inner: Carries jobs, questions and answers.
        answers: What clients are answered.
        admission: Knows the works, and so what may be asked.
    """

    def __init__(self, inner: Engine, answers: Answers, admission: Admission) -> None:
        self.inner, self.answers, self.admission = inner, answers, admission
        self._turns: dict[int, Turns] = {}
        self._sent = 0

    def submit(self, job: Job) -> int:
        """As the inner engine.

        Raises:
            LichenError: if all are to be answered at a time and their questions do not stack.
        """
        work = self.admission.works.get(job.work)
        questions = tuple(work.questions(job)) if isinstance(work, Dialogue) else ()
        if not self.answers.at_once and not all(map(stacks, questions)):
            raise LichenError(
                "questions with texts, open lengths or optional tensors do not stack",
                where=f"work {job.work!r}",
                fix="declare their shapes, or answer each at once",
            )
        number = self.inner.submit(job)
        self._turns[number] = Turns(job, questions)
        return number

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """Messages and refusals; questions are answered on the way."""
        asking = sorted(n for n in numbers if n in self._turns and self._turns[n].questions)
        meeting = bool(asking) and not self.answers.at_once
        while True:
            before, end = self._sent, min(until, self.now() + self.answers.patience) if meeting else until
            for reply in self.inner.replies(numbers, end):
                turns = self._turns.get(reply.job)
                if turns is None:
                    yield reply
                else:
                    yield from self._question(reply, turns) if reply.question else self._end(reply, turns)
            if meeting:
                answered, refused = self._answer_all(asking, over=self.now() >= until)
                yield from refused
            # Some engines go on with those that were answered, others end and are called again.
            if not (answered if meeting else self._sent > before):
                return

    def _question(self, reply: Reply, turns: Turns) -> Iterator[Reply]:
        """Answer a question now or later; yield refusals."""
        clients = [client for client in reply.clients if client not in turns.dismissed]
        if not clients:
            self.inner.answer(reply.job, reply.clients, None)
            return
        stages = {turns.count.get(client, 0) for client in clients}
        stage, most = max(stages, default=0), len(turns.questions)
        if turns.open & set(clients) or len(stages) > 1:
            yield from self._refused(reply.job, clients, "asks again before it was answered")
        elif turns.done & set(clients):
            yield from self._refused(reply.job, clients, "asks after its message")
        elif stage >= most:
            yield from self._refused(reply.job, clients, f"asks {stage + 1} times, its work at most {most} times")
        else:
            plain = replace(reply, question=False)
            message, refusals = self.admission.admit(plain, turns.job, turns.questions[stage], set(turns.dismissed))
            admitted = [] if message is None else message.client_C.tolist()
            for client in clients:
                if client not in admitted:
                    named = next((r for r in refusals if r.client == client), *refusals[:1] or (MISSING,))
                    yield from self._refused(reply.job, [client], named.what, named.reason)
            if message is not None:
                turns.open.update(admitted)
                if self.answers.at_once:
                    yield from self._answer_now(reply.job, message, stage)
                else:
                    turns.pending.append(message)

    def _answer_now(self, number: int, question: Message, stage: int) -> Iterator[Reply]:
        """Answer a block; where that fails, each client of it alone."""
        turns, clients = self._turns[number], question.client_C.tolist()
        try:
            answer_C = self.answers.answer(question, turns.job, stage)
        except LichenError as error:
            if len(clients) == 1:
                yield from self._refused(number, clients, error.what, error.reason or "turn")
            else:
                for c in range(len(clients)):
                    yield from self._answer_now(number, rows_of(question, [c]), stage)
            return
        self._send(number, clients, answer_C)

    def _answer_all(self, numbers: Sequence[int], *, over: bool) -> tuple[bool, list[Reply]]:
        """Answer what is asked on all ranks: ``(whether that is anything, refusals)``; nothing where time is over."""
        some, refused = False, list[Reply]()
        for number in numbers:
            turns = self._turns[number]
            mine, turns.pending = [] if over else turns.pending, []
            self._dismiss(number, turns.absent())
            question = join_questions(self.inner, mine, turns)
            if question is None:
                continue
            some, clients = True, [client for message in mine for client in message.client_C.tolist()]
            try:
                answer_N = self.answers.answer(question, turns.job, turns.stage)
            except LichenError as error:
                refused += self._refused(number, clients, error.what)
                continue
            turns.stage += 1
            if clients:
                place_C = torch.searchsorted(question.client_C, torch.tensor(clients))
                self._send(number, clients, {name: x_N[place_C] for name, x_N in answer_N.items()})
        return some, refused

    def _send(self, number: int, clients: Sequence[int], answer_C: Tree) -> None:
        for name, x_C in answer_C.items():
            if x_C.dim() == 0 or x_C.shape[0] != len(clients):
                shape = tuple(x_C.shape)
                raise LichenError(
                    f"{name!r} of shape {shape} is not stacked for {len(clients)} clients", where="answer"
                )
        self._sent += 1
        self._turns[number].answered(clients)
        self.inner.answer(number, clients, answer_C)

    def _end(self, reply: Reply, turns: Turns) -> Iterator[Reply]:
        """A message or an error, if its turn is right."""
        gone = [client for client in reply.clients if client in turns.dismissed]
        rest = [c for c, client in enumerate(reply.clients) if client not in turns.dismissed]
        if gone:
            if not rest or reply.message is None or len(reply.message.client_C) != len(reply.clients):
                return
            clients = tuple(reply.clients[c] for c in rest)
            reply = replace(reply, clients=clients, message=rows_of(reply.message, rest))
        clients, most = reply.clients, len(turns.questions)
        fewest = min((turns.count.get(client, 0) for client in clients), default=most)
        if reply.message is not None and turns.open & set(clients):
            yield from self._refused(reply.job, clients, "comes to its end before it was answered")
        elif reply.message is not None and not self.answers.at_once and fewest < most:
            yield from self._refused(reply.job, clients, f"comes to its end after {fewest} of {most} questions")
        else:
            if turns.open & set(clients):
                self._dismiss(reply.job, clients)
            turns.done.update(clients)
            yield reply

    def _refused(self, number: int, clients: Sequence[int], what: str, reason: str = "turn") -> Iterator[Reply]:
        self._dismiss(number, clients)
        for client in clients:
            yield Reply(job=number, clients=(client,), error=LichenError(what), reason=reason)

    def _dismiss(self, number: int, clients: Sequence[int]) -> None:
        """Listen to clients no more."""
        if clients:
            self._turns[number].dismiss(clients)
            self.inner.answer(number, clients, None)

    def cancel(self, number: int) -> None:
        """As the inner engine."""
        self._turns.pop(number, None)
        self.inner.cancel(number)
