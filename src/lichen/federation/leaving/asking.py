"""Asks sites at the coordinator whether they have withdrawn, and shuts out those that have; over any transport.

One question does it: it brings a number that was drawn for it, and what others are to delete; the answer is the site's
notice, where it has withdrawn, and which deletions it has done. Who answers is known by the transport, as everywhere.
Nothing here needs torch.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import WITHDRAWAL, Seen, SiteError, Sites
from lichen.federation.leaving.marker import LEAVING
from lichen.federation.leaving.register import Register, sentence

__all__ = ["Looks", "RegisteredSites"]

_EVERY = 20.0
"""Seconds between two looks at a site that is there."""

_WITHIN = 10.0
"""Seconds that a site has to answer."""


@final
class RegisteredSites:
    """Sites without those that have withdrawn; :class:`lichen.engines.sites.Sites`.

    A site that refuses a question since it has withdrawn is asked for its notice at once, and then never again.

    Args:
        sites: The transport.
        register: The coordinator's.
        say: Called with what is refused, and who has withdrawn.
    """

    def __init__(self, sites: Sites, register: Register, *, say: Callable[[str], None] = lambda _: None) -> None:
        self.sites, self.register, self._say = sites, register, say

    def start(self) -> None:
        """As the transport."""
        self.sites.start()

    def seen(self) -> Mapping[str, Seen]:
        """Who is there now, and has not withdrawn."""
        gone = self.register.withdrawn()
        return {site: one for site, one in self.sites.seen().items() if site not in gone}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        """As the transport, of a site that has not withdrawn.

        Raises:
            SiteError: if there is no answer; one that has withdrawn has refused.
        """
        self._require(site)
        try:
            return self.sites.ask(site, kind, body, within)
        except SiteError as error:
            if error.cause == "refused" and error.error.where == WITHDRAWAL:
                self.look_at(site)
            self._require(site)  # it may have withdrawn since, whatever came
            raise

    def _require(self, site: str) -> None:
        time = self.register.withdrawn().get(site)
        if time is not None:
            raise SiteError(site, "refused", sentence(site, time))

    def look_at(self, site: str) -> None:
        """Ask a site whether it has withdrawn, and what it has deleted; what it answers is entered."""
        nonce = secrets.token_hex(16)
        known = self.register.withdrawn().get(site, "")
        answer = self._question(site, nonce, known)
        for gone in answer.get("deleted", ()) if isinstance(answer.get("deleted"), list) else ():
            if isinstance(gone, str):
                self.register.enter_deleted(site, gone)
        if answer.get("notice") is None or known:
            return
        try:
            time = self.register.add(site, self.register.require(answer["notice"], site=site, nonce=nonce))
        except LichenError as error:
            self._say(str(error))
            return
        self._say(f"{site} has withdrawn ({time})")
        self._question(site, secrets.token_hex(16), time)  # so that it knows

    def _question(self, site: str, nonce: str, entered: str) -> Mapping[str, Any]:
        body = {"nonce": nonce, "entered": entered, "withdrawn": self.register.copies_at(site)}
        try:
            answer = json.loads(ask_long(self.sites, site, LEAVING, json.dumps(body).encode(), _WITHIN))
        except (SiteError, ValueError, RecursionError):
            return {}
        return answer if isinstance(answer, dict) else {}

    def close(self) -> None:
        """As the transport."""
        self.sites.close()


@final
class Looks:
    """Looks at each site when it comes, and now and then while it is there; a slow one holds nobody up.

    Args:
        sites: Asks them.
    """

    def __init__(self, sites: RegisteredSites) -> None:
        self._sites, self._pool = sites, ThreadPoolExecutor(8)
        self._last: dict[str, tuple[str, float, Future[None]]] = {}

    def look(self, there: Mapping[str, str]) -> None:
        """Begin to look at those that are due.

        Args:
            there: The instance of each site that is connected, whether it has withdrawn or not.
        """
        now = monotonic()
        for site, instance in there.items():
            before = self._last.get(site)
            due = before is None or before[0] != instance or now - before[1] > _EVERY
            if due and (before is None or before[2].done()):
                self._last[site] = instance, now, self._pool.submit(self._sites.look_at, site)

    def close(self) -> None:
        """Begin no more looks; one that goes on ends with its question."""
        self._pool.shutdown(wait=False, cancel_futures=True)
