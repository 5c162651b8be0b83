"""The engine of a federation of sites: jobs are handed over and answers fetched, over any transport.

A site is a process with its clients' rows (:mod:`lichen.engines.sites`). It is handed one job for all of its clients
that hold one view of the shared tensors, and each client's message comes back by itself. No question waits for
training. The same job asked twice is trained once: a site saves what its clients have answered until the server is two
versions on, and longer where the server still waits for an answer of that age, so that a server that was killed and
goes on is answered from there.

Bytes are counted as if each client lived on a machine of its own: a job once for each client, as ``lichen plan`` and
the other engines count it. What a transport wraps around them is not counted. A job that is handed over again, because
its site was started again, counts again.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.message import Job, sizes, unpack_message
from lichen.core.replies import Reply
from lichen.core.tree import Tree
from lichen.core.wire.answer import answer_size
from lichen.engines.local import sorted_by_client
from lichen.engines.remote.errands import SAME, Arrived, Cancel, Errand, Followup, Patience
from lichen.engines.remote.line import Line
from lichen.engines.remote.outcome import Answered, Question, read_outcome
from lichen.engines.remote.requests import Request
from lichen.engines.sites import Sites

__all__ = ["FederatedEngine", "Patience"]


@final
class FederatedEngine:
    """Clients at sites, one job a site.

    A site that is gone for longer than patience lasts costs its clients the round.

    Args:
        sites: The transport; it is not closed by this engine.
        site_of: A client to the name of its site.
        recipe: Digest of the recipe that every site must have; empty: not compared.
        state: Name of the private state that these jobs are for; empty where there is one.
        agreed: Digest of the shared tensors that every site holds when it starts; empty for none.
        patience: How long a site is waited for.
        named: How many clients sites hear that a job is for, where that is a secret; None: how many it is for.
    """

    def __init__(
        self,
        sites: Sites,
        site_of: Callable[[int], str],
        *,
        recipe: str = "",
        state: str = "",
        agreed: str = "",
        patience: Patience | None = None,
        named: int | None = None,
    ) -> None:
        self.sites, self.site_of, self.agreed, self.named = sites, site_of, agreed, named
        self.recipe, self.state, self.patience = recipe, state, patience or Patience()
        self.bytes_up = 0
        self.bytes_down = 0
        self._lock = threading.Lock()  # of what lines change, too: bytes down and views
        self._acked: dict[int, str] = {}  # the view that a client's site holds for it
        self._lines: dict[str, Line] = {}
        self._seen: dict[str, str] = {}  # the instance of each site when it was handed something last
        self._numbers, self._orders = 0, itertools.count(1)
        self._arrived: Arrived = queue.SimpleQueue()
        self._waiting: dict[int, set[int]] = {}  # clients of each job whose reply has not come
        self._questions: dict[tuple[int, int], Errand] = {}  # by job and client: who waits for an answer
        self._early: dict[int, list[Reply]] = {}  # replies that came while others were listened to
        self._versions: dict[int, int] = {}  # of jobs that somebody has yet to answer
        self._needed: dict[int, int] = {}  # the oldest of them, by the version of the job that went out then

    def submit(self, job: Job) -> int:
        """Hand each site the job of its clients; those that hold different views get each their own."""
        self.sites.start()
        self._numbers += 1
        if job.clients:
            self._waiting[self._numbers], self._versions[self._numbers] = set(job.clients), job.version
        needed = self._oldest_needed(job.version)
        by_site: dict[str, list[int]] = {}
        for client in job.clients:
            by_site.setdefault(self.site_of(client), []).append(client)
        for site, clients in by_site.items():
            line = self._line(site)
            for errand in self._errands(job, line, clients):
                errand.needed = needed if needed < job.version else None
                line.put(errand)
        return self._numbers

    def _oldest_needed(self, version: int) -> int:
        """The oldest version whose answers may yet be asked for again: at least every second state is saved."""
        self._versions = {n: v for n, v in self._versions.items() if n in self._waiting or self._early.get(n)}
        self._needed[version] = min((*self._versions.values(), self._needed.get(version, version)))
        self._needed = dict(sorted(self._needed.items())[-2:])
        return min(self._needed.values())

    def _line(self, site: str) -> Line:
        """What talks with a site; one that was started again holds no client's view."""
        if site not in self._lines:
            if not self._lines:
                self._request = Request(f"{time.time_ns():x}-{os.urandom(8).hex()}", self.recipe, self.state)
            self._lines[site] = Line(
                self.sites,
                site,
                self._request,
                arrived=self._arrived,
                restarted=lambda: self._forget_snapshots(site),
                again=self._count_down,
                orders=self._orders,
                patience=self.patience,
            )
        seen = self.sites.seen().get(site)
        if seen is not None and self._seen.setdefault(site, seen.instance) != seen.instance:
            self._seen[site] = seen.instance
            self._forget_snapshots(site)
        return self._lines[site]

    def _errands(self, job: Job, line: Line, clients: Sequence[int]) -> Iterator[Errand]:
        """The job for some clients of one site; a view is sent whole where the site does not hold the last one."""
        with self._lock:
            acked = {c: job.acked[c] for c in clients if job.acked.get(c)}
            acked = {c: view for c, view in acked.items() if view == self._acked.get(c, self.agreed)}
            groups: dict[str, list[int]] = {}
            for client in clients:
                groups.setdefault(acked.get(client, ""), []).append(client)
            relies = {view: line.instance if any(c in self._acked for c in of) else "" for view, of in groups.items()}
            if job.snapshot:  # until they have answered nobody knows
                self._acked.update(dict.fromkeys(clients, ""))
        for view, some in groups.items():
            one = replace(job, clients=tuple(some), acked=dict.fromkeys(some, view) if view else {})
            self._count_down(sizes(one))
            relied = relies[view] if view else ""
            yield Errand(next(self._orders), self._numbers, one, relied, set(some), self.named or len(job.clients))

    def _count_down(self, count: int) -> None:
        with self._lock:
            self.bytes_down += count

    def _forget_snapshots(self, site: str) -> None:
        with self._lock:
            self._acked = {client: view for client, view in self._acked.items() if self.site_of(client) != site}

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """One reply a client, as they arrive."""
        for number in numbers:
            while early := self._early.get(number):
                yield early.pop(0)
        while any(number in self._waiting for number in numbers):
            left = until - self.now()
            if left <= 0:
                return
            try:
                errand, client, came = self._arrived.get(timeout=None if left == math.inf else left)
            except queue.Empty:
                continue
            replies = self._read(errand, client, came if isinstance(came, LichenError) else read_outcome(came))
            number = errand.number
            dismissed = client not in self._waiting.get(number, ())
            if replies[0].question:
                if dismissed:
                    self._follow(errand, client, None)
                else:
                    self._questions[number, client] = errand
            self._no_longer(number, client)
            if dismissed:
                continue
            if number in numbers:
                yield from replies
            else:
                self._early.setdefault(number, []).extend(replies)

    def _no_longer(self, number: int, client: int) -> None:
        """Wait for a client's reply no longer."""
        waiting = self._waiting.get(number, set())
        waiting.discard(client)
        if not waiting:
            self._waiting.pop(number, None)

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """Hand each client's answer to its site."""
        for position, client in enumerate(clients):
            errand = self._questions.pop((number, client), None)
            if errand is None:
                if answer_C is None:
                    self._no_longer(number, client)
                continue
            self._count_down(answer_size(answer_C))
            if answer_C is not None:
                self._waiting.setdefault(number, set()).add(client)
            self._follow(errand, client, None if answer_C is None else trees.take(answer_C, position))

    def _follow(self, errand: Errand, client: int, answer: Tree | None) -> None:
        line = self._lines.get(self.site_of(client))
        if line is not None:
            line.put(Followup(next(self._orders), errand, client, answer))

    def _read(self, errand: Errand, client: int, came: Answered | Question | LichenError) -> list[Reply]:
        """What came, read; of several messages the first counts, and that there were others is refused."""
        reply = Reply(job=errand.number, clients=(client,))
        if isinstance(came, LichenError):
            return [replace(reply, error=came)]
        if isinstance(came, Question):
            self.bytes_up += len(came.data)
            try:
                return [replace(reply, message=unpack_message(came.data), question=True)]
            except LichenError as error:
                self._follow(errand, client, None)
                return [replace(reply, error=error, reason="bytes")]
        self.bytes_up += len(came.first)
        if errand.job.snapshot:
            with self._lock:
                line = self._lines.get(self.site_of(client))
                if line is not None and line.instance == errand.instance:
                    self._acked[client] = errand.job.snapshot
        try:
            out = [replace(reply, message=unpack_message(came.first))]
        except LichenError as error:
            out = [replace(reply, error=error, reason="bytes")]
        if came.messages > 1:
            what = LichenError(f"answered one job with {came.messages:,} messages", where="node", fix=SAME)
            out.append(replace(reply, error=what, reason="twice"))
        return out

    def cancel(self, number: int) -> None:
        """Give a job up; what no site has begun is never done."""
        self._early.pop(number, None)
        for of, client in list(self._questions):
            if of == number:
                self._follow(self._questions.pop((of, client)), client, None)
        if self._waiting.pop(number, None):
            for line in self._lines.values():
                line.put(Cancel(number))

    def now(self) -> float:
        """Seconds of this machine's steady clock."""
        return time.monotonic()

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The total: one server, one rank."""
        return total

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """The same, sorted by client."""
        return *sorted_by_client(client_N, metrics), tuple(tuple(line) for line in lines)

    def close(self) -> None:
        """Ask nothing any more; sites go on with what they have, and save it. A later job opens a new session."""
        for line in self._lines.values():
            line.close()
        self._lines, self._seen, self._acked = {}, {}, {}
        self._versions, self._needed = {}, {}
        self._waiting, self._early, self._questions = {}, {}, {}
        self._arrived = queue.SimpleQueue()

    def __enter__(self) -> FederatedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
