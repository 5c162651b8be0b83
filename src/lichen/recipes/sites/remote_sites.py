"""Sites that are there already, asked over a network: what a run needs of them beside its jobs.

A recipe goes to each site as text, and each says yes, or no with a reason, before anything else is asked. Then sites
announce themselves, which may take as long as reading their files and loading a model does, and take their places. At
the end each is told that the run is over; what its clients keep stays at the site.

A run that goes on may do so while a site of it is away: that one is given the recipe and its place when it comes.

A site may leave the federation while a run goes on. Its clients stay in the roster, by what it has announced, and a
refusal comes in place of what they would answer, also where the run is gone on with later.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.record import Signer
from lichen.engines.remote.errands import Patience
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import Seen, SiteError, Sites
from lichen.engines.withdrawal.leaving import LeavingEngine
from lichen.recipes.schema.read import recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.announced import Announcement, Enrolled, enrolled
from lichen.recipes.sites.site_engines import announcements, ask_all, engine_over, state_name
from lichen.recipes.sites.site_node import ANNOUNCE, JOIN, WAITING

__all__ = ["OVER", "PROPOSE", "RemoteSites", "sites_of_run"]

PROPOSE, OVER = "propose", "over"

ANNOUNCED = "state/announced.json"
"""The file of a run's folder with what its sites have announced."""

RUN = "state/run.json"
"""The file of a run's folder with its name, by which sites know it again, and what was left out of its recipe."""

_BRIEF = 30.0
"""Seconds for an answer that needs no work."""


