"""Sites that are there already, asked over a network: what a run needs of them beside its jobs.

A recipe goes to each site as text, and each says yes, or no with a reason, before anything else is asked. Then sites
announce themselves, which may take as long as reading their files and loading a model does, and take their places. At
the end each is told that the run is over; what its clients keep stays at the site.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, final

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.record import Signer
from lichen.engines.remote.errands import Patience
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import SiteError, Sites
from lichen.recipes.schema.read import recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.announced import Enrolled
from lichen.recipes.sites.site_engines import ask_all, engine_over, enrol_sites, state_name

__all__ = ["OVER", "PROPOSE", "RemoteSites"]

PROPOSE, OVER = "propose", "over"

RUN = "state/run.json"
"""The file of a run's folder with its name, by which sites know it again, and what was left out of its recipe."""

_BRIEF = 30.0
"""Seconds for an answer that needs no work."""


@final
class RemoteSites:
    """Sites of a federation, for one run.

    Args:
        sites: The transport.
        names: Those that take part.
        patience: How long a site is waited for.
        left_out: What the recipe compared with before it was submitted, and why not any more; the run keeps it.
        signer: Whose key signs the run's record; None: its own.
    """

    def __init__(
        self,
        sites: Sites,
        names: Sequence[str],
        *,
        patience: Patience | None = None,
        left_out: Mapping[str, str] | None = None,
        signer: Signer | None = None,
    ) -> None:
        self.sites, self.names, self.patience = sites, tuple(names), patience or Patience()
        self.left_out: Mapping[str, str] = left_out or {}
        self.signer = signer
        self._folder, self._run = Path(), ""

    def enrol(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Enrolled:
        """Submit the recipe to all, and make one roster of those who said yes.

        See :meth:`lichen.recipes.sites.site_engines.SiteEngines.enrol`.
        """
        self._folder = folder
        self._run, self.left_out = _saved_about(folder / RUN, self.left_out)
        proposal = json.dumps({"run": self._run, "recipe": write_recipe(recipe)}).encode()
        for site, answer in ask_all(self.sites, PROPOSE, dict.fromkeys(self.names, proposal), self.patience).items():
            if _accepted(answer) != recipe_sha256(recipe):
                what = "reads another recipe in the text that was submitted"
                fix = "both ends must run the same version of lichen"
                raise LichenError(what, where=f"site {site}", fix=fix)
            say(f"{site} says yes to the recipe")
        return enrol_sites(recipe, self.sites, self.names, self.patience)

    def engine(self, recipe: Recipe, federation: Enrolled, state: Path, stack: ExitStack, *, agreed: str) -> Engine:
        """The engine over the sites; the folder's name tells them which private state is meant.

        See :meth:`lichen.recipes.sites.site_engines.SiteEngines.engine`.
        """
        name = state_name(self._folder, state)
        return stack.enter_context(engine_over(self.sites, recipe, federation, name, agreed, self.patience))

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


def _accepted(answer: bytes) -> str:
    """The digest that a site says yes to; empty where it says something else."""
    try:
        plain: Any = json.loads(answer)
    except (ValueError, RecursionError):
        return ""
    return str(plain.get("accepted", "")) if isinstance(plain, Mapping) else ""
