"""Sites over a network: the coordinator's end, which fulfils :class:`lichen.engines.sites.Sites`, and a site's end.

Each stands over NVFlare's process of its kit and talks with it through a door. Nothing here needs torch.
"""

from __future__ import annotations

import json
import platform
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import final

from lichen import __version__
from lichen.core.errors import LichenError
from lichen.engines.remote.pieces import PIECE
from lichen.engines.sites import Seen
from lichen.federation.asking import SPARE, DoorSites
from lichen.federation.door import LOOK, Door, Head, call, refusal, socket_folder
from lichen.federation.processes import Parent, check_port, hold_kit

__all__ = ["NetworkSites", "SiteEnd", "answer_question", "own_versions"]

_START = 60.0
"""Seconds that the server's process may take to open its door."""

_PATIENCE = 15
"""Seconds without a word of the server after which a site connects anew; the server looks every two."""

_GOODBYE = 4.0
"""Seconds that a site's process has to say goodbye."""


@final
class NetworkSites:
    """The sites of a federation, as its coordinator asks them.

    Args:
        folder: The server's kit.
        say: Told what keeps NVFlare's process from running.

    Raises:
        LichenError: if another process runs the kit, the port is taken, or the server does not come up.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        with ExitStack() as stack:
            kit = stack.enter_context(hold_kit(folder, say=say))
            if kit.kind != "server":
                raise LichenError("is a site's kit", where=str(folder), fix="name the server's")
            check_port(kit)
            place = socket_folder(folder)
            stack.callback(_remove, place)
            self._door = place / "door"
            self.parent = Parent(kit, {"LICHEN_DOOR": str(self._door)}, say=say)
            stack.callback(self.parent.close)
            self._door_sites = DoorSites(self._door, fault=lambda: self.parent.fault)
            self._wait()
            self._stack = stack.pop_all()

    def _wait(self) -> None:
        patience = threading.Event()
        for _ in range(int(_START / 0.1)):
            if self.parent.ended.is_set():
                raise self.parent.fault or LichenError("the server's process ended", where="federation")
            try:
                call(self._door, {"op": "seen"}, within=SPARE)
                return
            except OSError:
                patience.wait(0.1)
        raise LichenError(f"the server's process did not come up in {_START:.0f} seconds", where="federation")

    def start(self) -> None:
        """Nothing: sites come by themselves."""

    def seen(self) -> Mapping[str, Seen]:
        """Who is there now; nobody while the server's process is started again."""
        return self._door_sites.seen()

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        """Ask one question and give its answer; see :meth:`lichen.federation.asking.DoorSites.ask`."""
        return self._door_sites.ask(site, kind, body, within)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until its person has stopped it; see :meth:`SiteEnd.wait`."""
        if not self.parent.ended.wait(seconds):
            return False
        if self.parent.fault is not None:
            raise self.parent.fault
        return True

    def close(self) -> None:
        """End the server's process; sites go on and wait for the next one."""
        self._stack.close()

    def __enter__(self) -> NetworkSites:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@final
class SiteEnd:
    """A site's end of the network: answers what the server asks.

    Args:
        folder: The site's kit.
        answer: Gives the bytes that answer a question, of its kind and body; called by several threads at once. It
            declines with a :class:`LichenError`; whatever else it raises is a fault, of which only the kind is told.
        say: Told what keeps the site from the server.
        versions: What must agree at both ends, beside those of lichen, torch, numpy and Python.
        instance: Another one after every start of the process; empty: drawn.
        status: What the site is doing, as JSON can hold it, for its own person.

    Raises:
        LichenError: if another process runs the kit.
    """

    def __init__(
        self,
        folder: Path,
        answer: Callable[[str, bytes], bytes],
        *,
        say: Callable[[str], None],
        versions: Mapping[str, str] | None = None,
        instance: str = "",
        status: Callable[[], Head] = dict,
    ) -> None:
        self.joined, self._leaving = threading.Event(), threading.Event()
        self.instance = instance or uuid.uuid4().hex
        self._give, self._status = answer, status
        with ExitStack() as stack:
            kit = stack.enter_context(hold_kit(folder, say=say))
            if kit.kind != "site":
                raise LichenError("is the server's kit", where=str(folder), fix="name a site's")
            self.name = kit.name
            place = socket_folder(folder)
            stack.callback(_remove, place)
            door = Door(place / "door", self._answer, at_once=18)
            stack.callback(door.close)
            environment = {
                "LICHEN_DOOR": str(place / "door"),
                "LICHEN_INSTANCE": self.instance,
                "LICHEN_PATIENCE": str(_PATIENCE),
                "LICHEN_VERSIONS": json.dumps({**own_versions(), **(versions or {})}),
            }
            self.parent = Parent(kit, environment, say=say)
            stack.callback(self.parent.close)
            self._stack = stack.pop_all()

    def _answer(self, head: Head, body: bytes) -> tuple[Head, bytes]:
        if head.get("op") == "joined":
            self.joined.set()
            return {}, b""
        if head.get("op") == "leave":  # NVFlare's process waits here until this one ends
            return {"leave": self._leaving.wait(LOOK / 2)}, b""
        if head.get("op") == "status":
            return {"joined": self.joined.is_set(), **self._status()}, b""
        if head.get("op") == "stop":
            threading.Thread(target=self._leave, daemon=True).start()
            return {}, b""
        return answer_question(self._give, str(head["kind"]), body, site=self.name)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until this site can no longer be of the federation.

        Args:
            seconds: At most; None: for ever.

        Returns:
            False when the time is up.

        Raises:
            LichenError: why it is over.
        """
        if not self.parent.ended.wait(seconds):
            return False
        if self.parent.fault is not None:
            raise self.parent.fault
        return True

    def _leave(self) -> None:
        """Say goodbye to the server, and end."""
        self._leaving.set()
        self.parent.close(_GOODBYE if self.joined.is_set() else 0.0)

    def close(self) -> None:
        """Say goodbye to the server, and leave."""
        self._leave()
        self._stack.close()

    def __enter__(self) -> SiteEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def answer_question(give: Callable[[str, bytes], bytes], kind: str, body: bytes, *, site: str) -> tuple[Head, bytes]:
    """The head and body of an answer, or of the refusal.

    Args:
        give: Gives the bytes that answer a question. It declines with a :class:`LichenError`; whatever else it raises
            is a fault, of which only the kind is told.
        kind: What the question is.
        body: Its bytes.
        site: The site's name.
    """
    where = f"site {site}"
    try:
        answer = give(kind, body)
        if len(answer) > PIECE:
            what = f"answered {len(answer):,} bytes; at most {PIECE:,} are sent"
            return refusal("failed", LichenError(what, where=where)), b""
        return {}, answer
    except LichenError as error:
        return refusal("refused", error), b""
    except Exception as error:  # never its words: they may be somebody's rows
        return refusal("failed", LichenError(f"met a fault: {type(error).__name__}", where=where)), b""


def own_versions() -> dict[str, str]:
    """Of lichen, Python, torch and numpy in this process."""
    found = {"lichen": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy"):
        found[package] = metadata.version(package)
    return found


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
