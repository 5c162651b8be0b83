"""Evaluates a model whose middle lies at the server: each batch crosses once up and once down.

Legend: C = 1, N tokens of all rows, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

from lichen.clients.evaluation.evaluate import Evaluate, measure
from lichen.clients.splitting.asking import HIDDEN, LENGTH, Form, received
from lichen.clients.splitting.crossing import narrow
from lichen.clients.splitting.ends import Ends, entering
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["SplitEvaluate"]

Talk = Generator[Message, Tree, tuple[Message, Tree | None]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SplitEvaluate:
    """An evaluation across two cuts, as a dialogue; its sums are those of the whole model.

    Attributes:
        evaluate: How a client that holds the whole model would evaluate.
        ends: What each client holds.
        form: What crosses.
        batches: Batches of a client, at most.
    """

    evaluate: Evaluate
    ends: Callable[[int], Ends]
    form: Form
    batches: int

    def expected(self, job: Job) -> Expected:
        """The evaluation's."""
        return self.evaluate.expected(job)

    def questions(self, job: Job) -> Sequence[Expected]:
        """One a batch."""
        del job
        return (self.form.expected(HIDDEN, LENGTH),) * self.batches

    def talk(self, job: Job, clients: Sequence[int], own_C: Tree | None, batches: Iterable[Batch]) -> Talk:
        """The sums over the batches.

        Raises:
            LichenError: for several clients, or an answer of another shape.
        """
        state = self.evaluate.init(job, clients, own_C)
        ends = self.ends(clients[0])
        for number, whole in enumerate(batches):
            batch, rows = narrow(whole)
            sent = rows.flat(ends.hidden(state.params_C, batch))
            about = {HIDDEN: sent, LENGTH: rows.length_B[None]}
            answer_C = self.form.decoded((yield self.form.question(job, clients, number, **about)))
            middle = entering(batch, rows.padded(received(answer_C, HIDDEN, sent)))
            more = measure(ends.last, ends.last_params(state.params_C), {}, middle)
            state = replace(state, sums={name: total + more[name] for name, total in state.sums.items()})
        return self.evaluate.final(state)
