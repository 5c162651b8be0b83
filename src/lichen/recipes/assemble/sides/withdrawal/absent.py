"""Clients that never took part (``federation.absent``): their numbers, and the engine in which they do not answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.replies import ATTENDED, Attendance, Refusal
from lichen.core.roster import declared_name
from lichen.core.visible import listed
from lichen.data.batches.shards import Shard
from lichen.engines.ranks import Ranks
from lichen.engines.withdrawal.absent import ABSENT as GONE
from lichen.engines.withdrawal.absent import AbsentEngine, what_absent
from lichen.recipes.rows.partition import ClientData
from lichen.recipes.schema.recipe import Recipe

__all__ = ["absent_of", "attendance_without", "no_such_client", "rows_left", "shards_left", "without_absent"]

KEY = "federation.absent"


def absent_of(recipe: Recipe, names: Sequence[str]) -> frozenset[int]:
    """The numbers of the clients that a recipe says never took part.

    Args:
        recipe: The recipe.
        names: The clients' own names, in roster order.

    Raises:
        LichenError: for a name that no client has, and if nobody would be left.
    """
    known = {declared_name(name): number for number, name in enumerate(names)}
    for name in recipe.federation.absent:
        if name not in known:
            raise no_such_client(name, tuple(known), where=KEY)
    found = frozenset(known[name] for name in recipe.federation.absent)
    if found and len(found) == len(known):
        raise LichenError("names all clients, so that nobody is left", where=KEY, fix="leave some of them out")
    return found


def no_such_client(name: str, names: Sequence[str], *, where: str) -> LichenError:
    """The error for a name that no client has, with those that are nearest to it."""
    fix = f"use a name of roster.json: {listed(names, near=name, most=3)}"
    return LichenError(f"no client is called {name!r}", where=where, fix=fix)


def rows_left(clients_data: Sequence[ClientData], absent: Collection[int]) -> tuple[ClientData, ...]:
    """The clients, those that are absent without a row."""
    return tuple(
        ClientData(name=one.name, train=(), valid=(), test=()) if client in absent else one
        for client, one in enumerate(clients_data)
    )


def shards_left(shards: Sequence[Shard], absent: Collection[int]) -> tuple[Shard, ...]:
    """One shard a client, those of the absent ones empty."""
    return tuple(shard.between(0, 0) if client in absent else shard for client, shard in enumerate(shards))


def attendance_without(clients: int, absent: Collection[int]) -> Attendance:
    """Who came to a round to which all were invited; nothing is told where nobody is absent."""
    if not absent:
        return ATTENDED
    gone = [Refusal(client=client, reason=GONE, what=what_absent(client), where=KEY) for client in sorted(absent)]
    return Attendance.of(range(clients), set(range(clients)) - set(absent), gone)


def without_absent(engine: Engine, absent: Collection[int], ranks: Ranks | None = None) -> Engine:
    """The engine, in which the absent clients do not answer; itself where all are there.

    Args:
        engine: Asks all clients of the roster.
        absent: Numbers of those who never took part.
        ranks: Who runs it together.
    """
    return AbsentEngine(engine, absent, first=ranks is None or ranks.first) if absent else engine
