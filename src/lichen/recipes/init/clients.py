"""Guesses which column is the client."""

from __future__ import annotations

from collections.abc import Sequence

from lichen.recipes.init.facts import ColumnFacts
from lichen.recipes.init.names import NAMES, Ask, Roles, Wishes, named

__all__ = ["client_of"]

MIN_ROWS = 20
"""Rows that say little about how often a client's name comes back."""


def client_of(roles: Roles, free: Sequence[ColumnFacts], wishes: Wishes, by_file: bool, ask: Ask | None) -> str | None:
    """Who owns the rows; the names of persons and sites go first, then those of places."""
    if wishes.client is not None:
        return wishes.client
    if by_file:
        return None
    scalar = [column for column in free if column.counts and column.kind not in ("real", "date", "link")]
    found = named("client", scalar, lambda column: column.repeats or len(column.counts) == 1 or column.rows < MIN_ROWS)
    if found is not None:
        return found.name
    could = [c for c in scalar if c.repeats and len(c.counts) > 1 and (_unit(c) or c.plain in NAMES["place"])]
    candidates = [column for column in could if column.plain in NAMES["place"]]
    candidates.sort(key=lambda column: NAMES["place"].index(column.plain))
    if len(could) > 0 and ask is not None:
        answers = [f"{column.name} ({len(column.counts)} clients)" for column in could]
        chosen = ask("Which column tells the clients apart?", [*answers, "none: deal rows out at random"])
        return could[chosen].name if chosen < len(could) else None
    for column in could:
        roles.left[column.name] = f"could be the client: --client {column.name!r}"
    return candidates[0].name if candidates else None


def _unit(column: ColumnFacts) -> bool:
    """Whether a column numbers things that several rows are about."""
    return column.plain.endswith("_id")
