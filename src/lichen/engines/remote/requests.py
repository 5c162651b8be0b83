"""What is asked of a site and what it answers, as bytes: a few named values, and what goes with them.

==========  ========================================================  =====================================
kind        values                                                    payload
==========  ========================================================  =====================================
``hand``    ``order``, ``clients``, ``instance``, ``invited``,        one frame: a job, or a client's answer
            ``needed``, those of a fetch
``fetch``   ``after``, ``wait``                                       none
``cancel``  ``order``                                                 none
==========  ========================================================  =====================================

Each also has ``session``, the server's process and engine; ``recipe``, the digest of what both ends must have; and
``state``, the name of the private state that it is for. Each may be asked twice, and is done once: an order by its
number, a fetch by the place after which outcomes are missing. The site answers with its ``instance`` and ``ok``, which
is false where a ``hand`` meant another instance, which held what the job goes on from. A ``hand`` names the oldest
version that is ``needed`` where jobs for older tensors than its own are in flight: their answers stay on the disk.

A ``fetch`` is answered with ``outcomes``, a list of ``[place, order, client, bytes]`` whose frames are the payload, one
after another, with ``busy``, whether more will come, and with ``work``, what the site is doing for anybody. So is a
``hand`` that names
``after``, ``wait`` and ``of``, the instance whose places are counted: of a quick job a server asks once. Nothing here
needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from lichen.core.errors import LichenError

__all__ = [
    "CANCEL",
    "FETCH",
    "HAND",
    "Fetched",
    "Outcome",
    "Request",
    "Work",
    "pack_outcomes",
    "pack_values",
    "unpack_outcomes",
    "unpack_values",
]

HAND, FETCH, CANCEL = "hand", "fetch", "cancel"

MOST_HEAD = 1 << 24
"""Bytes of the values: the clients of a job are among them."""


@final
@dataclass(frozen=True, slots=True)
class Request:
    """Who asks: what every question names.

    Attributes:
        session: Of the server's engine; a new one takes the place of that before it, of the same state.
        recipe: Digest of the recipe; empty: not compared.
        state: Name of the private state that it is for; empty where there is one.
    """

    session: str
    recipe: str
    state: str


@final
class Work(NamedTuple):
    """What a site is doing.

    Attributes:
        order: The order that it is at; -1: none.
        client: The client that is trained.
        place: Which of the order's clients that is, from 1.
        clients: How many the order has.
        waiting: How many orders wait behind it.
    """

    order: int = -1
    client: int = -1
    place: int = 0
    clients: int = 0
    waiting: int = 0

    def __str__(self) -> str:
        if self.order < 0:
            return f"has {self.waiting} jobs to begin" if self.waiting else "has nothing to do"
        return f"is at work on job {self.order}, client {self.place} of {self.clients}"


@final
class Outcome(NamedTuple):
    """What came of a client's order: frames.

    Attributes:
        place: Outcomes of a session are counted from 1.
        order: The order's number.
        client: Whose.
        frames: A question, or messages and their end, or an error.
    """

    place: int
    order: int
    client: int
    frames: bytes


def pack_values(values: Mapping[str, Any], *payload: bytes) -> bytes:
    """Values and what goes with them."""
    head = json.dumps(values, separators=(",", ":")).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *payload])


def unpack_values(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Undo :func:`pack_values`.

    Raises:
        LichenError: if it is something else.
    """
    length = int.from_bytes(data[:4], "little")
    try:
        if len(data) < 4 + length or length > MOST_HEAD:
            raise ValueError("it has no head")
        values = json.loads(data[4 : 4 + length])
        if not isinstance(values, dict):
            raise ValueError("it has no names")
    except (ValueError, RecursionError) as error:
        raise _nonsense(f"{len(data)} bytes are no request: {error}") from None
    return values, memoryview(data)[4 + length :]


@final
@dataclass(frozen=True, slots=True)
class Fetched:
    """What a site answers to a fetch.

    Attributes:
        instance: The site's.
        outcomes: What came of orders, the oldest first.
        busy: Whether more will come.
        work: What the site is doing.
    """

    instance: str
    outcomes: tuple[Outcome, ...]
    busy: bool
    work: Work


def pack_outcomes(fetched: Fetched) -> bytes:
    """Its bytes."""
    rows = [[one.place, one.order, one.client, len(one.frames)] for one in fetched.outcomes]
    values = {"instance": fetched.instance, "ok": True, "outcomes": rows, "busy": fetched.busy}
    return pack_values({**values, "work": list(fetched.work)}, *(one.frames for one in fetched.outcomes))


def unpack_outcomes(data: bytes) -> Fetched:
    """Undo :func:`pack_outcomes`.

    Raises:
        LichenError: if it is something else.
    """
    values, payload = unpack_values(data)
    outcomes, at = list[Outcome](), 0
    try:
        for place, order, client, length in values["outcomes"]:
            if not all(isinstance(x, int) and x >= 0 for x in (place, order, client, length)):
                raise ValueError("a number is none")
            outcomes.append(Outcome(place, order, client, bytes(payload[at : at + length])))
            at += length
        if at != len(payload):
            raise ValueError(f"{len(payload)} bytes came, {at} are announced")
        work = Work(*(int(x) for x in values["work"]))
        return Fetched(str(values["instance"]), tuple(outcomes), bool(values["busy"]), work)
    except (ValueError, TypeError, KeyError) as error:
        raise _nonsense(f"what was fetched cannot be read: {error}") from None


def _nonsense(what: str) -> LichenError:
    return LichenError(what, where="site", fix="both ends must run the same version of lichen")
