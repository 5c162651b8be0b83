"""The server's end of several sites: asks them to announce themselves, gives each its place, and makes their engines.

Here sites are child processes, each with one file: a rehearsal, on one machine, of a federation in which no process has
more than one site's rows. :func:`enrol_sites` and :func:`join_sites` work over any transport.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.engines.around import ForwardingEngine
from lichen.engines.federated import FederatedEngine, Patience
from lichen.engines.pipe_sites import PipeSites
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import SiteError, Sites
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.announced import Announcement, Enrolled, enrolled
from lichen.recipes.sites.site_node import ANNOUNCE, JOIN

__all__ = ["SiteProcesses"]

_AT_ONCE = 8
"""Sites that are asked side by side."""

_WITHIN = 600.0
"""Seconds to wait for an announcement: a large file is read first."""


def ask_all(sites: Sites, kind: str, body_of: Mapping[str, bytes]) -> dict[str, bytes]:
    """Ask each of these sites one question.

    Raises:
        LichenError: the first site's that does not answer, by its name.
    """

    def ask(site: str) -> bytes:
        try:
            return ask_long(sites, site, kind, body_of[site], _WITHIN)
        except SiteError as error:
            why = error.error
            raise LichenError(f"{why.where}: {why.what}", where=f"site {site}", fix=why.fix) from None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(body_of, pool.map(ask, body_of), strict=True))


def enrol_sites(recipe: Recipe, sites: Sites, names: Collection[str]) -> Enrolled:
    """Ask sites to announce themselves, and make one roster of all.

    Raises:
        LichenError: for a site that does not, or announcements that do not fit each other.
    """
    announced: dict[str, Announcement] = {}
    for site, answer in ask_all(sites, ANNOUNCE, dict.fromkeys(names, b"")).items():
        try:
            plain: Any = json.loads(answer)
        except (ValueError, RecursionError):
            raise LichenError("what it announces is not JSON", where=f"site {site}") from None
        announced[site] = Announcement.load(plain)
    return enrolled(recipe, announced)


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
        digest: The recipe's.
        data: Each site's file or folder, by the site's name.
    """

    recipe_file: Path
    digest: str
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

    def enrol(self, recipe: Recipe, state: Path) -> Enrolled:
        """Start all, ask who is there, and end them.

        Args:
            recipe: The recipe.
            state: A folder that no client's state is kept in.

        Raises:
            LichenError: as :func:`enrol_sites`.
        """
        with ExitStack() as stack:
            return enrol_sites(recipe, self._started(state, stack), self.data)

    def engine(self, federation: Enrolled, state: Path, stack: ExitStack, *, agreed: str) -> Engine:
        """The engine over the sites, until the stack is closed.

        Args:
            federation: All sites.
            state: Where each keeps its clients' private state, in a folder of its own.
            stack: Ends them.
            agreed: Digest of the tensors that all begin from, where changes alone are sent down; else empty.

        Raises:
            LichenError: as :func:`join_sites`.
        """
        sites = self._started(state, stack)
        join_sites(sites, federation)
        site_of: Callable[[int], str] = federation.homes.__getitem__
        # A child that is there may take as long as it likes, to load a model; one that has ended does not come back.
        patience = Patience(gone=0.0, quiet=math.inf)
        engine = FederatedEngine(sites, site_of, recipe=self.digest, agreed=agreed, patience=patience)
        return Restarting(stack.enter_context(engine), sites)
