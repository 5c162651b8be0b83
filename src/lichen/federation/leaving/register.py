"""The coordinator's register: sites that have withdrawn, who was in which run, and what the others have deleted.

It lies in the server's kit, one small file for each thing that happened, so that several processes may write: a file
is written once and never changed. ``withdrawn/SITE/notice.json`` is the notice, with the site's signature, or says that
the coordinator has entered it by hand; ``withdrawn/SITE/deleted/OTHER.json`` that another site has deleted what it was
sent in runs with it; ``runs/RUN.json`` who was in a run. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import gmtime, strftime
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.federation.kits.members import SERVER, admitted, read_federation
from lichen.federation.kits.signing import authority_of
from lichen.federation.leaving.notice import TIME, Notice, require_notice

__all__ = ["Register", "sentence"]

_WITHDRAWN, _RUNS, _NOTICE, _DELETED = "withdrawn", "runs", "notice.json", "deleted"


def sentence(site: str, time: str) -> LichenError:
    """What whoever needs a withdrawn site reads."""
    what = f"has withdrawn from this federation ({time}), and is asked for nothing more"
    return LichenError(what, where=f"site {site}", fix="go on without it")


@final
class Register:
    """What a federation's coordinator knows of sites that have withdrawn.

    Args:
        folder: The federation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = folder / SERVER

    def withdrawn(self) -> dict[str, str]:
        """When each site that has withdrawn did so, by its name, as it is known now."""
        found = {}
        for file in sorted((self._server / _WITHDRAWN).glob(f"*/{_NOTICE}")):
            site = file.parent.name
            about = _read(file)
            found[site] = str(about.get("time", "")) or "at a time that is not known"
        return found

    def refusals(self) -> dict[str, LichenError]:
        """What is said of each site that has withdrawn, by its name."""
        return {site: sentence(site, time) for site, time in self.withdrawn().items()}

    def require(self, plain: object, *, site: str, nonce: str) -> Notice:
        """What a site has sent, if it is its notice; see :func:`lichen.federation.leaving.notice.require_notice`."""
        name, authority = read_federation(self.folder).name, authority_of(self._server)
        return require_notice(plain, federation=name, site=site, nonce=nonce, authority=authority)

    def add(self, site: str, notice: Notice | None) -> str:
        """Enter that a site has withdrawn, once and for all; a second entry changes nothing.

        Args:
            site: Its name.
            notice: What it has signed; None: the coordinator enters it.

        Returns:
            When it withdrew, as the register has it.

        Raises:
            LichenError: if the federation has no such site.
        """
        known = self.withdrawn()
        if site not in known:
            if site not in admitted(self.folder):
                names = ", ".join(admitted(self.folder)) or "-"
                raise LichenError(f"has no site named {site}", where=str(self.folder), fix=f"one of: {names}")
            now = strftime(TIME, gmtime())
            about = {"site": site, "time": now, "by": "the coordinator"} if notice is None else notice.dump()
            write_atomic(self._server / _WITHDRAWN / site / _NOTICE, _dump({**about, "entered": now}))
        return self.withdrawn()[site]

    def enter_run(self, run: str, folder: Path, recipe: str, sites: Sequence[str]) -> None:
        """Enter who is in a run.

        Args:
            run: Its name, as sites know it.
            folder: Where it lies.
            recipe: The recipe's name.
            sites: Who takes part.
        """
        about = {"run": run, "folder": str(folder.absolute()), "recipe": recipe, "sites": list(sites)}
        write_atomic(self._server / _RUNS / f"{run}.json", _dump(about))

    def runs_of(self, *sites: str) -> list[dict[str, Any]]:
        """The runs in which all of these sites were, each with ``run``, ``folder``, ``recipe`` and ``sites``."""
        found = [_read(file) for file in sorted((self._server / _RUNS).glob("*.json"))]
        return [one for one in found if set(sites) <= set(one.get("sites", ()))]

    def copies_at(self, site: str) -> list[dict[str, Any]]:
        """What a site is to delete: for each withdrawn one with which it was in a run ``site``, ``time`` and ``runs``.

        What it has deleted is left out.
        """
        out = []
        for gone, time in self.withdrawn().items():
            runs = [str(one["run"]) for one in self.runs_of(gone, site)]
            if gone != site and runs and not self._deleted(gone, site).exists():
                out.append({"site": gone, "time": time, "runs": runs})
        return out

    def with_copies(self, site: str) -> tuple[str, ...]:
        """Other sites that have yet to answer that they have deleted what came of runs with a withdrawn one."""
        others = {str(other) for one in self.runs_of(site) for other in one["sites"]} - self.withdrawn().keys()
        return tuple(sorted(other for other in others if not self._deleted(site, other).exists()))

    def enter_deleted(self, other: str, site: str) -> None:
        """Enter that a site has answered that it has deleted what it was sent in runs with a withdrawn one."""
        if any(one["site"] == site for one in self.copies_at(other)):
            about = {"site": other, "of": site, "time": strftime(TIME, gmtime())}
            write_atomic(self._deleted(site, other), _dump(about))

    def _deleted(self, site: str, other: str) -> Path:
        return self._server / _WITHDRAWN / site / _DELETED / f"{other}.json"


def _dump(about: Mapping[str, Any]) -> bytes:
    return json.dumps(about, indent=1).encode() + b"\n"


def _read(file: Path) -> dict[str, Any]:
    """What a file says; nothing of one that is damaged, which counts all the same."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}
