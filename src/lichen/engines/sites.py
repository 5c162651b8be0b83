"""What a server needs of a transport: who is there, and one question to one site, answered in time or not at all.

A site is an organisation's process, with its clients' rows and private state. Handing a job over and fetching what came
of it are two questions: training may take hours, and no question waits for it. Transports fulfil :class:`Sites`: pipes
to child processes, and a network. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, final

from lichen.core.errors import LichenError

__all__ = ["WITHDRAWAL", "Cause", "Seen", "SiteError", "Sites"]

WITHDRAWAL = "withdrawal"
"""The place that a refusal names where a site has left for good."""

Cause = Literal["gone", "silent", "refused", "failed"]
"""Why a site did not answer: nobody is there; it is, and said nothing in time; it declined; it met a fault."""


@final
class SiteError(Exception):
    """A site that did not answer a question.

    Args:
        site: Its name.
        cause: Why.
        error: What a person reads of it.
    """

    def __init__(self, site: str, cause: Cause, error: LichenError) -> None:
        super().__init__(site, cause, str(error))
        self.site: str = site
        self.cause: Cause = cause
        self.error = error


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A site that is there.

    Attributes:
        since: When it came, in seconds of the epoch.
        last: When it was heard last.
        instance: Another one after every start of the site's process: what an earlier one held in memory is gone.
        versions: Of lichen, torch and what else must agree, by name.
    """

    since: float
    last: float
    instance: str
    versions: Mapping[str, str] = field(default_factory=dict)


class Sites(Protocol):
    """A transport to sites by name."""

    def start(self) -> None:
        """Start those that are this process's to start, and are not there; all others come by themselves."""
        ...

    def seen(self) -> Mapping[str, Seen]:
        """Who is there now."""
        ...

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        """Ask one question and give its answer; several threads may ask at once.

        Args:
            site: Whom.
            kind: What the question is, a word that both ends know.
            body: Its bytes, at most 16 MiB.
            within: Seconds to wait for the answer.

        Raises:
            SiteError: if there is no answer, with the cause.
        """
        ...

    def close(self) -> None:
        """End the transport; sites that are this process's children end with it."""
        ...
