"""The server's end of one site: the thread that hands orders over and fetches what came of them.

One thing is asked after another. A site that is gone or silent is asked again as long as patience lasts; one that was
started again is handed over what had not come back, whole, as it holds no view any more. What a client was asking then
is lost with the old instance.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

from lichen.core.errors import LichenError
from lichen.core.message import pack_job, sizes
from lichen.core.wire.answer import pack_answer
from lichen.core.wire.frames import frame_head
from lichen.engines.remote.errands import SAME, Arrived, Cancel, Errand, Followup, Item, Patience
from lichen.engines.remote.pieces import ask_long
from lichen.engines.remote.requests import (
    CANCEL,
    FETCH,
    HAND,
    Fetched,
    Request,
    Work,
    pack_values,
    unpack_outcomes,
    unpack_values,
)
from lichen.engines.sites import SiteError, Sites

__all__ = ["Line"]

_WAIT = 0.5
"""Seconds that a fetch waits at the site for something to come."""

_ENDS = 5
"""Ends of a site's process with one job, after which it is not handed that again: it may be the job that ends it."""

_PAUSES = (0.05, 2.0)
"""Seconds between two tries at a site that is gone: the first time, and at most."""


@final
@dataclass(slots=True, eq=False)
class _Open:
    """An order that the site has, and its clients."""

    errand: Errand
    clients: set[int]
    followup: bool = False


