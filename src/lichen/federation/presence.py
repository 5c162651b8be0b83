"""Which process of a site counts, where two may claim to be it: the first one, for as long as it is heard.

A second process of a kit takes the first one's connection before it can be refused, and the first one needs a few
seconds to connect again. During these it is neither gone nor replaced. Times are given, so that nothing here waits.
Nothing here needs torch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

__all__ = ["FRESH", "QUIET", "Presence"]

FRESH = 6.0
"""Seconds for which a site that was heard counts as being there."""

QUIET = 8.0
"""Seconds that it has to connect again, after a second process of its kit has taken its connection in vain."""


@final
@dataclass(slots=True)
class _Known:
    """The process that counts, and until when."""

    instance: str
    versions: Mapping[str, str]
    since: float
    last: float
    until: float
    intruded: bool = False


@final
class Presence:
    """Who is there, by site; several threads may tell and ask."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._replaced: set[str] = set()
        self._lock = threading.Lock()

    def confirm(self, site: str, instance: str, versions: Mapping[str, str], now: float) -> bool:
        """A process has answered as a site.

        Returns:
            Whether it counts; one that does not must end.
        """
        with self._lock:
            known = self._known.get(site)
            if instance in self._replaced or (known is not None and known.instance != instance and now < known.until):
                return False
            if known is not None and known.instance == instance:
                known.last, known.until, known.intruded = now, now + FRESH, False
                return True
            if known is not None:
                self._replaced.add(known.instance)
            self._known[site] = _Known(instance, dict(versions), now, now, now + FRESH)
            return True

    def is_replaced(self, instance: str) -> bool:
        """Whether another process has taken the place of this one."""
        with self._lock:
            return instance in self._replaced

    def answered(self, site: str, instance: str, now: float) -> None:
        """The process that counts has answered a question."""
        with self._lock:
            known = self._known.get(site)
            if known is not None and known.instance == instance:
                known.last, known.until, known.intruded = now, now + FRESH, False

    def lets_in(self, site: str, instance: str, now: float) -> bool:
        """Whether a process that says its name may be this site; if not, the first one gets time to come back."""
        with self._lock:
            known = self._known.get(site)
            if known is None or known.instance == instance or now >= known.until:
                return True
            if not known.intruded:
                known.until, known.intruded = max(known.until, now + QUIET), True
            return False

    def lost(self, site: str, now: float) -> bool:
        """A site has no connection.

        Returns:
            Whether it is gone; if not, it is on its way back.
        """
        with self._lock:
            known = self._known.get(site)
            if known is not None and known.intruded and now < known.until:
                return False
            self._known.pop(site, None)
            return True

    def left(self, site: str, instance: str) -> None:
        """The process of a site says goodbye; another may come at once."""
        with self._lock:
            known = self._known.get(site)
            if known is not None and known.instance == instance:
                del self._known[site]

    def instance(self, site: str) -> str | None:
        """Of the process that counts, though it may be silent; None where there is none."""
        with self._lock:
            known = self._known.get(site)
            return None if known is None else known.instance

    def seen(self, now: float) -> dict[str, dict[str, Any]]:
        """Who is there, as JSON."""
        with self._lock:
            return {
                site: {"since": k.since, "last": k.last, "instance": k.instance, "versions": dict(k.versions)}
                for site, k in self._known.items()
                if now < k.until
            }
