"""Asks a site's worker what a server's engine asks it, without a transport."""

from __future__ import annotations

import io
from typing import Any

from lichen.core.wire.frames import Frame, read_frame, write_frame
from lichen.engines.remote.requests import FETCH, HAND, Fetched, pack_values, unpack_outcomes, unpack_values
from lichen.engines.remote.worker import SiteWorker

ABOUT = {"session": "one", "recipe": "", "state": ""}


def order(number: int, clients: tuple[int, ...], kind: bytes, body: bytes, **about: str) -> bytes:
    """The body of a question that hands an order over."""
    sink = io.BytesIO()
    write_frame(sink, kind, body)
    values = {"instance": "", **ABOUT, **about, "order": number, "clients": list(clients)}
    return pack_values(values, sink.getvalue())


def hand(worker: SiteWorker, number: int, clients: tuple[int, ...], kind: bytes, body: bytes, **about: str) -> Any:
    """Hand an order over; what is answered."""
    return unpack_values(worker.answer(HAND, order(number, clients, kind, body, **about)))[0]


def fetch(worker: SiteWorker, after: int = 0, wait: float = 0.0, **about: str) -> Fetched:
    """What has come."""
    body = pack_values({**ABOUT, **about, "after": after, "wait": wait})
    return unpack_outcomes(worker.answer(FETCH, body))


def all_of(worker: SiteWorker, **about: str) -> list[tuple[int, int, list[Frame]]]:
    """Order, client and frames of all that comes until the worker has nothing to do."""
    out, after = list[tuple[int, int, list[Frame]]](), 0
    while True:
        fetched = fetch(worker, after, 30.0, **about)
        for one in fetched.outcomes:
            after = one.place
            out.append((one.order, one.client, frames(one.frames)))
        if not fetched.busy:
            fetch(worker, after, **about)  # so that it comes no more
            return out


def frames(data: bytes) -> list[Frame]:
    """The frames in these bytes."""
    source = io.BytesIO(data)
    return list(iter(lambda: read_frame(source), None))
