"""What ``lichen withdraw`` does at a site: refuse everything, notify the coordinator, remove what is held, prove it.

The order matters. The marker comes first, so that nothing is computed for anybody from then on, whatever fails later.
Then the coordinator is notified, if it can be reached; if not, the site leaves all the same, and the next call of the
command, or any later one, notifies it. Then everything is removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, final

from lichen.core.errors import LichenError
from lichen.core.files.lock import one_process
from lichen.data.sources.cache_listing import clear
from lichen.engines.remote.pieces import Pieces
from lichen.federation.kits.settle import open_kit
from lichen.federation.leaving.marker import LEAVING, answer_leaving, mark, marker_of, refuse_left
from lichen.federation.leaving.removal import Removed, remove_all
from lichen.federation.supervision.supervisor import stop_kit
from lichen.federation.transports.choose import open_site

__all__ = ["Left", "leave"]

_END = 30.0
"""Seconds that the site's running process has to end."""

_STEP = 0.2
"""Seconds between two looks."""


@final
class Left(NamedTuple):
    """How a site has left.

    Attributes:
        site: Its name.
        time: When.
        entered: What the coordinator's register has; empty: it does not know yet.
        removed: What was removed in the kit.
        cache: Bytes that were removed of what was made of rows in this user's cache.
    """

    site: str
    time: str
    entered: str
    removed: Removed
    cache: int


def leave(kit: Path, *, wait: float, say: Callable[[str], None]) -> Left:
    """Withdraw a site from its federation, for good; called again, notify the coordinator if it does not know yet.

    Args:
        kit: The site's kit.
        wait: Seconds for the coordinator to be reached and to ask.
        say: Called with what happens, a line each.

    Raises:
        LichenError: if it is no site's kit, or its running process does not end.
    """
    one = open_kit(kit)
    if one.kind != "site":
        fix = "a site withdraws; at the coordinator: lichen forget FEDERATION --site NAME"
        raise LichenError("is the server's kit", where=str(kit), fix=fix)
    marker = mark(kit)
    _end_running(kit, say)
    if not marker["entered"]:
        _notify(kit, wait, say)
    removed, cache = remove_all(kit), clear("private")
    marker = mark(kit)
    return Left(one.name, marker["time"], marker["entered"], removed, cache)


def _end_running(kit: Path, say: Callable[[str], None]) -> None:
    """End the process that has joined with this kit, and wait until it has."""
    if stop_kit(kit):
        say("the running process of this kit is ended")
    end = time.monotonic() + _END
    while True:
        try:
            with one_process(kit, ".lock", say=lambda _: None):
                return
        except LichenError:
            if time.monotonic() > end:
                fix = "end it, and call the command again; until then it refuses everything"
                raise LichenError("another process runs this kit", where=str(kit), fix=fix) from None
        time.sleep(_STEP)


def _notify(kit: Path, wait: float, say: Callable[[str], None]) -> None:
    """Connect, and wait until the coordinator has asked and entered it; what keeps it from that is said."""

    def answer(kind: str, body: bytes) -> bytes:
        if kind != LEAVING:
            refuse_left(kit)
        return answer_leaving(kit, body, say)

    end = time.monotonic() + wait
    try:
        if wait > 0:
            with open_site(kit, Pieces(answer).answer, say=say) as site:
                while not _is_entered(kit) and time.monotonic() < end:
                    if site.wait(_STEP):
                        break
    except LichenError as error:
        say(str(error))


def _is_entered(kit: Path) -> bool:
    marker = marker_of(kit)
    return marker is not None and bool(marker["entered"])
