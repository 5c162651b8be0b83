"""The server's end of several sites: asks them to announce themselves, gives each its place, and makes their engines.

A run needs :class:`SiteEngines` of them. Here sites are child processes, each with one file: a rehearsal, on one
machine, of a federation in which no process has more than one site's rows. :func:`enrol_sites` and :func:`join_sites`
work over any transport.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.engines.around import ForwardingEngine
from lichen.engines.federated import FederatedEngine, Patience
from lichen.engines.pipe_sites import PipeSites
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import SiteError, Sites
from lichen.recipes.schema.read import recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.announced import Announcement, Enrolled, enrolled
from lichen.recipes.sites.site_node import ANNOUNCE, JOIN, WAITING

__all__ = ["NO_STATE", "SiteEngines", "SiteProcesses", "ask_all", "enrol_sites", "join_sites"]

NO_STATE = "state/none"
"""Where in a run's folder nodes are started that keep no client's state."""

_AT_ONCE = 8
"""Sites that are asked side by side."""

_WITHIN = 60.0
"""Seconds to wait for an answer; who needs longer says so, and is asked again."""

_TRY = 60.0
"""Seconds for which a site that is gone or silent is asked again."""


class SiteEngines(Protocol):
    """Sites, as a run needs them."""

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


def ask_all(sites: Sites, kind: str, body_of: Mapping[str, bytes]) -> dict[str, bytes]:
    """Ask each of these sites one question; one that is away for a moment is asked again.

    Raises:
        LichenError: the first site's that does not answer, by its name.
    """
    end = time.monotonic() + _TRY

    def ask(site: str) -> bytes:
        while True:
            try:
                return ask_long(sites, site, kind, body_of[site], _WITHIN)
            except SiteError as error:
                if error.cause in ("gone", "silent") and time.monotonic() < end and _may_return(sites):
                    time.sleep(0.5)
                    continue
                why = error.error
                what = why.what if why.where == f"site {site}" else f"{why.where}: {why.what}"
                raise LichenError(what, where=f"site {site}", fix=why.fix) from None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(body_of, pool.map(ask, body_of), strict=True))


def enrol_sites(recipe: Recipe, sites: Sites, names: Collection[str]) -> Enrolled:
    """Ask sites to announce themselves, and make one roster of all.

    Raises:
        LichenError: for a site that does not, or announcements that do not fit each other.
    """
    announced: dict[str, Announcement] = {}
    while waiting := [name for name in names if name not in announced]:
        for site, answer in ask_all(sites, ANNOUNCE, dict.fromkeys(waiting, b"")).items():
            try:
                plain: Any = json.loads(answer)
            except (ValueError, RecursionError):
                raise LichenError("what it announces is not JSON", where=f"site {site}") from None
            if plain != WAITING:
                announced[site] = Announcement.load(plain)
    return enrolled(recipe, {name: announced[name] for name in names})


def _may_return(sites: Sites) -> bool:
    """Whether a site that is gone may come back by itself; children do not."""
    return not isinstance(sites, PipeSites)


def join_sites(sites: Sites, federation: Enrolled) -> None:
    """Give every site its place; one that has it already keeps it.

    Raises:
        LichenError: for a site that does not take it.
    """
    ask_all(sites, JOIN, {site: json.dumps(one.dump()).encode() for site, one in federation.assigned.items()})


@final
class Restarting(ForwardingEngine):
    """An engine over child processes, started again before a job where they have ended.

    Args:
        inner: The engine over them.
        sites: The processes.
    """

    def __init__(self, inner: Engine, sites: PipeSites) -> None:
        self.inner, self.sites = inner, sites

    def submit(self, job: Job) -> int:
        """The inner engine's, all sites being there."""
        self.sites.start()
        return self.inner.submit(job)

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """The inner engine's."""
        yield from self.inner.replies(numbers, until)

    def cancel(self, number: int) -> None:
        """As the inner engine."""
        self.inner.cancel(number)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProcesses:
    """Sites as child processes of this one, each with its own file of rows.

    Attributes:
        recipe_file: The recipe, which each opens for itself.
        data: Each site's file or folder, by the site's name.
    """

    recipe_file: Path
    data: Mapping[str, Path]

    def _started(self, state: Path, stack: ExitStack) -> PipeSites:
        node = (sys.executable, "-m", "lichen", "node", "--recipe", str(self.recipe_file))
        commands = {
            name: (*node, "--state", str(state / f"site-{at:03d}"), "--data", str(data))
            for at, (name, data) in enumerate(self.data.items())
        }
        sites = PipeSites(commands)
        stack.callback(sites.close)
        sites.start()
        return sites

    def enrol(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Enrolled:
        """Start all, ask who is there, and end them; see :meth:`SiteEngines.enrol`."""
        with ExitStack() as stack:
            return enrol_sites(recipe, self._started(folder / NO_STATE, stack), self.data)

    def engine(self, recipe: Recipe, federation: Enrolled, state: Path, stack: ExitStack, *, agreed: str) -> Engine:
        """Start all for this state, each with a folder of its own in it; see :meth:`SiteEngines.engine`."""
        sites = self._started(state, stack)
        join_sites(sites, federation)
        site_of: Callable[[int], str] = federation.homes.__getitem__
        # A child that is there may take as long as it likes, to load a model; one that has ended does not come back.
        patience = Patience(gone=0.0, quiet=math.inf)
        engine = FederatedEngine(sites, site_of, recipe=recipe_sha256(recipe), agreed=agreed, patience=patience)
        return Restarting(stack.enter_context(engine), sites)
