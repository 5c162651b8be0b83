"""Keeps a site's place in the roster beside the private state of its clients, which it numbers.

In the folder of a site's state ``announced.json`` is what the site says of its rows, for a person to read, too, and
``place.json`` what it has been assigned. A site that is started again has its place, and none can come to use another
client's state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.recipes.sites.announced import Assignment
from lichen.recipes.sites.loaded_site import LoadedSite
from lichen.recipes.sites.open_site import Site

__all__ = ["SitePlace"]

ANNOUNCED, PLACE = "announced.json", "place.json"

_ANEW = "start the site with another folder for its state"


@final
class SitePlace:
    """A site, and its place in the roster once it has one.

    Args:
        site: The site, its rows read.
        state: The folder of its state.

    Attributes:
        site: The same.
        assigned: Its place; None before it has one.

    Raises:
        LichenError: if the folder is that of other rows, or damaged.
    """

    def __init__(self, site: Site, state: Path) -> None:
        self.site, self.state = site, state
        self.assigned: Assignment | None = None
        self._loaded: LoadedSite | None = None
        announced, before = site.announcement.dump(), _json(state / ANNOUNCED)
        saved = _json(state / PLACE)
        if saved is not None:
            self.assigned = Assignment.load(saved)
            if _rows_of(before) != _rows_of(announced):
                raise LichenError(
                    "secret keys or rows have changed since the site took its place in the roster",
                    where=str(state / PLACE),
                    fix=_ANEW,
                )
        if before != announced:
            write_atomic(state / ANNOUNCED, json.dumps(announced).encode())

    def take(self, assigned: Assignment) -> None:
        """Take a place, and keep it; the same one may be taken twice.

        Raises:
            LichenError: if the place is for other clients or labels, or the site has another.
        """
        self.site.check(assigned)
        if self.assigned not in (None, assigned):
            raise LichenError(
                "this site has another place in the roster, and private state that goes with it",
                where=str(self.state / PLACE),
                fix=_ANEW,
            )
        if self.assigned is None:
            write_atomic(self.state / PLACE, json.dumps(assigned.dump()).encode())
            self.assigned = assigned

    def loaded(self) -> LoadedSite:
        """The site at its place; the model is loaded the first time.

        Raises:
            LichenError: if it has none yet, or the model does not load.
        """
        if self.assigned is None:
            raise LichenError(
                "this site has no place in the roster yet",
                where=str(self.state / PLACE),
                fix=f"the server assigns one by what {ANNOUNCED} says",
            )
        if self._loaded is None:
            self._loaded = self.site.join(self.assigned, self.state)
        return self._loaded


def _rows_of(announced: Any) -> Any:
    """All but the data cards and the certificate, which may be renewed while a run goes on."""
    if not isinstance(announced, dict):
        return None
    return {key: value for key, value in announced.items() if key not in ("cards", "passport")}


def _json(file: Path) -> Any:
    """What a file holds; None where there is none."""
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise LichenError("is damaged", where=str(file), fix=_ANEW) from None
