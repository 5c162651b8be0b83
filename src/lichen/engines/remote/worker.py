"""A site's end: answers questions at once, whatever it is doing, and does what it is handed, one order after another.

Questions come from any transport, in any thread; one thread trains. Handing an order over and fetching what came of it
are two questions (:mod:`lichen.engines.remote.requests`), and no question waits for training, but for the seconds that
it names. There is no network in here.

A server's engine opens a session with its first question. A newer session of the same state takes the place of that
before it: what that one ordered is done no more, and an earlier start of the server is refused by name. What lies on
the disk stays: private state, and saved answers.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.visible import clipped
from lichen.engines.remote.newest import NewestSessions
from lichen.engines.remote.pieces import PIECE
from lichen.engines.remote.requests import (
    CANCEL,
    FETCH,
    HAND,
    Fetched,
    Outcome,
    Request,
    Work,
    pack_outcomes,
    pack_values,
    unpack_values,
)
from lichen.engines.remote.session import Order, Session
from lichen.engines.remote.talks import Talks, error_frame

__all__ = ["SiteWorker"]

_LONGEST_WAIT = 30.0
"""Seconds that a fetch waits at most."""

_STATE = re.compile(r"(?:(?![.])[A-Za-z0-9.=+_-]{1,60}(?:/(?=[^/])|$)){0,4}")
"""How a private state is named: a folder, or folders one in the other."""

_MOST_STATES = 200
"""Private states of a run: each keeps what the server sent last, and a server may be a stranger's."""

_LITTLE = 1 << 16
"""Bytes of an outcome that is not read from the disk."""

_SAME = "both ends must run the same version of lichen"


