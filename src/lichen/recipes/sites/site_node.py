"""What a site answers beside the questions about jobs: who it is, and that it takes its place.

``announce`` has no body, and is answered with an announcement, or with :data:`WAITING` where the rows are not read yet;
``join`` brings what the site is assigned (:mod:`lichen.recipes.sites.announced`), and is answered with nothing. Both
are JSON, and may be asked twice. The model is loaded at the first job, since no question waits so long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from lichen.core.errors import LichenError
from lichen.recipes.sites.announced import Assignment
from lichen.recipes.sites.place import SitePlace

__all__ = ["ANNOUNCE", "JOIN", "WAITING", "site_answers"]

ANNOUNCE, JOIN = "announce", "join"

WAITING = {"waiting": True}
"""What a site says that is still reading its rows: ask again."""


def site_answers(place: SitePlace) -> Mapping[str, Callable[[bytes], bytes]]:
    """The answers of a site to the two questions, by kind."""

    def announce(body: bytes) -> bytes:
        return json.dumps(place.site.announcement.dump()).encode()

    def join(body: bytes) -> bytes:
        try:
            assigned = Assignment.load(json.loads(body))
        except (ValueError, RecursionError):
            raise LichenError("what it is assigned is not JSON", where="roster") from None
        place.take(assigned)
        return b""

    return {ANNOUNCE: announce, JOIN: join}