@final
class Line:
    """What talks with one site.

    Args:
        sites: The transport.
        site: Its name.
        request: Who asks.
        arrived: Where what comes is put.
        restarted: Called, in this line's thread, where another instance of the site answers than before.
        again: Called with the bytes of a job that is handed over once more.
        orders: Gives every order its number.
        patience: How long the site is waited for.

    Attributes:
        instance: Which one of the site answered last.
    """

    def __init__(
        self,
        sites: Sites,
        site: str,
        request: Request,
        *,
        arrived: Arrived,
        restarted: Callable[[], None],
        again: Callable[[int], None],
        orders: itertools.count[int],
        patience: Patience,
    ) -> None:
        self.sites, self.site, self.request, self.patience = sites, site, request, patience
        self.arrived, self.restarted, self.again, self.orders = arrived, restarted, again, orders
        self.instance, self.work = "", Work()
        self._ticks = itertools.count()
        self._items: queue.PriorityQueue[tuple[int, int, Item | None]] = queue.PriorityQueue()
        self._open: dict[int, _Open] = {}
        self._cancelled: set[int] = set()
        self._after, self._trouble = 0, 0.0
        self._pause = _PAUSES[0]
        self._closed = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def put(self, item: Item) -> None:
        """Answers go before orders, so that what is open comes to its end."""
        self._items.put((1 if isinstance(item, Errand) else 0, next(self._ticks), item))

    def close(self) -> None:
        """Ask nothing any more."""
        self._closed.set()
        self._items.put((-1, next(self._ticks), None))

    def _run(self) -> None:
        while not self._closed.is_set():
            item: Item | None = None
            try:
                expecting = any(one.clients for one in self._open.values())
                item = self._items.get_nowait()[2] if expecting else self._items.get()[2]
            except queue.Empty:
                pass
            if self._closed.is_set():
                return
            try:
                self._fetch() if item is None else self._do(item)
                self._trouble, self._pause = 0.0, _PAUSES[0]
            except SiteError as error:
                self._failed(item, error)

    def _ask(self, kind: str, values: Mapping[str, object], *payload: bytes, wait: float = 0.0) -> bytes:
        about = {"session": self.request.session, "recipe": self.request.recipe, "state": self.request.state}
        body = pack_values({**about, **values}, *payload)
        return ask_long(self.sites, self.site, kind, body, self.patience.within + wait)

    # --- what is asked -----------------------------------------------------------------------------------------------

    def _do(self, item: Item) -> None:
        if isinstance(item, Cancel):
            self._cancel(item.number)
        elif isinstance(item, Errand):
            if item.number not in self._cancelled and item.pending:
                self._hand(item)
        else:
            self._answer(item)

    def _answer(self, item: Followup) -> None:
        body, waits = pack_answer(item.errand.order, item.answer), item.answer is not None
        there = self._hand_over(item.order, (item.client,), b"A", body, item.errand.instance, waits=waits)
        if there is not None and waits:
            self._open[item.order] = _Open(item.errand, {item.client}, followup=True)
            self._take(there)
        elif waits:
            self.arrived.put((item.errand, item.client, _replaced()))

    def _hand(self, errand: Errand) -> None:
        there = self._hand_over(
            errand.order,
            errand.job.clients,
            b"J",
            pack_job(errand.job),
            errand.relies,
            waits=True,
            invited=errand.invited,
            needed=errand.needed,
        )
        if there is not None:
            errand.instance = self.instance
            self._open[errand.order] = _Open(errand, errand.pending)
            self._take(there)
        else:
            self._once_more(errand, errand.ends)

    def _hand_over(
        self,
        order: int,
        clients: tuple[int, ...],
        kind: bytes,
        body: bytes,
        instance: str,
        *,
        waits: bool,
        invited: int = 0,
        needed: int | None = None,
    ) -> Fetched | None:
        """What came of the site's orders so far, if it is waited for; None where another instance was meant."""
        wait = _WAIT if waits and self._items.empty() else 0.0
        values: dict[str, object] = {"order": order, "clients": list(clients), "instance": instance, "invited": invited}
        values |= {} if needed is None else {"needed": needed}
        values |= {"after": self._after, "of": self.instance, "wait": wait}
        answer = self._ask(HAND, values, frame_head(kind, len(body)), body, wait=wait)
        try:
            known = unpack_values(answer)[0]
            fetched = unpack_outcomes(answer) if known["ok"] else None
            now = str(known["instance"])
        except (LichenError, KeyError):
            what = LichenError("answered what it was handed with something else", where="node", fix=SAME)
            raise SiteError(self.site, "failed", what) from None
        self._now(now)
        return fetched

    def _fetch(self) -> None:
        data = self._ask(FETCH, {"after": self._after, "wait": _WAIT}, wait=_WAIT)
        try:
            fetched = unpack_outcomes(data)
        except LichenError as error:
            raise SiteError(self.site, "failed", error) from None
        if not self._now(fetched.instance):
            self._take(fetched)

    def _take(self, fetched: Fetched) -> None:
        self.work = fetched.work
        for outcome in fetched.outcomes:
            if outcome.place > self._after:
                self._after = outcome.place
                self._came(outcome.order, outcome.client, outcome.frames)
        if not fetched.outcomes and not fetched.busy:
            lost = LichenError("answered a job with no message", where="node", fix=SAME)
            self._fail_open(lost)

    def _came(self, order: int, client: int, frames: bytes | LichenError) -> None:
        """Of a client that something is waited for; anything else is not listened to."""
        one = self._open.get(order)
        if one is None or client not in one.clients:
            return
        one.clients.discard(client)
        self.arrived.put((one.errand, client, frames))
        if not one.clients:
            del self._open[order]

    def _cancel(self, number: int) -> None:
        self._cancelled.add(number)
        for order in {one.errand.order for one in self._open.values() if one.errand.number == number}:
            self._ask(CANCEL, {"order": order})
        self._open = {order: one for order, one in self._open.items() if one.errand.number != number}

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def _now(self, instance: str) -> bool:
        """Another instance of the site answers: hand over again what had not come back."""
        if instance == self.instance:
            return False
        before, self.instance = self.instance, instance
        if not before:
            return False
        self._after = 0
        self.restarted()
        lost, self._open = self._open, {}
        for one in lost.values():
            if one.followup:
                for client in one.clients:
                    self.arrived.put((one.errand, client, _replaced()))
            elif one.clients and one.errand.ends + 1 < _ENDS:
                self._once_more(one.errand, one.errand.ends + 1)
            else:
                for client in sorted(one.clients):
                    self.arrived.put((one.errand, client, _ended()))
        return True

    def _once_more(self, errand: Errand, ends: int) -> None:
        """Hand over what is left of an errand, with all its tensors."""
        clients = tuple(client for client in errand.job.clients if client in errand.pending)
        job = replace(errand.job, clients=clients, acked={})
        self.again(sizes(job))
        more = Errand(next(self.orders), errand.number, job, "", set(clients), errand.invited, ends=ends)
        more.needed = errand.needed
        self.put(more)

    def _failed(self, item: Item | None, error: SiteError) -> None:
        now = time.monotonic()
        self._trouble = self._trouble or now
        if now - self._trouble < self.patience.of(error.cause):
            if item is not None:
                self.put(item)
            self._closed.wait(self._pause)
            self._pause = min(2 * self._pause, _PAUSES[1])
            return
        why = error.error
        if error.cause == "silent":
            what = f"{why.what}; it {self.work} when it was heard last"
            why = LichenError(what, where=why.where, fix=why.fix)
        why = LichenError(why.what, where=why.where, fix=why.fix, reason=_CAUSES[error.cause])
        if item is None:
            self._fail_open(why)
        elif isinstance(item, Errand):
            for client in sorted(item.pending):
                self.arrived.put((item, client, why))
        elif isinstance(item, Followup) and item.answer is not None:
            self.arrived.put((item.errand, item.client, why))

    def _fail_open(self, why: LichenError) -> None:
        for order, one in list(self._open.items()):
            for client in sorted(one.clients):
                self._came(order, client, why)


_CAUSES = {"gone": "gone", "silent": "silent", "refused": "declined", "failed": "failed"}


def _replaced() -> LichenError:
    return LichenError("its process has ended, and another has taken its place", where="node", reason="gone")


def _ended() -> LichenError:
    what = f"its process has ended {_ENDS} times with this job, perhaps for want of memory"
    fix = "take a smaller federation.batch_size, or leave this site out"
    return LichenError(what, where="node", fix=fix, reason="gone")