@final
class SiteWorker:
    """Answers a transport's questions.

    Args:
        talks: Makes what does the jobs of a private state, by its name, at the first of them.
        recipe: Digest of what the server must have, too; empty: whatever it has.
        instance: Another one after every start of the process; empty: drawn.
        also: Answers questions of other kinds, by kind, in any thread.
        memory: A file in which the newest session of each private state is remembered; None: none.

    Attributes:
        instance: What an earlier one held in memory is gone.
    """

    def __init__(
        self,
        talks: Callable[[str], Talks],
        *,
        recipe: str = "",
        instance: str = "",
        also: Mapping[str, Callable[[bytes], bytes]] | None = None,
        memory: Path | None = None,
    ) -> None:
        self.instance = instance or os.urandom(8).hex()
        self._make, self._recipe, self._also = talks, recipe, also or {}
        self._talks: dict[str, Talks] = {}
        self._sessions: dict[str, Session] = {}
        self._newest = NewestSessions(memory)
        self._over: set[str] = set()  # sessions whose place another has taken
        self._todo: deque[Order] = deque()
        self._at: Session | None = None  # whose order is done
        self._work = Work()
        self._changed = threading.Condition()
        self._closed = False

    def answer(self, kind: str, body: bytes) -> bytes:
        """Answer one question; any thread may call it at any time.

        Args:
            kind: What the question is.
            body: Its bytes.

        Raises:
            LichenError: if it is refused.
        """
        if kind in self._also:
            return self._also[kind](body)
        do = {HAND: self._hand, FETCH: self._fetch, CANCEL: self._cancel}.get(kind)
        if do is None:
            raise LichenError(f"a question {kind[:40]!r} is not known here", where="site", fix=_SAME)
        values, payload = unpack_values(body)
        try:
            request = Request(str(values["session"]), str(values["recipe"]), str(values["state"]))
            self._compare(request)
            return do(request, values, payload)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"a {kind} lacks something: {type(error).__name__}: {error}"
            raise LichenError(what, where="site", fix=_SAME) from None

    @property
    def doing(self) -> Work:
        """What it is doing now."""
        with self._changed:
            return self._work._replace(waiting=len(self._todo))

    def start(self) -> threading.Thread:
        """A thread that does what is ordered, until :meth:`close`."""
        thread = threading.Thread(target=self.work, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """End the work after the client that it is at; no more is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- questions ---------------------------------------------------------------------------------------------------

    def _compare(self, request: Request) -> None:
        if not _STATE.fullmatch(request.state):  # it names a folder
            raise LichenError(f"{clipped(request.state, 60)!r} is no name of a private state", where="site", fix=_SAME)
        if request.recipe and self._recipe and request.recipe != self._recipe:
            raise LichenError(
                f"the server's recipe is {request.recipe}, this site's is {self._recipe}",
                where="recipe",
                fix="start both with one recipe",
            )

    def _session(self, request: Request) -> Session:
        """The session that asks; within the lock."""
        name = request.session
        if name in self._over:
            raise LichenError("another server has taken this one's place", where="session")
        before = self._sessions.get(request.state)
        if before is not None and before.request.session == name:
            return before
        self._newest.admit(request.state, name)
        if before is not None:
            self._over.add(before.request.session)
            before.over = True
            before.outcomes.clear()
            self._todo = deque(order for order in self._todo if order.session is not before)
        self._sessions[request.state] = Session(request)
        return self._sessions[request.state]

    def _hand(self, request: Request, values: dict[str, Any], payload: memoryview) -> bytes:
        number, clients = int(values["order"]), tuple(int(client) for client in values["clients"])
        kind, length = bytes(payload[:1]), int.from_bytes(payload[1:9], "little")
        if kind not in (b"J", b"A") or length != len(payload) - 9:
            raise LichenError("an order is one frame, of a job or an answer", where="site", fix=_SAME)
        with self._changed:
            session = self._session(request)
            if values["instance"] not in ("", self.instance):
                return pack_values({"instance": self.instance, "ok": False})
            if number not in session.orders:
                session.orders.add(number)
                invited, needed = int(values.get("invited", 0)), values.get("needed")
                needed = None if needed is None else int(needed)
                order = Order(session, number, clients, kind, bytes(payload[9:]), invited, needed)
                # Answers go first, so that what is open comes to its end.
                first = next((i for i, one in enumerate(self._todo) if one.kind == b"J"), len(self._todo))
                self._todo.insert(len(self._todo) if kind == b"J" else first, order)
                self._changed.notify_all()
        if "after" not in values:
            return pack_values({"instance": self.instance, "ok": True})
        of_this = values["of"] == self.instance
        return self._fetch(request, values if of_this else {**values, "after": 0}, payload)

    def _fetch(self, request: Request, values: dict[str, Any], payload: memoryview) -> bytes:
        after, wait = int(values["after"]), min(max(float(values["wait"]), 0.0), _LONGEST_WAIT)
        with self._changed:
            session = self._session(request)
            while session.outcomes and session.outcomes[0].place <= after:
                session.outcomes.popleft()
            self._changed.wait_for(lambda: session.outcomes or self._closed or not self._busy(session), timeout=wait)
            done, busy = tuple(session.outcomes), self._busy(session)
            work = self._work._replace(waiting=len(self._todo))
        some, total = list[Outcome](), 0
        for one in done:
            some.append(Outcome(one.place, one.order, one.client, one.frames()))
            total += len(some[-1].frames)
            if total > PIECE // 4:
                break
        return pack_outcomes(Fetched(self.instance, tuple(some), busy or len(some) < len(done), work))

    def _busy(self, session: Session) -> bool:
        return self._at is session or any(order.session is session for order in self._todo)

    def _cancel(self, request: Request, values: dict[str, Any], payload: memoryview) -> bytes:
        number = int(values["order"])
        with self._changed:
            session = self._session(request)
            session.orders.add(number)
            session.cancelled.add(number)
            gone = [o for o in self._todo if o.session is session and o.number == number]
            self._todo = deque(order for order in self._todo if order not in gone)
            session.outcomes = deque(one for one in session.outcomes if one.order != number)
            self._todo.append(Order(session, number, (), b"X", b""))
            self._changed.notify_all()
        return pack_values({"instance": self.instance, "ok": True})

    # --- work --------------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Do what is ordered, until :meth:`close`: the one thread that trains."""
        while True:
            with self._changed:
                self._at, self._work = None, Work()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._todo or self._closed)
                if self._closed:
                    return
                order = self._todo.popleft()
                self._at = order.session
                self._work = Work(order.number, -1, 0, len(order.clients))
            self._do(order)

    def _do(self, order: Order) -> None:
        try:
            talks = self._talks_of(order.session.request.state)
            if order.session.fresh:
                order.session.fresh = False
                talks.drop()
            if order.kind == b"X":
                talks.drop(order.number)
                return
            if order.kind == b"A":
                frames = talks.answer(order.clients[0], order.body)
                self._put(order, order.clients[0], frames)
                return
            request = order.session.request
            job, digest = talks.whole(order.body, recipe=request.recipe, invited=order.invited)
            if job.clients != order.clients:
                raise LichenError("a job is for other clients than its order", where="site", fix=_SAME)
        except Exception as error:
            frames = error_frame(error)
            for client in order.clients:
                self._put(order, client, frames)
            return
        for place, client in enumerate(job.clients, start=1):
            with self._changed:
                if self._closed or order.session.over or order.number in order.session.cancelled:
                    return
                self._work = Work(order.number, client, place, len(job.clients))
            mine = replace(job, clients=(client,))
            frames = talks.begin(order.number, mine, digest)
            again = talks.again(mine, digest) if len(frames) > _LITTLE else None
            self._put(order, client, frames, again, job.version)
        with self._changed:  # after the work: disks take longer to delete a folder than a small job takes
            oldest = min((one.version for one in order.session.outcomes if one.version >= 0), default=job.version)
        needed = job.version if order.needed is None else order.needed
        talks.saved.acknowledge(min(job.version, oldest + 1, needed + 1))

    def _talks_of(self, state: str) -> Talks:
        if state not in self._talks:
            if len(self._talks) == _MOST_STATES:
                what = f"a job for one more private state; {_MOST_STATES} are the most of a run"
                raise LichenError(what, where="site", fix="try fewer learning rates")
            self._talks[state] = self._make(state)
        return self._talks[state]

    def _put(
        self, order: Order, client: int, frames: bytes, again: Callable[[], bytes] | None = None, version: int = -1
    ) -> None:
        with self._changed:
            order.session.put(order.number, client, version if again else -1, again or (lambda: frames))
            self._changed.notify_all()
