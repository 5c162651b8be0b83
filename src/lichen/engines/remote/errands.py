"""What the server wants of one site: jobs for some of its clients, answers to what they ask, and how long it waits."""

from __future__ import annotations

import math
import queue
from dataclasses import dataclass
from typing import final

from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.engines.sites import Cause

__all__ = ["CHILDREN", "SAME", "Arrived", "Cancel", "Errand", "Followup", "Item", "Patience"]

SAME = "both ends must run the same version"


@final
@dataclass(slots=True, eq=False)
class Errand:
    """A job for some clients of one site.

    Attributes:
        order: Its number at the site.
        number: That of the job, as ``submit`` gave it.
        job: For these clients.
        relies: The instance that holds the views the job goes on from; empty: any.
        pending: Clients of whom nothing has come.
        invited: Clients of the job in all sites.
        instance: Which one it was handed to.
        ends: How often the site's process has ended while it had it.
        needed: The oldest version whose answers the server may yet ask for again; None: that of the job.
    """

    order: int
    number: int
    job: Job
    relies: str
    pending: set[int]
    invited: int
    instance: str = ""
    ends: int = 0
    needed: int | None = None


@final
@dataclass(slots=True, eq=False)
class Followup:
    """What a client is answered: an order of its own; None is its dismissal."""

    order: int
    errand: Errand
    client: int
    answer: Tree | None


@final
@dataclass(frozen=True, slots=True)
class Cancel:
    """A job that is given up."""

    number: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a site is waited for.

    Attributes:
        gone: Seconds that it may not be there before its clients' replies are errors.
        quiet: Seconds that it may be there and not answer.
        within: Seconds for one answer.
    """

    gone: float = 600.0
    quiet: float = 600.0
    within: float = 60.0

    def of(self, cause: Cause) -> float:
        """Seconds for a cause; what is refused or has failed is not tried again."""
        return {"gone": self.gone, "silent": self.quiet}.get(cause, 0.0)


CHILDREN = Patience(gone=0.0, quiet=math.inf)
"""With children: one that is there may take as long as it likes, to load a model; one that has ended stays away."""

Arrived = queue.SimpleQueue[tuple[Errand, int, bytes | LichenError]]
"""What has come of each client: its frames, or why there are none."""

Item = Errand | Followup | Cancel