@final
class _Latecomers:
    """Sites some of which are given recipe and place when they come; :class:`lichen.engines.sites.Sites`."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self._due: dict[str, tuple[bytes, bytes]] = {}
        self._lock = threading.Lock()

    def add(self, site: str, proposal: bytes, place: bytes) -> None:
        """One that is not there: what it is to be asked first."""
        self._due[site] = proposal, place

    @property
    def expected(self) -> set[str]:
        """Those who have not come yet."""
        return set(self._due)

    def start(self) -> None:
        self._sites.start()

    def seen(self) -> Mapping[str, Seen]:
        return self._sites.seen()

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        """One question; before the first, a site that has come is given what all others have."""
        if site in self._due and kind != OVER:
            with self._lock:
                self._introduce(site, within)
        return self._sites.ask(site, kind, body, within)

    def _introduce(self, site: str, within: float) -> None:
        if site not in self._due:
            return
        proposal, place = self._due[site]
        ask_long(self._sites, site, PROPOSE, proposal, within)
        answer = ask_long(self._sites, site, ANNOUNCE, b"", within)
        if answer == json.dumps(WAITING).encode():
            raise SiteError(site, "gone", LichenError("reads its rows", where=f"site {site}"))
        ask_long(self._sites, site, JOIN, place, within)
        del self._due[site]

    def close(self) -> None:
        self._sites.close()


@final
class RemoteSites:
    """Sites of a federation, for one run.

    Args:
        sites: The transport.
        names: Those that take part.
        patience: How long a site is waited for.
        left_out: What the recipe compared with before it was submitted, and why not any more; the run keeps it.
        signer: Whose key signs the run's record; None: its own.
        left: Gives the sites that have left the federation by now, and what is said of each.
        look: Called with a site of whom a client has said that it has left, so that it is among those.
        enrolled: Called with the run's name, its folder, the recipe's name and the sites, once all have said yes.
    """

    def __init__(
        self,
        sites: Sites,
        names: Sequence[str],
        *,
        patience: Patience | None = None,
        left_out: Mapping[str, str] | None = None,
        signer: Signer | None = None,
        left: Callable[[], Mapping[str, LichenError]] = dict,
        look: Callable[[str], None] = lambda site: None,
        enrolled: Callable[[str, Path, str, Sequence[str]], None] = lambda *_: None,
    ) -> None:
        self.sites, self.names, self.patience = _Latecomers(sites), tuple(names), patience or Patience()
        self.left_out: Mapping[str, str] = left_out or {}
        self.signer, self._left, self._look, self._enrolled = signer, left, look, enrolled
        self._folder, self._run = Path(), ""
        self._homes: tuple[str, ...] = ()

    def enrol(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Enrolled:
        """Submit the recipe to all, and make one roster of those who said yes.

        See :meth:`lichen.recipes.sites.site_engines.SiteEngines.enrol`.
        """
        self._folder = folder
        self._run, self.left_out = _saved_about(folder / RUN, self.left_out)
        saved, gone = _saved_announcements(folder / ANNOUNCED), self._left().keys()
        away = (saved.keys() & set(self.names)) - self.sites.seen().keys() - gone
        here = [site for site in self.names if site not in gone | away]
        proposal = json.dumps({"run": self._run, "recipe": write_recipe(recipe)}).encode()
        for site, answer in ask_all(self.sites, PROPOSE, dict.fromkeys(here, proposal), self.patience).items():
            if _accepted(answer) != recipe_sha256(recipe):
                what = "reads another recipe in the text that was submitted"
                fix = "both ends must run the same version of lichen"
                raise LichenError(what, where=f"site {site}", fix=fix)
            say(f"{site} says yes to the recipe")
        found = announcements(self.sites, here, self.patience)
        for site in sorted(away):
            say(f"{site} is not there, and is given its place in the run when it comes")
        for site in gone & saved.keys():
            say(f"{site} has left the federation, and the run goes on without it")
        order = dict.fromkeys((*(site for site in saved if site in found or site in gone | away), *found))
        announced = {site: found.get(site) or saved[site] for site in order}
        federation = enrolled(recipe, announced)
        self._homes = federation.homes
        for site in away:
            self.sites.add(site, proposal, json.dumps(federation.assigned[site].dump()).encode())
        dumped = {site: one.dump() for site, one in announced.items()}
        write_atomic(folder / ANNOUNCED, json.dumps(dumped).encode())
        self._enrolled(self._run, folder, recipe.name, tuple(announced))
        return federation

    def engine(self, recipe: Recipe, federation: Enrolled, state: Path, stack: ExitStack, *, agreed: str) -> Engine:
        """The engine over the sites; the folder's name tells them which private state is meant.

        See :meth:`lichen.recipes.sites.site_engines.SiteEngines.engine`.
        """
        name = state_name(self._folder, state)
        while True:
            left = self._left().keys()
            absent = left | self.sites.expected
            here = replace(federation, assigned={s: one for s, one in federation.assigned.items() if s not in absent})
            try:
                inner = engine_over(self.sites, recipe, here, name, agreed, self.patience)
            except LichenError:
                if self._left().keys() == left:
                    raise
                continue  # one has left since
            return LeavingEngine(
                stack.enter_context(inner), self._gone, look=lambda client: self._look(self._homes[client])
            )

    def _gone(self) -> dict[int, LichenError]:
        """Clients whose sites have left by now, and what is said of these."""
        left = self._left()
        return {client: left[site] for client, site in enumerate(self._homes) if site in left}

    def departed(self) -> frozenset[int]:
        """See :meth:`lichen.recipes.sites.site_engines.SiteEngines.departed`."""
        return frozenset(self._gone())

    def close(self) -> None:
        """Tell every site that the run is over, as far as it is there."""
        body = json.dumps({"run": self._run}).encode()
        for site in self.names if self._run else ():
            with suppress(SiteError):
                ask_long(self.sites, site, OVER, body, _BRIEF)


def _saved_about(file: Path, left_out: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    """A run's name, drawn once for its folder, and what was left out of its recipe."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(file.read_text(encoding="utf-8"))
        return str(saved["run"]), {str(key): str(why) for key, why in saved["left_out"].items()}
    name = os.urandom(8).hex()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"run": name, "left_out": dict(left_out)}).encode())
    return name, left_out


def sites_of_run(folder: Path) -> tuple[str, ...]:
    """The sites with which a run has begun; none where it has not.

    Args:
        folder: The run's.

    Raises:
        LichenError: if its file of them is damaged.
    """
    return tuple(_saved_announcements(folder / ANNOUNCED))


def _saved_announcements(file: Path) -> dict[str, Announcement]:
    """What sites have announced when the run began, by their names; none where it begins now."""
    if not file.exists():
        return {}
    try:
        return {str(site): Announcement.load(one) for site, one in json.loads(file.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise LichenError("is damaged", where=str(file), fix="put it back from a copy") from None


def _accepted(answer: bytes) -> str:
    """The digest that a site says yes to; empty where it says something else."""
    try:
        plain: Any = json.loads(answer)
    except (ValueError, RecursionError):
        return ""
    return str(plain.get("accepted", "")) if isinstance(plain, Mapping) else ""
