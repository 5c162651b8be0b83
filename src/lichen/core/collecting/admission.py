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
``sum``         the aggregator cannot take it
==============  ==========================================================================

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts import ClientWork, Dialogue, Receives
from lichen.core.errors import LichenError
from lichen.core.expected import ANY, Expected, MetricSpec
from lichen.core.message import Job, Message, concatenate_messages
from lichen.core.replies import Refusal, Reply

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
            return None, [
                Refusal(client=client, reason=reply.reason, what=what, where=where, fix=fix) for client in reply.clients
            ]
        fault = _form(reply.message) or (_declared(reply.message, expected) if expected is not None else None)
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
        finite_C = _finite_C(message, weights, single)
        low, high = (0.0, math.inf) if expected is None else expected.weight
        metrics = {name: x.double() for name, x in message.metrics.items()}
        specs = {} if expected is None else expected.metrics
        ranges_C = _out_of_range_C(metrics, single, specs, len(clients))
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
                        tops[name] = single.get(name) or _tops(metrics.get(name), len(clients))
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
        faults_C = _finite_C(whole)
        if not any(faults_C):
            return whole, []
    except LichenError:
        pass
    good, refusals = list[Message](), list[Refusal]()
    for c, client in enumerate(message.client_C.tolist()):
        try:
            one = work.received(rows_of(message, [c]), job)
        except LichenError as error:
            refusals.append(Refusal(client=client, reason="code", what=error.what, where=error.where, fix=error.fix))
            continue
        if fault := _finite_C(one)[0]:
            what = f"{fault} has a number that is not finite once it is decoded"
            refusals.append(Refusal(client=client, reason="finite", what=what))
        else:
            good.append(one)
    return (concatenate_messages(good) if good else None), refusals


def rows_of(message: Message, positions: Sequence[int]) -> Message:
    """The clients at these positions of a stacked message.

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


def _tops(x_C: Tensor | None, count: int) -> list[float]:
    """The largest number of each client in a metric; nothing is larger than that of one it lacks."""
    if x_C is None or not x_C.numel():
        return [-math.inf] * count
    tops: list[float] = (x_C if x_C.dim() == 1 else x_C.reshape(count, -1).amax(1)).tolist()
    return tops


def _form(message: Message) -> tuple[str, str] | None:
    """What is wrong with a message that is to be stacked by client, whatever its work."""
    ids = (("client", message.client_C), ("version", message.version_C), ("weight", message.weight_C))
    count = message.client_C.shape[0] if message.client_C.dim() == 1 else -1
    for name, x in ids:
        if x.dim() != 1 or x.shape[0] != count or count < 1:
            return "form", f"{name}s of shape {tuple(x.shape)} are no list of {max(count, 1)} clients"
        if x.is_complex() or (name != "weight" and x.dtype != torch.int64):
            return "dtype", f"{name}s come as {x.dtype}"
    for kind, tree in (("tensor", message.tensors), ("metric", message.metrics)):
        for name, x in tree.items():
            if x.dim() == 0 or x.shape[0] != count:
                return "form", f"{kind} {name!r} of shape {tuple(x.shape)} is not stacked for {count} clients"
            if x.is_complex():
                return "dtype", f"{kind} {name!r} comes as {x.dtype}"
    if message.texts and len(message.texts) != count:
        return "form", f"texts of {len(message.texts)} clients beside {count}"
    return None


def _declared(message: Message, expected: Expected) -> tuple[str, str] | None:
    """What a message has otherwise than its work declares."""
    if message.group != expected.group:
        return "group", f"is of group {message.group!r}, not {expected.group!r}"
    extra, missing = message.tensors.keys() - expected.tensors.keys(), expected.tensors.keys() - message.tensors.keys()
    if extra or missing - expected.optional:
        what = f"brings tensor {min(extra)!r}" if extra else f"lacks tensor {min(missing - expected.optional)!r}"
        return "names", f"{what}, which is not as the job says" if extra else what
    for name, x in message.tensors.items():
        spec = expected.tensors[name]
        if x.dtype != spec.dtype:
            return "dtype", f"tensor {name!r} comes as {x.dtype}, not {spec.dtype}"
        if not spec.fits(x):
            shape = tuple("any" if n == ANY else n for n in spec.shape)
            return "shape", f"tensor {name!r} has shape {tuple(x.shape[1:])}, not {shape}"
    if sum(x[0].numel() for x in message.tensors.values()) > expected.numbers:
        return "shape", f"brings more than {expected.numbers:,} numbers"
    if message.metrics.keys() != expected.metrics.keys():
        other = min(message.metrics.keys() ^ expected.metrics.keys())
        return "names", f"{'brings' if other in message.metrics else 'lacks'} metric {other!r}"
    for name, x in message.metrics.items():
        if x.dtype != torch.float64:
            return "dtype", f"metric {name!r} comes as {x.dtype}"
        if tuple(x.shape[1:]) != expected.metrics[name].shape:
            return "shape", f"metric {name!r} has shape {tuple(x.shape[1:])}, not {expected.metrics[name].shape}"
    for texts in message.texts:
        if len(texts) > expected.texts or sum(map(len, texts)) > expected.letters:
            most = f"{expected.texts:,} texts of {expected.letters:,} letters in all"
            return "texts", f"brings {len(texts):,} texts of {sum(map(len, texts)):,} letters, not {most} at most"
    return None


def _finite_C(message: Message, weights: Sequence[float], single: Mapping[str, Sequence[float]]) -> list[str]:
    """By client: what of its message is not finite, or nothing."""
    out = [""] * message.client_C.shape[0]
    numbers = [("the weight", weights), *((f"metric {name!r}", values) for name, values in single.items())]
    for name, values in numbers:
        if not all(map(math.isfinite, values)):
            for c, value in enumerate(values):
                out[c] = out[c] or ("" if math.isfinite(value) else name)
    parts = [(f"metric {name!r}", x) for name, x in message.metrics.items() if name not in single]
    parts += [(f"tensor {name!r}", x) for name, x in message.tensors.items()]
    for name, x in parts:
        if not x.is_floating_point() or not x.numel():
            continue
        low_C, high_C = x.detach().reshape(x.shape[0], -1).aminmax(dim=1)  # a number that is none is both
        finite_C = low_C.isfinite() & high_C.isfinite()
        if not bool(finite_C.all()):
            for c in (~finite_C).nonzero().flatten().tolist():
                out[c] = out[c] or name
    return out


def _out_of_range_C(
    metrics: Mapping[str, Tensor], single: Mapping[str, Sequence[float]], specs: Mapping[str, MetricSpec], count: int
) -> list[str]:
    """By client: which metric is out of its range, or nothing."""
    out = [""] * count
    for name, spec in specs.items():
        if name not in metrics or (spec.low, spec.high) == (-math.inf, math.inf) or not metrics[name].numel():
            continue
        per_C = [max(value, 1.0) for value in _tops(metrics[spec.per], count)] if spec.per in metrics else None
        low_C = high_C = single.get(name, ())
        if name not in single:
            ends = metrics[name].reshape(count, -1).aminmax(dim=1)
            low_C, high_C = ends.min.tolist(), ends.max.tolist()
        for c, (low, high) in enumerate(zip(low_C, high_C, strict=True)):
            if per_C is not None:
                low, high = low / per_C[c], high / per_C[c]
            if not (low >= spec.low and high <= spec.high):
                value = low if not low >= spec.low else high
                per = f" of each {spec.per}" if spec.per else ""
                out[c] = out[c] or f"{name} is {value:g}{per}, not {spec.low:g} to {spec.high:g}"
    return out
