"""What stands between a site's work and the server: may refuse a job, and keep back what came of it."""

from __future__ import annotations

from typing import Protocol, final

from lichen.core.message import Job

__all__ = ["Guard", "Open"]


class Guard(Protocol):
    """Looks at every job before anything is done for it, and at all that would leave; in the thread that works."""

    def job(self, job: Job, *, recipe: str, invited: int) -> None:
        """Nothing, for a job that may be done.

        Args:
            job: What is asked.
            recipe: Digest of the recipe that the server says it is of.
            invited: Clients of the job in all sites, as the server says.

        Raises:
            LichenError: for any other.
        """
        ...

    def frames(self, job: Job, frames: bytes, *, anew: bool) -> None:
        """Nothing, for what may leave.

        Args:
            job: Of one client.
            frames: What came of it.
            anew: Whether the client has worked for it just now; else it was saved before.

        Raises:
            LichenError: for anything else.
        """
        ...


@final
class Open:
    """Lets everything pass: where server and site are one user's."""

    def job(self, job: Job, *, recipe: str, invited: int) -> None:
        """Nothing."""

    def frames(self, job: Job, frames: bytes, *, anew: bool) -> None:
        """Nothing."""
