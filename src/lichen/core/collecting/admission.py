"""Decides which replies to a job count: by the job, by what its work declares, and by what the roster allows.

Nothing is ever held against another client's message, so the first one that comes decides nothing. What is not
admitted is named: the client, one word for the reason, and a sentence.

==============  ==========================================================================
reason          what was wrong
==============  ==========================================================================
``error``       the client could not do its job, and said so
``bytes``       what came cannot be read
``form``        the message is not stacked by client, or its parts are of unequal length
``uninvited``   a client that the job does not name, or another than was asked
``turn``        a question that nobody answers, one too many, or a message before its turn
``twice``       the client has been counted for this job already
``version``     made for another version than the job's
``group``       another model, rank or vocabulary
``names``       a tensor or metric too many or too few
``shape``       a tensor or metric of another shape or size
``dtype``       a tensor or metric of another dtype
``texts``       more texts or letters than the work declares
``finite``      a number that is none
``weight``      a weight below 0, or above what the client can have
``metric``      a metric out of its range
``code``        it cannot be decoded, or another transform cannot be undone
``norm``        its norm is far above that of the messages before it
``sum``         the aggregator cannot take it
==============  ==========================================================================

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from lichen.core.collecting.checks import declared_fault, form_fault, not_finite_C, out_of_range_C, tops_C
from lichen.core.contracts.client import ClientWork, Dialogue, Receives
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message, concatenate_messages
from lichen.core.replies import CAUSES, Refusal, Reply

__all__ = ["OPEN", "Admission", "Limits", "rows_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one client can bring to one task, as far as the roster tells.

    Attributes:
        weight: The most it can weigh.
        metrics: The most that a metric of it can be, by the metric's name.
    """

    weight: float = math.inf
    metrics: Mapping[str, float] = field(default_factory=dict)


