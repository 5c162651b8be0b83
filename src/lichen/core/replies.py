"""What comes back for a job: a message or a refusal, as values, and who of those invited answered.

An engine yields one :class:`Reply` after another. That a client could not do its job is a reply too: it costs that
client the round, and nobody else anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, final

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.visible import clipped, visible

__all__ = ["ATTENDED", "CAUSES", "Attendance", "Receipt", "Refusal", "Reply", "causes_text", "merged"]

CAUSES = {
    "late": "no answer in time",
    "given up": "its job was too old",
    "gone": "its site was not there",
    "silent": "its site was there, and said nothing",
    "declined": "its site would not do it",
    "machine": "its machine refused: memory, disk or rights",
    "failed": "it could not do it",
    "not admitted": "its message was refused",
    "withdrawn": "its site has left the federation",
    "absent": "it never took part",
}
"""Why a client that was asked does not count, a word each, and what the word says."""

JUDGING = "validation: "
"""Before a cause: it did not answer when it was asked to validate."""

LETTERS = 400
"""Of each part of a refusal."""

NAMED = 16
"""Refusals of a round that are told one by one; the rest are counted."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What some clients of a job gave: a message, or why there is none.

    Attributes:
        job: The number that ``submit`` gave.
        clients: Who was asked; where a message claims others, it is refused.
        message: What came; None where ``error`` is set.
        error: Why these clients cannot do it.
        reason: One word for that: ``error`` as the client's own, ``bytes`` where what it sent cannot be read.
        question: The message asks something, and these clients wait until the engine's ``answer`` is called.
    """

    job: int
    clients: tuple[int, ...]
    message: Message | None = None
    error: LichenError | None = None
    reason: str = "error"
    question: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why something that came is not counted.

    Attributes:
        client: Who was asked, or -1 where it cannot be said.
        reason: One word: ``error`` where the client could not do its job, else what was wrong with its message.
        what: The sentence; what it quotes may come from a stranger (:meth:`shown`).
        where: The place that a client's own error names.
        fix: What may help.
        times: How often it came.
        cause: Of :data:`CAUSES`, where the transport or the client knows it; empty: as ``reason`` has it.
    """

    client: int
    reason: str
    what: str
    where: str = ""
    fix: str = ""
    times: int = 1
    cause: str = ""

    @property
    def of_cause(self) -> str:
        """Its cause, of :data:`CAUSES`."""
        if self.cause in CAUSES:
            return self.cause
        return self.reason if self.reason in CAUSES else "failed" if self.reason == "error" else "not admitted"

    def shown(self) -> Refusal:
        """The same, cut short, and with nothing that steers a terminal."""
        what, where, fix = (clipped(visible(text), LETTERS) for text in (self.what, self.where, self.fix))
        return replace(self, what=what, where=where, fix=fix)

    def error(self) -> LichenError:
        """The same as what a user reads."""
        return LichenError(self.what, where=self.where or f"message of client {self.client}", fix=self.fix)


