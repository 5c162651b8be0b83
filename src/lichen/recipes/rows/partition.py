"""Partitions records into clients with training, validation and test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.seeds import derive, numpy_generator
from lichen.data.reading import Left
from lichen.data.sources.record import Record
from lichen.data.sources.table import Some, column_of
from lichen.data.splits.fingerprint import Reads, answers, fingerprint
from lichen.data.splits.partition import by_client, dirichlet, iid
from lichen.data.splits.split import some_of_each, split_records
from lichen.recipes.rows.preferences import goods_of
from lichen.recipes.schema.recipe import Recipe

__all__ = [
    "ClientData",
    "Partitioned",
    "common_of",
    "draw_clients",
    "first_of",
    "part",
    "reads_of",
    "rows_by_client",
    "split_clients",
]

COPIES = "copies of a row that trains"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientData:
    """One client and its rows, already parted."""

    name: str
    train: tuple[Record, ...]
    valid: tuple[Record, ...]
    test: tuple[Record, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Partitioned:
    """The clients, in roster order, and what was left out."""

    clients_data: tuple[ClientData, ...]
    left: tuple[Left, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """A test set that all clients share, the rows for all else, and what was left out."""

    test: tuple[Record, ...]
    rest: list[Record]
    left: tuple[Left, ...] = ()


def first_of(things: Sequence[object]) -> tuple[int, ...]:
    """For each thing the place of the first that is the same object: a test set that many share is one.

    >>> common = ["a"]
    >>> first_of([common, ["a"], common])
    (0, 1, 0)
    """
    seen: dict[int, int] = {}
    return tuple(seen.setdefault(id(thing), place) for place, thing in enumerate(things))


def split_clients(recipe: Recipe, records: Sequence[Record]) -> tuple[ClientData, ...]:
    """The clients of :func:`part`."""
    return part(recipe, records).clients_data


def part(recipe: Recipe, records: Sequence[Record], *, test: tuple[Record, ...] | None = None) -> Partitioned:
    """Part the records among their clients, and each client's into train, valid and test.

    A drawn partition (``dirichlet``, ``iid``) is scored on one common test set, with its share of each class, unless
    ``data.partition.test`` is ``own``; clients of their own rows are scored on their own.

    Args:
        recipe: Its data section.
        records: All rows.
        test: With a drawn partition: the common test set, if it has been taken out of the records already.

    Raises:
        LichenError: naming the client and the key, for clients that would be left empty.
    """
    partition = recipe.data.partition
    if partition.by == "client":
        rows, nobody = rows_by_client(recipe, records)
        partitioned = draw_clients(recipe, rows)
        return replace(partitioned, left=(nobody, *partitioned.left))
    common = common_of(recipe, records) if test is None else Common(test=test, rest=list(records))
    labels = np.asarray([str(r.label) for r in common.rest])
    assignment = (
        iid(len(common.rest), clients=partition.clients, seed=recipe.seed)
        if partition.by == "iid"
        else dirichlet(labels, clients=partition.clients, alpha=partition.alpha, seed=recipe.seed)
    )
    rows = {f"client-{k:03d}": [common.rest[i] for i in index] for k, index in enumerate(assignment)}
    if partition.test == "own":
        partitioned = draw_clients(recipe, rows)
        return replace(partitioned, left=(*common.left, *partitioned.left))
    partitioned = draw_clients(recipe, rows, test=0.0)
    clients_data = tuple(replace(client_data, test=common.test) for client_data in partitioned.clients_data)
    return Partitioned(clients_data=clients_data, left=(*common.left, *partitioned.left))


def rows_by_client(recipe: Recipe, records: Sequence[Record]) -> tuple[dict[str, Sequence[Record]], Left]:
    """The rows of every client, and those that name none, which stay out where ``data.on_too_few_rows`` says so.

    Raises:
        LichenError: if some rows, or all, name no client.
    """
    rows: dict[str, Sequence[Record]] = {name: Some(records, index) for name, index in by_client(records).items()}
    nobody = len(rows.pop("", ()))
    if nobody and not rows:
        fix = "map a client column, or set data.partition.by"
        raise LichenError("no row names its client", where="data.columns.client", fix=fix)
    if nobody and recipe.data.on_too_few_rows == "refuse":
        raise LichenError(
            f"{nobody} of {len(records)} rows do not name their client",
            where="data.columns.client",
            fix="fill the column, or set data.on_too_few_rows: drop so that these rows stay out",
        )
    return rows, Left(why="no client is named", rows=nobody)


def common_of(recipe: Recipe, records: Sequence[Record]) -> Common:
    """What :func:`draw_rows` gives; no test set where each client has its own, for which all rows are dealt out.

    Raises:
        LichenError: as that.
    """
    return Common(test=(), rest=list(records)) if recipe.data.partition.test == "own" else draw_rows(recipe, records)


def draw_rows(recipe: Recipe, records: Sequence[Record]) -> Common:
    """A test set with its share of each class, for clients that are drawn.

    Whole groups are drawn, and no row of the rest is a copy of a test row. A test set that comes with catalog data
    is taken as it is.

    Raises:
        LichenError: if it would be empty.
    """
    data, seed = recipe.data, derive(recipe.seed, "common test")
    held = [record for record in records if record.held_out]
    if held:
        fingerprints = {fingerprint(record, reads=reads_of(recipe)) for record in held}
        rest = [r for r in records if not r.held_out and fingerprint(r, reads=reads_of(recipe)) not in fingerprints]
        copies = Left(why="copies of a test row", rows=len(records) - len(held) - len(rest))
        test = held
    else:
        share = min(data.test, (data.test_rows or len(records)) / len(records))
        rest, _, test = _split(recipe, records, valid=0.0, test=share, seed=seed)
        copies = Left(why=COPIES, rows=len(records) - len(rest) - len(test))
        if not test or share * len(records) < 0.5:
            fix = "raise it" if data.test < 0.2 else "give more rows, or set data.split_by: row"
            raise LichenError("leaves no row to test on", where="data.test", fix=fix)
    some = _most(recipe, test, seed)
    more = Left(why="test rows beyond data.test_rows", rows=len(test) - len(some))
    return Common(test=tuple(some), rest=rest, left=(copies, more))


def reads_of(recipe: Recipe) -> Reads:
    """What the recipe's model reads of a row."""
    if not recipe.writes or recipe.data.form in ("plain", "stream"):
        return "text"
    if recipe.prefers:
        return "pair"
    return "messages" if recipe.data.form == "messages" else "pair"


