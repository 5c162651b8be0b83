"""The server's end of several sites: asks them to announce themselves, gives each its place, and makes their engines.

A run needs :class:`SiteEngines` of them. Here sites are child processes, each with one file: a rehearsal, on one
machine, of a federation in which no process has more than one site's rows. :func:`announcements` and :func:`join_sites`
work over any transport.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, final

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.files.record import Signer
from lichen.engines.federated import FederatedEngine
from lichen.engines.pipe_sites import PipeSites
from lichen.engines.remote.errands import CHILDREN, Patience
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import SiteError, Sites
from lichen.recipes.assemble.sides.row_privacy import hides_rows
from lichen.recipes.schema.read import recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.announced import Announcement, Enrolled, enrolled
from lichen.recipes.sites.site_node import ANNOUNCE, JOIN, WAITING

__all__ = [
    "SiteEngines",
    "SiteProcesses",
    "announcements",
    "ask_all",
    "engine_over",
    "join_sites",
    "state_name",
]

SITES = "sites"
"""Where in the folder of a run's state sites that are children have theirs, a folder each."""

_AT_ONCE = 8
"""Sites that are asked side by side."""

_WITHIN = 60.0
"""Seconds to wait for an answer; who needs longer says so, and is asked again."""

_TRY = 90.0
"""Seconds for which a site that is gone or silent is asked again: longer than one answer, as a question may be lost."""


class SiteEngines(Protocol):
    """Sites, as a run needs them.

    Attributes:
        left_out: What the recipe compared with before it was given to them, and why not any more.
        signer: Whose key signs the run's record; None: its own.
    """

    left_out: Mapping[str, str]
    signer: Signer | None

    def enrol(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Enrolled:
        """Ask who is there, and make one roster of all.

        Args:
            recipe: The recipe.
            folder: The run's.
            say: Called with lines of progress.

        Raises:
            LichenError: for a site that does not take part, or announcements that do not fit each other.
        """
        ...

    def engine(self, recipe: Recipe, federation: Enrolled, state: Path, stack: ExitStack, *, agreed: str) -> Engine:
        """The engine over the sites, until the stack is closed.

        Args:
            recipe: The recipe.
            federation: All sites.
            state: The folder of the clients' private state, in the run's.
            stack: Ends them.
            agreed: Digest of the tensors that all begin from, where changes alone are sent down; else empty.

        Raises:
            LichenError: for a site that does not take its place.
        """
        ...

    def departed(self) -> frozenset[int]:
        """Clients whose sites have left the federation since the run began."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


def state_name(folder: Path, state: Path) -> str:
    """How sites call a private state.

    Args:
        folder: The run's.
        state: Where a simulation keeps it.
    """
    return state.relative_to(folder / "state").as_posix()


def ask_all(sites: Sites, kind: str, body_of: Mapping[str, bytes], patience: Patience) -> dict[str, bytes]:
    """Ask each of these sites one question; one that may be waited for is asked again for a moment.

    Raises:
        LichenError: the first site's that does not answer, by its name.
    """
    end = time.monotonic() + _TRY

    def ask(site: str) -> bytes:
        while True:
            try:
                return ask_long(sites, site, kind, body_of[site], _WITHIN)
            except SiteError as error:
                if patience.of(error.cause) > 0 and time.monotonic() < end:
                    time.sleep(0.5)
                    continue
                why = error.error
                what = why.what if why.where == f"site {site}" else f"{why.where}: {why.what}"
                raise LichenError(what, where=f"site {site}", fix=why.fix) from None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(body_of, pool.map(ask, body_of), strict=True))


def announcements(sites: Sites, names: Collection[str], patience: Patience) -> dict[str, Announcement]:
    """What sites announce, by their names, in this order.

    Raises:
        LichenError: for a site that does not.
    """
    announced: dict[str, Announcement] = {}
    while waiting := [name for name in names if name not in announced]:
        for site, answer in ask_all(sites, ANNOUNCE, dict.fromkeys(waiting, b""), patience).items():
            try:
                plain: Any = json.loads(answer)
            except (ValueError, RecursionError):
                raise LichenError("what it announces is not JSON", where=f"site {site}") from None
            if plain != WAITING:
                announced[site] = Announcement.load(plain)
    return {name: announced[name] for name in names}


def join_sites(sites: Sites, federation: Enrolled, patience: Patience) -> None:
    """Give every site its place; one that has it already keeps it.

    Raises:
        LichenError: for a site that does not take it.
    """
    ask_all(sites, JOIN, {site: json.dumps(one.dump()).encode() for site, one in federation.assigned.items()}, patience)


def engine_over(
    sites: Sites, recipe: Recipe, federation: Enrolled, state: str, agreed: str, patience: Patience
) -> FederatedEngine:
    """The engine over sites that have their places, which are given once more.

    Args:
        sites: The transport.
        recipe: The recipe.
        federation: All sites.
        state: Name of the private state that its jobs are for.
        agreed: As :meth:`SiteEngines.engine` has it.
        patience: How long a site is waited for.

    Raises:
        LichenError: for a site that does not take its place.
    """
    join_sites(sites, federation, patience)
    site_of = federation.homes.__getitem__
    digest = recipe_sha256(recipe)
    hides_clients = recipe.noised is not None and not hides_rows(recipe)
    named = len(federation.roster) if hides_clients else None  # how many have come is a release
    return FederatedEngine(sites, site_of, recipe=digest, state=state, agreed=agreed, patience=patience, named=named)


@final
class SiteProcesses:
    """Sites as child processes of this one, each with its own file of rows, for one run.

    Args:
        recipe_file: The recipe, which each opens for itself.
        data: Each site's file or folder, by the site's name.
    """

    def __init__(self, recipe_file: Path, data: Mapping[str, Path]) -> None:
        self.recipe_file, self.data = recipe_file, data
        self.left_out: Mapping[str, str] = {}
        self.signer: Signer | None = None
        self._folder, self._sites = Path(), PipeSites({})

    def enrol(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Enrolled:
        """Start all, and ask who is there; see :meth:`SiteEngines.enrol`."""
        node = (sys.executable, "-m", "lichen", "node", "--recipe", str(self.recipe_file))
        commands = {
            name: (*node, "--state", str(folder / "state" / SITES / f"{at:03d}"), "--data", str(data))
            for at, (name, data) in enumerate(self.data.items())
        }
        self._folder, self._sites = folder, PipeSites(commands)
        self._sites.start()
        return enrolled(recipe, announcements(self._sites, self.data, CHILDREN))

    def engine(self, recipe: Recipe, federation: Enrolled, state: Path, stack: ExitStack, *, agreed: str) -> Engine:
        """The engine over the children; see :meth:`SiteEngines.engine`."""
        name = state_name(self._folder, state)
        return stack.enter_context(engine_over(self._sites, recipe, federation, name, agreed, CHILDREN))

    def departed(self) -> frozenset[int]:
        """None: children do not leave; see :meth:`SiteEngines.departed`."""
        return frozenset()

    def close(self) -> None:
        """End the children."""
        self._sites.close()
