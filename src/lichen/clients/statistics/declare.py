"""Clients declare themselves: their names, and how many rows they have, as messages over any engine.

The server asks client 0 first, whose answer also says how many there are, and then everybody. Rows come as numbers,
a name and what else there is to tell as texts. What comes is checked as a roster is (:mod:`lichen.core.roster`).

Legend: C clients.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from lichen.core.collecting.collect import drain
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, MetricSpec
from lichen.core.message import Job, Message
from lichen.core.roster import MOST_MEMBERS, MOST_ROWS, PARTS, Member, Roster
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["Declare", "enrol"]

GROUP = "roster"
MOST_TEXT = 1 << 24
"""Letters of what a client tells beside its rows; more is damage, not data."""

_FIX = "both ends must run the same version of lichen"


@final
@dataclass(frozen=True, slots=True)
class Declare:
    """A client work that sees no batch: each client answers with what it declares.

    Args:
        roster: What the node's clients say, at their numbers.
    """

    roster: Roster

    def expected(self, job: Job) -> Expected:
        """Counts, a name and one more text; :func:`enrol` looks into them."""
        counts = {**dict.fromkeys(PARTS, MetricSpec(0.0, MOST_ROWS)), "clients": MetricSpec(1.0, MOST_MEMBERS)}
        return Expected(group=GROUP, metrics=counts, weight=(0.0, MOST_ROWS), texts=2, letters=MOST_TEXT)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> tuple[Job, tuple[int, ...]]:
        """Who is asked."""
        return job, tuple(clients)

    def step(self, state: tuple[Job, tuple[int, ...]], batch: Batch) -> tuple[Job, tuple[int, ...]]:
        """Rows are counted, not looked at."""
        return state

    def final(self, state: tuple[Job, tuple[int, ...]]) -> tuple[Message, Tree | None]:
        """Rows by part and how many clients there are as metrics, name and the rest as texts."""
        job, clients = state
        members = [self.roster[client] for client in clients]
        metrics = {part: torch.tensor([m.rows.get(part, 0) for m in members], dtype=torch.float64) for part in PARTS}
        message = Message(
            group=GROUP,
            client_C=torch.tensor(clients, dtype=torch.int64),
            version_C=torch.full((len(clients),), job.version, dtype=torch.int64),
            tensors={},
            weight_C=metrics["train"],
            metrics={**metrics, "clients": torch.full((len(clients),), float(len(self.roster)), dtype=torch.float64)},
            texts=tuple((member.name, _rest(member)) for member in members),
        )
        return message, None


def _rest(member: Member) -> str:
    """All but name and rows; empty where there is nothing."""
    rest = {name: x for name, x in member.dump().items() if name not in ("name", "rows")}
    return json.dumps(rest) if rest else ""


def enrol(engine: Engine, *, work: str = "roster") -> Roster:
    """Ask all clients of an engine to declare themselves.

    Args:
        engine: Reaches them; each one's node knows a :class:`Declare` by the name ``work``.
        work: That name.

    Raises:
        LichenError: for a declaration that is damaged or a lie.
    """
    first = _ask(engine, work, (0,))
    count = _whole(first[0][1].get("clients"), "number of clients")
    if not 0 < count <= MOST_MEMBERS:
        raise _wrong(f"says that there are {count:,} clients, and not 1 to {MOST_MEMBERS:,}")
    found = {**first, **(_ask(engine, work, tuple(range(1, count))) if count > 1 else {})}
    for member, metrics in found.values():
        if metrics.get("clients") != count:
            raise _wrong(f"{member.name!r} knows {metrics.get('clients'):g} clients, client 0 knows {count}")
    return Roster(tuple(found[client][0] for client in range(count)))


def _ask(engine: Engine, work: str, clients: tuple[int, ...]) -> dict[int, tuple[Member, Mapping[str, float]]]:
    """What these clients declare, each once."""
    found: dict[int, tuple[Member, Mapping[str, float]]] = {}
    invited = set(clients)
    for message in drain(engine, Job(work=work, shared=Shared(), version=0, clients=clients, seed=0)):
        answering = message.client_C.tolist()
        if message.group != GROUP or len(message.texts) != len(answering):
            raise _wrong(f"a message of group {message.group!r} with {len(message.texts)} names is no declaration")
        for place, client in enumerate(answering):
            if client not in invited or client in found:
                raise _wrong(f"client {client} was not invited, or answers twice")
            metrics = {n: float(x[place]) for n, x in message.metrics.items() if x.dim() == 1}
            found[client] = _member(message.texts[place], metrics), metrics
    if missing := sorted(invited - found.keys()):
        raise _wrong(f"clients {missing[:4]} have not declared themselves")
    return found


def _member(texts: Sequence[str], metrics: Mapping[str, float]) -> Member:
    if len(texts) != 2 or sum(map(len, texts)) > MOST_TEXT:
        raise _wrong("a client declares itself in two texts of bounded length")
    name, rest = texts
    try:
        more: Any = json.loads(rest) if rest else {}
    except (ValueError, RecursionError):
        raise _wrong(f"what {name!r} declares is not JSON") from None
    if not isinstance(more, dict) or more.keys() & {"name", "rows"}:
        raise _wrong(f"what {name!r} declares beside its rows is no mapping, or names them again")
    rows = {part: _whole(metrics.get(part), f"{part} rows of {name!r}") for part in PARTS}
    return Member.load({**more, "name": name, "rows": rows})


def _whole(number: float | None, what: str) -> int:
    if number is None or not number.is_integer():
        raise _wrong(f"the {what} is {number}, and no whole number")
    return int(number)


def _wrong(what: str) -> LichenError:
    return LichenError(what, where="roster", fix=_FIX)