def kinds_of(recipe: Recipe, records: Sequence[Record]) -> list[str]:
    """What every part of a split gets its share of: each class, good and bad rows, or an answer that several give."""
    if recipe.prefers:
        return [str(good) for good in goods_of(recipe, records)]
    if recipe.classifies:
        return [str(record.label) for record in records]
    if reads_of(recipe) == "text":
        return [""] * len(records)
    found = answers(records, reads=reads_of(recipe))
    if recipe.data.split_by == "group":  # a conversation of several answers is of no kind
        of: dict[str, set[str]] = {}
        for record, answer in zip(records, found, strict=True):
            of.setdefault(record.group, set()).add(answer)
        return ["" if r.group and len(of[r.group]) > 1 else a for r, a in zip(records, found, strict=True)]
    return found


def _split(
    recipe: Recipe, records: Sequence[Record], *, valid: float, test: float, seed: int
) -> tuple[list[Record], list[Record], list[Record]]:
    kinds, reads = kinds_of(recipe, records), reads_of(recipe)
    return split_records(records, valid=valid, test=test, seed=seed, by=recipe.data.split_by, reads=reads, kinds=kinds)


def _most(recipe: Recipe, rows: Sequence[Record], seed: int) -> list[Record]:
    """At most ``data.test_rows`` of them, with some of every kind."""
    most = recipe.data.test_rows
    if most is None or len(rows) <= most:
        return list(rows)
    return [rows[i] for i in some_of_each(kinds_of(recipe, rows), most, seed)]