def no_limits(task: str, client: int) -> Limits:
    """Any client may bring anything."""
    return Limits()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What the server knows of honest messages.

    Attributes:
        works: Client works by the name a job calls them; of others only the job itself is known.
        limits: ``(task, client)`` to what that client can bring.
    """

    works: Mapping[str, ClientWork | Dialogue] = field(default_factory=dict)
    limits: Callable[[str, int], Limits] = no_limits

    def expected(self, job: Job) -> Expected | None:
        """What messages to a job must be; None where its work is not known here."""
        work = self.works.get(job.work)
        return None if work is None else work.expected(job)

    def admit(
        self,
        reply: Reply,
        job: Job,
        expected: Expected | None,
        counted: set[int],
        *,
        invited: Collection[int] | None = None,
    ) -> tuple[Message | None, list[Refusal]]:
        """What of a reply counts, and why the rest does not.

        Args:
            reply: As it came.
            job: What was asked.
            expected: :meth:`expected` of the job.
            counted: Clients whose message counts already; those admitted now are added.
            invited: The job's clients as a set, made once for all replies; None: it is made here.
        """
        if reply.question:
            return None, [
                Refusal(client=client, reason="turn", what="asks back, and nobody answers") for client in reply.clients
            ]
        if reply.message is None:
            what, where, fix = ("nothing came", "", "")
            if reply.error is not None:
                what, where, fix = reply.error.what, reply.error.where, reply.error.fix
            cause = reply.error.reason if reply.error is not None and reply.error.reason in CAUSES else ""
            return None, [
                Refusal(client=client, reason=reply.reason, what=what, where=where, fix=fix, cause=cause)
                for client in reply.clients
            ]
        fault = form_fault(reply.message) or (declared_fault(reply.message, expected) if expected is not None else None)
        if fault is not None:
            return None, [Refusal(client=client, reason=fault[0], what=fault[1]) for client in reply.clients or (-1,)]
        message = reply.message
        faults_C = self._faults(
            message, reply, job, expected, counted, set(job.clients) if invited is None else invited
        )
        claimed = message.client_C.tolist()
        named = reply.clients if len(reply.clients) == len(claimed) else (None,) * len(claimed)
        refusals = [
            Refusal(client=claimed[c] if named[c] is None else named[c], reason=fault[0], what=fault[1])  # type: ignore[arg-type]
            for c, fault in enumerate(faults_C)
            if fault is not None
        ]
        good = [c for c, fault in enumerate(faults_C) if fault is None]
        arrived = message if len(good) == len(claimed) else rows_of(message, good) if good else None
        work = self.works.get(job.work)
        if arrived is not None and isinstance(work, Receives):
            arrived, others = _received(work, arrived, job)
            refusals += others
        if arrived is not None:
            counted.update(arrived.client_C.tolist())
        return arrived, refusals

    def _faults(
        self,
        message: Message,
        reply: Reply,
        job: Job,
        expected: Expected | None,
        counted: set[int],
        invited: Collection[int],
    ) -> list[tuple[str, str] | None]:
        """The first fault of each client of a stacked message."""
        clients, versions, weights = message.client_C.tolist(), message.version_C.tolist(), message.weight_C.tolist()
        addressed, here = set(reply.clients), set[int]()
        # Numbers of one client each are looked at as lists, which costs less than a tensor's operations.
        single = {name: x.tolist() for name, x in message.metrics.items() if x.dim() == 1}
        finite_C = not_finite_C(message, weights, single)
        low, high = (0.0, math.inf) if expected is None else expected.weight
        metrics = {name: x.double() for name, x in message.metrics.items()}
        specs = {} if expected is None else expected.metrics
        ranges_C = out_of_range_C(metrics, single, specs, len(clients))
        tops: dict[str, list[float]] = {}
        out: list[tuple[str, str] | None] = []
        for c, client in enumerate(clients):
            fault = None
            limits = self.limits(job.work, client) if client in invited else Limits()
            if client not in invited or (addressed and client not in addressed):
                fault = "uninvited", f"came in the name of client {client}, who was not asked"
            elif client in counted or client in here:
                fault = "twice", "was counted for this job already"
            elif versions[c] != job.version:
                fault = "version", f"was made for version {versions[c]}, the job's is {job.version}"
            elif finite_C[c]:
                fault = "finite", f"{finite_C[c]} has a number that is not finite"
            elif not low <= weights[c] <= high:
                fault = "weight", f"weighs {weights[c]:g}, the work allows {low:g} to {high:g}"
            elif weights[c] > limits.weight:
                fault = "weight", f"weighs {weights[c]:g}, this client can weigh {limits.weight:g} at most"
            elif ranges_C[c]:
                fault = "metric", ranges_C[c]
            else:
                for name, most in limits.metrics.items():
                    if name not in tops:
                        tops[name] = single.get(name) or tops_C(metrics.get(name), len(clients))
                    if tops[name][c] > most:
                        fault = "metric", f"{name} is {tops[name][c]:g}, this client can have {most:g} at most"
                        break
            if fault is None:
                here.add(client)
            out.append(fault)
        return out


OPEN = Admission()
"""For works that nothing is known of: what a message must be as an answer to its job is all that is asked."""


def _received(work: Receives, message: Message, job: Job) -> tuple[Message | None, list[Refusal]]:
    """A message as its work's transforms leave it; where a stack cannot be undone, each client is tried alone."""
    try:
        whole = work.received(message, job)
        faults_C = not_finite_C(replace(whole, metrics={}), (), {})
        if not any(faults_C):
            return whole, []
    except LichenError:
        pass
    good, refusals = list[Message](), list[Refusal]()
    for c, client in enumerate(message.client_C.tolist()):
        try:
            one = work.received(rows_of(message, [c]), job)
        except LichenError as error:
            reason = error.reason or "code"
            refusals.append(Refusal(client=client, reason=reason, what=error.what, where=error.where, fix=error.fix))
            continue
        if fault := not_finite_C(replace(one, metrics={}), (), {})[0]:
            what = f"{fault} has a number that is not finite once it is decoded"
            refusals.append(Refusal(client=client, reason="finite", what=what))
        else:
            good.append(one)
    return (concatenate_messages(good) if good else None), refusals


def rows_of(message: Message, positions: Sequence[int]) -> Message:
    """The clients at these positions of a stacked message.

    >>> import torch
    >>> message = Message(group="", client_C=torch.arange(3), version_C=torch.zeros(3, dtype=torch.int64),
    ...                   tensors={}, weight_C=torch.ones(3))
    >>> rows_of(message, [0, 2]).client_C
    tensor([0, 2])
    """
    at = list(positions)
    return replace(
        message,
        client_C=message.client_C[at],
        version_C=message.version_C[at],
        weight_C=message.weight_C[at],
        tensors={name: x[at] for name, x in message.tensors.items()},
        metrics={name: x[at] for name, x in message.metrics.items()},
        texts=tuple(message.texts[c] for c in at) if message.texts else (),
    )
