"""Refuses a request of an earlier start of the server than one that this site has answered, also after its own restart.

A session is named by the time of the server's start, in nanoseconds, and a nonce. A newer one of a private state takes
the place of that before it. Bytes of an earlier one that come again, late or replayed, must not take it back: whoever
could send them would end the run that goes on. So the newest session of each state is remembered, in a file where the
site has a place for it. Sessions that are not named so have no order, and are known by the worker's memory alone.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic

__all__ = ["NewestSessions"]

_SESSION = re.compile(r"([0-9a-f]{1,20})-[0-9a-f]{16}")

_MOST = 1 << 20
"""Bytes of the file that are read."""


@final
class NewestSessions:
    """The newest session of each private state.

    Args:
        path: Where they are remembered; None: as long as the process lives.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._newest: dict[str, str] = {}
        if path is not None:
            with suppress(OSError, ValueError):
                with open(path, "rb") as file:
                    found = json.loads(file.read(_MOST))
                if isinstance(found, dict):
                    self._newest = {str(state): str(session) for state, session in found.items()}

    def admit(self, state: str, session: str) -> None:
        """Remember a session, if it is the newest.

        Raises:
            LichenError: if a later start of the server has been answered.
        """
        newest = self._newest.get(state, "")
        started, latest = _started(session), _started(newest)
        if session == newest or started is None:
            return
        if latest is not None and started < latest:
            raise LichenError(
                "is of an earlier start of the server than the one that was answered last",
                where="session",
                fix="start the server again; if its clock was set back, set it right first",
            )
        self._newest[state] = session
        if self._path is not None:
            write_atomic(self._path, json.dumps(self._newest, sort_keys=True).encode())


def _started(session: str) -> int | None:
    """When its server was started, in nanoseconds; None where its name does not say."""
    found = _SESSION.fullmatch(session)
    return None if found is None else int(found[1], 16)