def draw_clients(
    recipe: Recipe, rows: Mapping[str, Sequence[Record]], *, test: float | None = None, salt: str = "clients"
) -> Partitioned:
    """Choose clients with enough rows, cut and part their rows.

    Raises:
        LichenError: if none is left, or one has nothing to train on or to be scored on.
    """
    data, test = recipe.data, recipe.data.test if test is None else test
    small = [name for name, of in rows.items() if len(of) < data.min_rows]
    left = [_clients(f"clients with fewer than {data.min_rows} rows (data.min_rows)", small, rows)]
    enough = sorted(rows.keys() - set(small))
    if not enough:
        largest = max((len(of) for of in rows.values()), default=0)
        raise LichenError(
            f"no client has {data.min_rows} rows; the largest has {largest}", where="data.min_rows", fix="lower it"
        )
    if recipe.classifies and data.on_single_class != "keep":
        single = [name for name in enough if len(set(map(str, column_of(rows[name], "label")))) == 1]
        _refuse_one_class(recipe, single, len(enough))
        left.append(_clients("clients whose rows all have one label (data.on_single_class: drop)", single, rows))
        enough = sorted(set(enough) - set(single))
    if data.max_clients is not None and len(enough) > data.max_clients:
        enough = [enough[i] for i in numpy_generator(recipe.seed, salt).permutation(len(enough))]
    clients_data: list[ClientData] = []
    too_few: list[str] = []
    for name in enough:
        found = _partition_client(recipe, name, rows[name], test)
        clients_data += found.clients_data
        left += found.left
        too_few += [] if found.clients_data else [name]
        if len(clients_data) == data.max_clients:
            break
    if not clients_data:
        raise LichenError(
            "no client could be split", where="data.on_too_few_rows", fix="lower data.valid and data.test"
        )
    more = enough[len(clients_data) + len(too_few) :]
    left.append(_clients("clients that leave no row for some part (data.on_too_few_rows: drop)", too_few, rows))
    left.append(_clients(f"clients that were not drawn (data.max_clients: {data.max_clients})", more, rows))
    return Partitioned(
        clients_data=tuple(sorted(clients_data, key=lambda client_data: client_data.name)), left=tuple(left)
    )


def _clients(why: str, names: Sequence[str], rows: Mapping[str, Sequence[Record]]) -> Left:
    return Left(why=why, rows=sum(len(rows[name]) for name in names), clients=len(names))


def _refuse_one_class(recipe: Recipe, single: Sequence[str], clients: int) -> None:
    if single and recipe.data.on_single_class == "refuse":
        raise LichenError(
            f"{len(single)} of {clients} clients have rows of one label only, the first is client {single[0]!r}",
            where="data.on_single_class",
            fix="set it to keep or drop, or raise data.min_rows",
        )
    if len(single) == clients:
        raise LichenError(
            f"each of the {clients} clients has rows of one label only",
            where="data.on_single_class",
            fix="set it to keep, or name another column in data.columns.client or data.columns.label",
        )


def _partition_client(recipe: Recipe, name: str, rows: Sequence[Record], test: float) -> Partitioned:
    """One client's rows, cut and split; no owner if it is left out."""
    data, mine = recipe.data, list(rows)
    if data.max_rows is not None and len(mine) > data.max_rows:
        chosen = numpy_generator(recipe.seed, "rows", name).permutation(len(mine))[: data.max_rows]
        mine = [mine[i] for i in sorted(chosen)]
    seed = derive(recipe.seed, "split", name)
    train, valid, held = _split(recipe, mine, valid=data.valid, test=test, seed=seed)
    for key, some, share in (("min_rows", train, 1.0), ("valid", valid, data.valid), ("test", held, test)):
        if share > 0 and not some:
            if data.on_too_few_rows == "drop":
                return Partitioned(clients_data=())
            purpose = "to train on" if some is train else f"for {key}"
            raise LichenError(
                f"client {name!r} has {len(mine)} rows, and none is left {purpose}",
                where=f"data.{key}",
                fix=f"raise data.{key}, or set data.on_too_few_rows: drop so that such clients stay out",
            )
    copies = Left(why=COPIES, rows=len(mine) - len(train) - len(valid) - len(held))
    cut = Left(why=f"rows of a client beyond {data.max_rows} (data.max_rows)", rows=len(rows) - len(mine))
    before = len(valid) + len(held)
    valid, held = _most(recipe, valid, derive(seed, "valid")), _most(recipe, held, derive(seed, "test"))
    more = Left(why="validation and test rows beyond data.test_rows", rows=before - len(valid) - len(held))
    client_data = ClientData(name=name, train=tuple(train), valid=tuple(valid), test=tuple(held))
    return Partitioned(clients_data=(client_data,), left=(cut, copies, more))
