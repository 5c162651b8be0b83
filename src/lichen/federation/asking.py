"""Asks sites through the door of a server that runs, from whatever process of its user. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.engines.sites import Cause, Seen, SiteError
from lichen.federation.door import Head, call, error_of

__all__ = ["SPARE", "DoorSites", "cause_of"]

SPARE = 5.0
"""Seconds beyond a question's own, for the two processes on this machine."""

_CAUSES: dict[str, Cause] = {"gone": "gone", "silent": "silent", "refused": "refused", "other": "refused"}
"""What a door says, as a cause; anything else is a fault."""


def cause_of(head: Head) -> Cause:
    """Why there is no answer, of the head that says so."""
    return _CAUSES.get(str(head["cause"]), "failed")


@final
class DoorSites:
    """Sites, asked through a server's door; :class:`lichen.engines.sites.Sites`.

    Args:
        door: The socket of NVFlare's process.
        fault: Why that process is gone for good, where it is.
    """

    def __init__(self, door: Path, *, fault: Callable[[], LichenError | None] = lambda: None) -> None:
        self._door, self._fault = door, fault

    def start(self) -> None:
        """Nothing: sites come by themselves."""

    def seen(self) -> Mapping[str, Seen]:
        """Who is there now; nobody while the server's process is started again."""
        try:
            head, _ = call(self._door, {"op": "seen"}, within=SPARE)
        except OSError:
            return {}
        return {
            site: Seen(
                since=float(one["since"]),
                last=float(one["last"]),
                instance=str(one["instance"]),
                versions={str(name): str(version) for name, version in one["versions"].items()},
            )
            for site, one in sorted(head["seen"].items())
        }

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        """Ask one question and give its answer; several threads may ask at once.

        Args:
            site: Whom.
            kind: What the question is, a word that both ends know.
            body: Its bytes, at most 16 MiB.
            within: Seconds to wait for the answer.

        Raises:
            SiteError: if there is no answer, with the cause.
            LichenError: if the body is too long.
        """
        question: Head = {"op": "ask", "site": site, "kind": kind, "within": within}
        where = f"site {site}"
        try:
            head, answer = call(self._door, question, body, within=within + SPARE)
        except TimeoutError:
            what = f"did not answer within {within:.0f} seconds"
            raise SiteError(site, "silent", LichenError(what, where=where)) from None
        except OSError:
            error = self._fault() or LichenError("the server's own process is down, and comes back", where=where)
            raise SiteError(site, "gone", error) from None
        if "cause" in head:
            raise SiteError(site, cause_of(head), error_of(head))
        return answer

    def close(self) -> None:
        """Nothing: the server goes on."""
