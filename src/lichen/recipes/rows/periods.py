"""The rows of one period of a stream, and those of earlier ones that clients train on again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lichen.core.errors import LichenError
from lichen.core.visible import listed
from lichen.data.periods.lengths import length_of
from lichen.data.periods.periods import Period, cut
from lichen.data.periods.reservoir import replayed
from lichen.data.sources.record import Record
from lichen.data.sources.table import Some, column_of
from lichen.data.splits.fingerprint import fingerprint
from lichen.recipes.rows.partition import ClientData, reads_of
from lichen.recipes.rows.public import PublicSplit, split_public
from lichen.recipes.schema.recipe import Recipe

__all__ = ["clients_of", "only_period", "periods_of", "up_to", "with_replay"]


NOBODY = ("data.min_rows", "data.on_too_few_rows", "data.on_single_class", "data.columns.client")
"""What an error names where a period has no client with enough rows."""


def periods_of(recipe: Recipe, records: Sequence[Record]) -> tuple[list[Period], int]:
    """The periods of a recipe's rows, and how many rows wait for a period that is not full.

    Args:
        recipe: Has a section ``stream``.
        records: All rows, in the order in which they were read.

    Raises:
        LichenError: if a row has no date that can be read, or there is no whole period.
    """
    assert recipe.stream is not None
    length = length_of(recipe.stream.by)
    assert length is not None
    found, waiting = cut(column_of(records, "time"), length)
    if not found:
        raise LichenError(
            f"{len(records):,} rows make no whole period", where="stream.by", fix="give more rows, or shorter periods"
        )
    return found, waiting


def up_to(recipe: Recipe, records: Sequence[Record]) -> list[Sequence[Record]]:
    """The rows of each period up to the recipe's own, which is the last; of that one alone where nothing is replayed.

    Raises:
        LichenError: as :func:`periods_of`, if there is no such period, or nothing before it that could be replayed.
    """
    stream = recipe.stream
    assert stream is not None
    assert stream.period is not None
    found, _ = periods_of(recipe, records)
    names = [one.name for one in found]
    if stream.period not in names:
        raise LichenError(
            f"has no rows of {stream.period!r}",
            where="stream.period",
            fix=f"use one of: {listed(names, near=stream.period)}",
        )
    last = names.index(stream.period)
    if stream.replay and not last:
        raise LichenError(
            f"nothing comes before {stream.period}, the first period",
            where="stream.replay",
            fix="remove it, or name a later period",
        )
    return [Some(records, one.rows) for one in found[0 if stream.replay else last : last + 1]]


def clients_of(recipe: Recipe, records: Sequence[Record]) -> PublicSplit | None:
    """The clients of a period; None where nobody has enough rows, and clients without enough stay out.

    Args:
        recipe: Its data section.
        records: The period's rows.

    Raises:
        LichenError: if nobody can take part, and ``data.on_too_few_rows`` does not let clients stay out.
    """
    try:
        return split_public(recipe, records)
    except LichenError as error:
        if recipe.data.on_too_few_rows == "drop" and error.where in NOBODY:
            return None
        raise


def only_period(recipe: Recipe, period: str, **changes: object) -> Recipe:
    """The recipe of one period alone, without what only a whole stream has.

    Args:
        recipe: Of the stream.
        period: The period's name.
        changes: Other values of the section, such as ``replay=0.0`` for the first period.
    """
    stream = recipe.stream
    assert stream is not None
    whole = ("detect", "react", "keep", "rebase")
    fresh = {name: type(stream).model_fields[name].get_default(call_default_factory=True) for name in whole}
    return recipe.model_copy(update={"stream": stream.model_copy(update={**fresh, **changes, "period": period})})


def with_replay(recipe: Recipe, before: Sequence[Sequence[Record]], public_split: PublicSplit) -> PublicSplit:
    """The clients of a period with rows of the past behind their own training rows.

    A client's past are the rows that it trained on in earlier periods, as those were split; none is a copy of what it
    is validated or scored on now. No other client sees them.

    Args:
        recipe: Of the period.
        before: The rows of each earlier period.
        public_split: The period's clients.
    """
    stream = recipe.stream
    if stream is None or not before:
        return public_split
    assert stream.period is not None
    past: dict[str, list[Record]] = {}
    for records in before:
        earlier = clients_of(recipe, records)
        for one in () if earlier is None else earlier.clients_data:
            past.setdefault(one.name, []).extend(one.train)
    reads = reads_of(recipe)

    def extended(one: ClientData) -> ClientData:
        judged = {fingerprint(row, reads=reads) for row in (*one.valid, *one.test)}
        again = replayed(
            [row for row in past.get(one.name, ()) if fingerprint(row, reads=reads) not in judged],
            len(one.train),
            memory=stream.replay,
            share=stream.replay_share,
            seed=recipe.seed,
            client=one.name,
            period=str(stream.period),
        )
        return replace(one, train=(*one.train, *again))

    return replace(public_split, clients_data=tuple(extended(one) for one in public_split.clients_data))
