"""Holds every job and every message of a run against the site's policy, as it is at that moment."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.message import Job, sizes, unpack_message
from lichen.core.wire.frames import read_frame
from lichen.federation.policy.accepted import Accepted, check_job, check_message, work_of
from lichen.federation.policy.keys import Policy, read_policy

__all__ = ["PolicyGuard"]

TRAINED = "trained.json"
"""The file with the rounds that each client has trained in."""


@final
class PolicyGuard:
    """The policy in a run; :class:`lichen.engines.remote.guard.Guard`.

    Args:
        policy: The policy's file, which is read again whenever it is another one.
        accepted: The recipe that the site has said yes to.
        mine: Numbers of the site's clients in the roster, once it has a place.
        folder: The run's at the site, where rounds are counted over a restart.
        say: Called with a line for each work of each round, and for what is refused.
        refuse: Raises where the site takes part in nothing any more.

    Attributes:
        round: The version of the job that was let pass last; -1 before the first.
        bytes_down: Of jobs that were let pass.
        bytes_up: Of what has come of them.
    """

    def __init__(
        self,
        policy: Path,
        accepted: Accepted,
        *,
        mine: Callable[[], Collection[int]],
        folder: Path,
        say: Callable[[str], None],
        refuse: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy, self.accepted, self.mine, self.file = policy, accepted, mine, folder / TRAINED
        self.round, self.bytes_down, self.bytes_up = -1, 0, 0
        self._say, self._refuse, self._about = say, refuse, ("", -1)
        self._read: tuple[object, Policy] | None = None
        self._waiting, self._counted = set[int](), False  # clients of the order at work; what is not on the disk
        self._sent: dict[tuple[str, int], int] = {}
        self._trained: dict[int, int] = {}
        with suppress(FileNotFoundError):
            saved = json.loads(self.file.read_text(encoding="utf-8"))
            self._trained = {int(client): int(count) for client, count in saved.items()}

    def job(self, job: Job, *, recipe: str, invited: int) -> None:
        """See :meth:`lichen.engines.remote.guard.Guard.job`."""
        with self._showing("refuses a job"):
            check_job(
                self._policy(),
                self.accepted,
                job,
                sha256=recipe,
                mine=self.mine(),
                invited=invited,
                trained=self._trained,
            )
        self.round, self._waiting = max(self.round, job.version), set(job.clients)
        if self._about != (job.work, job.version):
            self._about = job.work, job.version
            clients = f"{len(job.clients)} client{'s' * (len(job.clients) > 1)}"
            when = f"of round {job.version + 1}" if job.work.startswith("train") else f"after {job.version} rounds"
            self._say(f"{job.work} {when}: {clients} here, {invited} in all sites")
        self.bytes_down += sizes(job)

    def frames(self, job: Job, frames: bytes, *, anew: bool) -> None:
        """See :meth:`lichen.engines.remote.guard.Guard.frames`."""
        if anew and work_of(job.work, self.accepted.recipe) == "train":
            for client in job.clients:
                self._trained[client] = self._trained.get(client, 0) + 1
            self._counted = True
        self._waiting -= set(job.clients)
        if self._counted and not self._waiting:  # once for all clients of an order
            write_atomic(self.file, json.dumps(self._trained).encode())
            self._counted = False
        policy, source, about = self._policy(), io.BytesIO(frames), (job.work, job.version)
        sent = self._sent.get(about, 0)
        while (frame := read_frame(source)) is not None:
            if frame[0] in (b"M", b"Q"):
                with self._showing("keeps a message back"):
                    sent += check_message(policy, unpack_message(frame[1]), sent=sent)
        self._sent = {old: count for old, count in self._sent.items() if old[1] >= job.version - 1} | {about: sent}
        self.bytes_up += len(frames)

    def _policy(self) -> Policy:
        """The policy as it is now; a site that has withdrawn has none."""
        self._refuse()
        try:
            about = self.policy.stat()
        except OSError:
            return read_policy(self.policy)  # which says what is wrong
        now = about.st_mtime_ns, about.st_size, about.st_ino
        if self._read is None or self._read[0] != now:
            self._read = now, read_policy(self.policy)
        return self._read[1]

    @contextmanager
    def _showing(self, what: str) -> Iterator[None]:
        """A no of the policy is read at the site, too."""
        try:
            yield
        except LichenError as error:
            self._say(f"{what}: {error}")
            raise
