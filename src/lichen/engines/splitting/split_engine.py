"""Goes around any engine and is the server's half of split learning: its clients hold the two ends of a model.

A job goes out with the tensors that its clients train, and no others. Questions are answered by the middle
(:class:`lichen.engines.splitting.middle.Middle`). To a message that comes back the middle's change is added, so that
algorithm, aggregator and admission see the messages of clients that hold the whole.

``v1``: each client has a copy of the middle's adapter, and the copies become one as the rest of the messages does
(SplitFed v1; with LoRA, SplitLoRA). ``v2``: there is one copy, and clients take turns with it in an order that is drawn
from the job's seed (SplitFed v2); its change is given to each message, once all have had their turn. A client that
fails leaves no trace in that copy.

References: those of :mod:`lichen.clients.splitting.split_train`, and
    Zheng Lin, Yuxin Zhang, Zhe Chen, Zihan Fang, Xianhao Chen, Praneeth Vepakomma, Wei Ni, Jun Luo and Yue Gao.
    "HSplitLoRA: A Heterogeneous Split Parameter-Efficient Fine-Tuning Framework for Large Language Models." 2025.
    https://arxiv.org/abs/2505.02795 (cuts and ranks of unequal clients)

Legend: C clients.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, final

from lichen.clients.splitting.ends import Cut
from lichen.clients.splitting.split_evaluate import SplitEvaluate
from lichen.clients.splitting.split_train import SplitTrain
from lichen.core.collecting.admission import Admission, rows_of
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.fold import BEST
from lichen.core.message import Job, Message
from lichen.core.replies import Reply
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.engines.answering import AnsweringEngine
from lichen.engines.around import ForwardingEngine
from lichen.engines.splitting.joined import joined
from lichen.engines.splitting.middle import Half, Middle
from lichen.engines.turns import Answers

__all__ = ["SplitEngine", "Turns"]

Turns = Literal["v1", "v2"]


@final
@dataclass(slots=True, eq=False)
class _Part:
    """What of a job goes out at once: clients of one cut, or one client whose turn it is.

    Attributes:
        job: As it goes out, with the clients' tensors.
        middle_job: The same with the middle's.
        middle: Answers them.
        halves: By client.
    """

    job: Job
    middle_job: Job
    middle: Middle
    halves: dict[int, Half] = field(default_factory=dict)


@final
@dataclass(slots=True, eq=False)
class _Round:
    """A job of split clients.

    Attributes:
        number: What it is known by.
        job: As it came.
        waiting: Parts that have not gone out.
        running: Those that have, by the inner engine's number.
        counted: Clients whose message has come.
        copy: The one copy of v2, after the last turn.
        messages: Messages that wait for it.
    """

    number: int
    job: Job
    waiting: deque[_Part]
    running: dict[int, _Part] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    copy: Half | None = None
    messages: list[Message] = field(default_factory=list)


@final
class SplitEngine(ForwardingEngine):
    """An engine whose clients hold the ends of a model.

    Args:
        inner: Carries jobs, questions and answers.
        works: Those that cross a cut, by the name a job calls them; all others pass.
        middles: By the name of the work and the cut.
        cut_of: A client to its cut.
        kind: A copy of the middle's adapter for each client, or one for all.
        seen: Called with a work's name, a client and each question's tensors.
        store: Where is kept what has crossed of each client's rows, by version as its own private state.
    """

    def __init__(
        self,
        inner: Engine,
        works: Mapping[str, SplitTrain | SplitEvaluate],
        middles: Callable[[str, Cut], Middle],
        cut_of: Callable[[int], Cut],
        *,
        kind: Turns = "v1",
        seen: Callable[[str, int, Tree], None] = lambda work, client, question: None,
        store: ClientStore | None = None,
    ) -> None:
        answers = Answers(answer=self._answer)
        self.inner: Engine = AnsweringEngine(inner, answers, Admission(works=works))
        self.works, self.middles, self.cut_of, self.kind, self.seen = dict(works), middles, cut_of, kind, seen
        self.store = store
        self._rounds: dict[int, _Round] = {}

    def submit(self, job: Job) -> int:
        """As the inner engine; of a split work the part of the tensors that clients hold goes out."""
        if job.work not in self.works:
            return self.inner.submit(job)
        parts = deque(self._parts(job))
        first = parts.popleft()
        number = self.inner.submit(first.job)
        round_ = self._rounds[number] = _Round(number, job, parts, {number: first})
        if not self._in_turns(job):
            while parts:
                self._next(round_)
        return number

    def _in_turns(self, job: Job) -> bool:
        return self.kind == "v2" and isinstance(self.works[job.work], SplitTrain)

    def _parts(self, job: Job) -> Iterator[_Part]:
        by_cut: dict[Cut, list[int]] = {}
        for client in job.clients:
            by_cut.setdefault(self.cut_of(client), []).append(client)
        groups = [(cut, tuple(clients)) for cut, clients in by_cut.items()]
        if self._in_turns(job):
            order = numpy_generator(job.seed, "turns").permutation(len(job.clients)).tolist()
            groups = [(self.cut_of(job.clients[c]), (job.clients[c],)) for c in order]
        for cut, clients in groups:
            middle = self.middles(job.work, cut)
            ends, inside = Shared(), Shared()
            for name, x in job.shared.trainable.items():
                (inside if name in middle.names else ends).trainable[name] = x
            whole = replace(job, clients=clients)
            yield _Part(replace(whole, shared=ends), replace(whole, shared=inside), middle)

    def _next(self, round_: _Round) -> None:
        """Send the next part out."""
        part = round_.waiting.popleft()
        round_.running[self.inner.submit(part.job)] = part

    def _answer(self, question: Message, job: Job, stage: int) -> Tree:
        """What one client is answered."""
        del stage
        ((round_, part),) = ((r, p) for r in self._rounds.values() for p in r.running.values() if p.job is job)
        if len(question.client_C) != 1:
            raise LichenError("each client is answered by itself", where="split")
        client, work = int(question.client_C[0]), self.works[job.work]
        self.seen(job.work, client, question.tensors)
        if isinstance(work, SplitEvaluate):
            return part.middle.scored(part.middle_job, question.tensors)
        half = part.halves.get(client)
        if half is None:
            half = self._half(round_, part, client)
        part.halves[client], answer = part.middle.answer(half, question.tensors, back=not work.local_head)
        return answer

    def _half(self, round_: _Round, part: _Part, client: int) -> Half:
        """What a client begins with."""
        half = round_.copy or part.middle.start(part.middle_job, part.job, client)
        if not part.middle.form.remembers or self.store is None:
            return half
        if client in part.job.rollback:  # as the client's own
            self.store.roll_back({client: part.job.rollback[client]}, part.job.version)
        return replace(half, memory=self.store.load((client,), part.job.version) or {})

    def _remember(self, half: Half, job: Job, client: int) -> None:
        """Keep what has crossed under the version that the client keeps it under."""
        if half.memory and self.store is not None:
            best = int(job.settings.get(BEST, -1))
            self.store.stage((client,), job.version + 1, half.memory, best=best)

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """Messages of the whole model's tensors, and refusals."""
        while True:
            mine = {n: round_ for n in numbers if (round_ := self._rounds.get(n)) is not None}
            of = {inner: round_ for round_ in mine.values() for inner in round_.running}
            for reply in self.inner.replies([*of, *(n for n in numbers if n not in mine)], until):
                round_ = of.get(reply.job)
                if round_ is None:
                    yield reply
                else:
                    yield from self._came(round_, reply)
            if self.inner.now() >= until:
                return
            again = False
            for round_ in mine.values():
                if round_.waiting:
                    self._next(round_)
                    again = True
                else:
                    yield from self._turned(round_)
            if not again:
                for number in mine:  # nothing of these will come any more
                    self._rounds.pop(number, None)
                return

    def _came(self, round_: _Round, reply: Reply) -> Iterator[Reply]:
        """A client's message with the middle's change in it, or why there is none."""
        part = round_.running[reply.job]
        work = self.works[round_.job.work]
        if reply.message is None or isinstance(work, SplitEvaluate):
            yield replace(reply, job=round_.number)
            return
        message, refusals = Admission().admit(reply, part.job, work.expected(part.job), round_.counted)
        for refusal in refusals:
            error = LichenError(refusal.what, where=refusal.where, fix=refusal.fix)
            yield Reply(job=round_.number, clients=(refusal.client,), error=error, reason=refusal.reason)
        for c, client in enumerate(message.client_C.tolist() if message is not None else ()):
            assert message is not None
            one = rows_of(message, [c])
            half = part.halves.pop(client, None) or self._half(round_, part, client)
            try:
                part.middle.check_over(half)
            except LichenError as error:
                yield Reply(job=round_.number, clients=(client,), error=error, reason=error.reason)
                continue
            self._remember(half, part.job, client)
            whole = joined(one, part.middle.ended(half), round_.job)
            if self.kind == "v2" and not bool(whole.metrics["failed"].any()):
                round_.copy = half
                round_.messages.append(one)
            else:
                yield Reply(job=round_.number, clients=(client,), message=whole)

    def _turned(self, round_: _Round) -> Iterator[Reply]:
        """The messages of v2, once nobody's turn is left."""
        messages, round_.messages = round_.messages, []
        middle = next(iter(round_.running.values())).middle
        for one in sorted(messages, key=lambda message: int(message.client_C[0])):
            assert round_.copy is not None
            whole = joined(one, middle.ended(round_.copy), round_.job)
            yield Reply(job=round_.number, clients=tuple(one.client_C.tolist()), message=whole)

    def cancel(self, number: int) -> None:
        """As the inner engine."""
        round_ = self._rounds.pop(number, None)
        for inner in (number,) if round_ is None else round_.running:
            self.inner.cancel(inner)
