"""Counts or drops rows that several clients hold.

A client's own test rows are kept apart from its own training rows. Where clients share texts, one client's test row may
stand in another's training rows: the federation and pooled training have then seen it, training alone has not, and the
gain is too large. Clients are compared by digests of their rows, never by the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lichen.core.errors import LichenError
from lichen.data.reading import Copies, Left
from lichen.data.sources.record import Record
from lichen.data.splits.fingerprint import fingerprint
from lichen.data.splits.overlap import elsewhere
from lichen.recipes.rows.partition import ClientData, Partitioned, first_of, reads_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["apart"]


def apart(recipe: Recipe, partitioned: Partitioned, public: Sequence[Record]) -> tuple[Partitioned, Copies | None]:
    """``(the clients_data, their copies)``, by ``data.copies``.

    ``drop`` takes out validation and test rows that stand in another client's training rows or among the public rows,
    and leaves training rows as they are: each column is then scored on rows that nobody has learned from, and
    training alone learns from all that a client would have by itself.

    Args:
        recipe: Its data section.
        partitioned: The clients.
        public: Rows that are everybody's.

    Raises:
        LichenError: with ``drop``, for a client that is left without a row to be scored on.
    """
    if recipe.data.copies == "keep":
        return partitioned, None
    clients_data = partitioned.clients_data
    held = [_fingerprints(recipe, client_data.train) for client_data in clients_data] + [_fingerprints(recipe, public)]
    valid, test = (
        elsewhere(held, [_fingerprints(recipe, getattr(client_data, name)) for client_data in clients_data])
        for name in ("valid", "test")
    )
    if recipe.data.copies == "drop":
        return _dropped(recipe, partitioned, valid, test), Copies(
            rows=0, test_rows=_count(clients_data, test)[1], clients=0
        )
    rows, of = _count(clients_data, test)
    return partitioned, Copies(rows=rows, test_rows=of, clients=sum(any(some) for some in test))


def _fingerprints(recipe: Recipe, rows: Sequence[Record]) -> list[str]:
    return [fingerprint(row, reads=reads_of(recipe)) for row in rows]


def _count(clients_data: Sequence[ClientData], test: Sequence[Sequence[bool]]) -> tuple[int, int]:
    own = sorted(set(first_of([client_data.test for client_data in clients_data])))
    return sum(sum(test[at]) for at in own), sum(len(test[at]) for at in own)


def _dropped(
    recipe: Recipe, partitioned: Partitioned, valid: Sequence[Sequence[bool]], test: Sequence[Sequence[bool]]
) -> Partitioned:
    clients_data: list[ClientData] = []
    rows, gone = 0, list[ClientData]()
    made: dict[int, tuple[Record, ...]] = {}  # a test set that all clients share stays one
    for client_data, old_valid, old_test in zip(partitioned.clients_data, valid, test, strict=True):
        if id(client_data.test) not in made:
            made[id(client_data.test)] = tuple(
                row for row, copy in zip(client_data.test, old_test, strict=True) if not copy
            )
            rows += len(client_data.test) - len(made[id(client_data.test)])
        new_valid = tuple(row for row, copy in zip(client_data.valid, old_valid, strict=True) if not copy)
        new = replace(client_data, valid=new_valid, test=made[id(client_data.test)])
        if (client_data.valid and not new.valid) or (client_data.test and not new.test):
            gone.append(new)
        else:
            clients_data.append(new)
        rows += len(client_data.valid) - len(new.valid)
    if gone and (recipe.data.on_too_few_rows == "refuse" or not clients_data):
        part = "test" if gone[0].valid else "validation"
        raise LichenError(
            f"client {gone[0].name!r} has no {part} row that no other client trains on",
            where="data.copies",
            fix="set data.on_too_few_rows: drop so that such clients stay out, or data.copies: count",
        )
    why = "validation and test rows that another client trains on (data.copies: drop)"
    whole = Left(
        why="clients without a row that no other trains on (data.copies: drop)",
        rows=sum(len(o.train) + len(o.valid) + len(o.test) for o in gone),
        clients=len(gone),
    )
    return Partitioned(clients_data=tuple(clients_data), left=(*partitioned.left, Left(why=why, rows=rows), whole))