@final
class Receipt(NamedTuple):
    """A message that counted.

    Attributes:
        client: Whose it is.
        version: The version that it was made for.
        weight: What it weighs.
        sha256: Its digest (:mod:`lichen.core.collecting.receipts`), 64 hex digits.
    """

    client: int
    version: int
    weight: float
    sha256: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Attendance:
    """Who answered in a round, and of each other why not.

    Attributes:
        invited: Clients that were asked.
        arrived: Clients whose message counts.
        refused: How many replies were not counted, by reason.
        named: The first of them.
        missing: Clients from whom nothing came that counts, and nothing that was refused, in time.
        receipts: The messages that count, by client; those of validation after those of training.
        causes: Of all who were asked and do not count, the clients by cause (:data:`CAUSES`, in that order), each once
            and ascending; of those asked to validate, by the cause after :data:`JUDGING`.
        order: Clients whose message counts and the version it was made for, as they came; empty where a seed or no
            round depends on it.

    >>> some = Attendance.of([3, 4, 5], [3], [Refusal(client=4, reason="shape", what="w is too long")])
    >>> some.arrived, dict(some.refused), some.missing
    (1, {'shape': 1}, (5,))
    """

    invited: int = 0
    arrived: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    named: tuple[Refusal, ...] = ()
    missing: tuple[int, ...] = ()
    receipts: tuple[Receipt, ...] = ()
    causes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    order: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls,
        invited: Iterable[int],
        arrived: Iterable[int],
        refused: Iterable[Refusal],
        receipts: tuple[Receipt, ...] = (),
        *,
        missing: str = "late",
    ) -> Attendance:
        """From those invited, those that count, the refusals, what counts, and why the others are missing."""
        invited, arrived, refused = tuple(invited), set(arrived), tuple(refused)
        why = {client: missing for client in invited if client not in arrived}
        refused_clients = {refusal.client for refusal in refused}
        why |= {refusal.client: refusal.of_cause for refusal in reversed(refused) if refusal.client in why}
        return cls(
            invited=len(invited),
            arrived=len(arrived),
            refused=dict(sorted(_times(refused).items())),
            named=tuple(refusal.shown() for refusal in refused[:NAMED]),
            missing=tuple(c for c in invited if c not in arrived and c not in refused_clients),
            receipts=receipts,
            causes=_by_cause((cause, client) for client, cause in why.items()),
        )

    @property
    def uncounted(self) -> tuple[int, ...]:
        """Clients that were asked to train and do not count, whatever the cause."""
        return tuple(c for cause, some in self.causes.items() if not cause.startswith(JUDGING) for c in some)

    def judging(self) -> Attendance:
        """The same, of clients that were asked to validate."""
        return replace(self, causes={f"{JUDGING}{cause}": clients for cause, clients in self.causes.items()})

    def __add__(self, other: Attendance) -> Attendance:
        return Attendance(
            invited=self.invited + other.invited,
            arrived=self.arrived + other.arrived,
            refused=dict(sorted((Counter(self.refused) + Counter(other.refused)).items())),
            named=(*self.named, *other.named)[:NAMED],
            missing=tuple(sorted({*self.missing, *other.missing})),
            receipts=(*self.receipts, *other.receipts),
            causes=_by_cause(
                (cause, client) for one in (self, other) for cause, clients in one.causes.items() for client in clients
            ),
            order=(*self.order, *other.order),
        )

    def causes_text(self, names: int = 0) -> str:
        """How many do not count, by cause, in one line; with the first clients of each where ``names`` are wanted.

        >>> Attendance.of([3, 4, 5], [3], [Refusal(client=4, reason="error", what="", cause="gone")]).causes_text(1)
        'late 1 (client 5), gone 1 (client 4)'
        """
        return causes_text(self.causes, names)

    def summary(self) -> str:
        """One line; empty where everybody came and nothing was refused.

        >>> Attendance.of([3, 4, 5], [3], [Refusal(client=4, reason="shape", what="w is too long")]).summary()
        '1 of 3 count; refused: 1 shape; missing: 1'
        """
        if self.arrived == self.invited and not self.refused:
            return ""
        parts = [f"{self.arrived} of {self.invited} count"]
        if self.refused:
            parts.append("refused: " + ", ".join(f"{count} {reason}" for reason, count in self.refused.items()))
        if self.missing:
            parts.append(f"missing: {len(self.missing)}")
        return "; ".join(parts)


def causes_text(causes: Mapping[str, Sequence[int]], names: int = 0) -> str:
    """How many clients each cause has, in one line, and the first of them where ``names`` are wanted."""
    parts = list[str]()
    for cause, clients in causes.items():
        first = ", ".join(str(client) for client in clients[:names])
        more = ", ..." if len(clients) > names else ""
        who = f" (client{'s' * (len(clients) > 1)} {first}{more})" if names else ""
        parts.append(f"{cause} {len(clients)}{who}")
    return ", ".join(parts)


def _by_cause(pairs: Iterable[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    """Clients by cause, those of training before those of validation."""
    found = dict[str, set[int]]()
    for cause, client in pairs:
        found.setdefault(cause, set()).add(client)
    order = [f"{when}{cause}" for when in ("", JUDGING) for cause in CAUSES]
    return {cause: tuple(sorted(found[cause])) for cause in order if cause in found}


def _times(refused: Iterable[Refusal]) -> Counter[str]:
    """How many replies were refused, by reason."""
    times = Counter[str]()
    for refusal in refused:
        times[refusal.reason] += refusal.times
    return times


def merged(refusals: Iterable[Refusal]) -> list[Refusal]:
    """One refusal for each client and reason: a client that floods the server with one fault is told once."""
    out: dict[tuple[int, str], Refusal] = {}
    for refusal in refusals:
        key = refusal.client, refusal.reason
        out[key] = replace(out[key], times=out[key].times + refusal.times) if key in out else refusal
    return list(out.values())


ATTENDED = Attendance()
"""Of a round in which nobody was asked for anything."""
