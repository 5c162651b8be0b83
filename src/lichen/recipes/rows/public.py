"""Splits off public rows, and hides labels.

Where clients hold their own rows, whole clients are drawn to be public, so that nobody in the federation has a
public row; where clients are drawn, rows are drawn before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.seeds import derive, numpy_generator
from lichen.data.reading import Copies, Left
from lichen.data.sources.records import Record
from lichen.recipes.rows.partition import ClientData, common_of, draw_clients, part, rows_by_client
from lichen.recipes.rows.shared_rows import apart
from lichen.recipes.schema.recipe import Recipe

__all__ = ["PublicSplit", "labelled_of", "split_public", "unlabelled_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSplit:
    """The clients, and what is nobody's.

    Attributes:
        clients_data: The clients, in roster order; rows beyond ``data.labels`` have no label.
        labelled: Public rows with their labels.
        unlabelled: Public rows whose labels are gone.
        left: What was left out on the way.
        copies: Test rows that other clients train on; None where they were not counted.
    """

    clients_data: tuple[ClientData, ...]
    labelled: tuple[Record, ...] = ()
    unlabelled: tuple[Record, ...] = ()
    left: tuple[Left, ...] = ()
    copies: Copies | None = None


def split_public(recipe: Recipe, records: Sequence[Record]) -> PublicSplit:
    """Part the records: public ones, and each client's into train, valid and test.

    Raises:
        LichenError: as :func:`lichen.recipes.rows.prepare.split_clients`, or if the public rows are too few.
    """
    public = recipe.data.public
    labelled: tuple[Record, ...] = ()
    unlabelled: tuple[Record, ...] = ()
    left: tuple[Left, ...] = ()
    if public is None:
        partitioned = part(recipe, records)
    elif recipe.data.partition.by == "client":
        rows, nobody = rows_by_client(recipe, records)
        names = sorted(rows)
        order = numpy_generator(recipe.seed, "public owners").permutation(len(names))
        given = {names[i] for i in order[: int(public.share * len(names))]}
        pool = [r for name in sorted(given) for r in rows[name]]
        labelled, unlabelled = _split_labelled(recipe, pool)
        left = (nobody, _unasked(pool, labelled, unlabelled))
        partitioned = draw_clients(recipe, {name: of for name, of in rows.items() if name not in given})
    else:
        common = common_of(recipe, records)
        order = numpy_generator(recipe.seed, "public pool").permutation(len(common.rest))
        cut = int(public.share * len(common.rest))
        pool = [common.rest[i] for i in order[:cut]]
        labelled, unlabelled = _split_labelled(recipe, pool)
        left = (*common.left, _unasked(pool, labelled, unlabelled))
        partitioned = part(recipe, [common.rest[i] for i in np.sort(order[cut:])], test=common.test)
    partitioned, copies = apart(recipe, partitioned, (*labelled, *unlabelled))
    left = (*left, *partitioned.left)
    return _scarce(
        recipe,
        PublicSplit(
            clients_data=partitioned.clients_data, labelled=labelled, unlabelled=unlabelled, left=left, copies=copies
        ),
    )


def _unasked(pool: Sequence[Record], labelled: Sequence[Record], unlabelled: Sequence[Record]) -> Left:
    return Left(why="public rows that data.public does not ask for", rows=len(pool) - len(labelled) - len(unlabelled))


def _split_labelled(recipe: Recipe, pool: Sequence[Record]) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    public = recipe.data.public
    assert public is not None
    labelled = 0 if recipe.writes else public.labelled
    need = labelled + public.unlabelled
    if len(pool) < need:
        raise LichenError(
            f"{len(pool)} rows are public, {need} are asked for",
            where="data.public.share",
            fix="raise it, or lower data.public.labelled or unlabelled",
        )
    shuffled = [pool[i] for i in numpy_generator(recipe.seed, "public rows").permutation(len(pool))]
    return tuple(shuffled[:labelled]), tuple(replace(r, label=None) for r in shuffled[labelled:need])


def scarce_labels(rows: Sequence[Record], count: int, seed: int, name: str) -> tuple[Record, ...]:
    """The same rows in the same order, all but ``count`` of them, drawn by the seed, without a label."""
    order = np.random.default_rng(derive(seed, "few", name)).permutation(len(rows))
    known = set(order[:count].tolist())
    return tuple(row if i in known else replace(row, label=None) for i, row in enumerate(rows))


def _scarce(recipe: Recipe, public_split: PublicSplit) -> PublicSplit:
    count = recipe.data.labels
    if count is None:
        return public_split

    def scarce(client_data: ClientData) -> ClientData:
        valid = [
            r for r in scarce_labels(client_data.valid, count, recipe.seed, client_data.name) if r.label is not None
        ]
        return replace(
            client_data,
            train=scarce_labels(client_data.train, count, recipe.seed, client_data.name),
            valid=tuple(valid),
        )

    clients_data = tuple(scarce(client_data) for client_data in public_split.clients_data)
    before, after = (
        sum(len(client_data.valid) for client_data in some) for some in (public_split.clients_data, clients_data)
    )
    hidden = Left(why=f"validation rows beyond {count} of a client (data.labels)", rows=before - after)
    return replace(public_split, clients_data=clients_data, left=(*public_split.left, hidden))


def labelled_of(clients_data: Sequence[ClientData]) -> tuple[ClientData, ...]:
    """The clients with those of their training rows that have a label."""
    return tuple(replace(o, train=tuple(r for r in o.train if r.label is not None)) for o in clients_data)


def unlabelled_of(clients_data: Sequence[ClientData]) -> list[tuple[Record, ...]]:
    """Each owner's training rows that have none."""
    return [tuple(r for r in o.train if r.label is None) for o in clients_data]
