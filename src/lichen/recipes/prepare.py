"""From a recipe's data section to owners with rows to train on, to choose by and to be scored on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.seeds import derive, numpy_generator
from lichen.data.catalog import CATALOG, fetch
from lichen.data.encode_notes import sentences
from lichen.data.fingerprint import Reads, answers, fingerprint
from lichen.data.kept import prepared_folder
from lichen.data.partition import by_client, dirichlet, iid
from lichen.data.records import Record, load_records
from lichen.data.shards import ArrayShard, Shard
from lichen.data.split import some_of_each, split
from lichen.data.stream import lm_rows
from lichen.data.table import Some, column_of, kept_records
from lichen.data.text import LmForm, label_set
from lichen.data.tokens import classify_shard, lm_shard
from lichen.recipes.schema import Recipe

__all__ = ["Owner", "classes_of", "draw_owners", "draw_rows", "encode", "first_of", "gather", "is_private", "owners_of"]

NO_CLIENT = "map a client column, or set data.partition.by"

MOST_CLASSES = 20
"""So many classes may lie in few rows each, or be numbers with fractions, such as half stars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One client and its rows, already parted."""

    name: str
    train: tuple[Record, ...]
    valid: tuple[Record, ...]
    test: tuple[Record, ...]


def first_of(things: Sequence[object]) -> tuple[int, ...]:
    """For each thing the place of the first that is the same object: a test set that many share is one.

    >>> common = ["a"]
    >>> first_of([common, ["a"], common])
    (0, 1, 0)
    """
    seen: dict[int, int] = {}
    return tuple(seen.setdefault(id(thing), place) for place, thing in enumerate(things))


def gather(recipe: Recipe) -> Sequence[Record]:
    """The records of the recipe's data, as they lie there; a folder's files are its clients.

    Raises:
        LichenError: if they cannot be read, or none has a label that ``data.classes`` names.
    """
    columns = {str(role): name for role, name in recipe.data.columns.items()}
    path = Path(recipe.data.name).expanduser()
    path_client = "none" if path.is_file() else "auto"
    unread = ("label",) if recipe.task == "chat" else ()

    def make() -> Sequence[Record]:
        return load_records(recipe.data.name, columns=columns, path_client=path_client, unread=unread)

    if is_private(recipe) or CATALOG[recipe.data.name].registry == "bundled":
        return _of_classes(recipe, make())
    how = recipe.data.name, sorted(columns.items()), path_client, unread
    folder = prepared_folder(private=False)
    return _of_classes(recipe, kept_records(fetch(recipe.data.name), make, *how, folder=folder))


def is_private(recipe: Recipe) -> bool:
    """Whether the recipe's rows are somebody's own: all that the catalog does not name."""
    return recipe.data.name not in CATALOG


def _of_classes(recipe: Recipe, records: Sequence[Record]) -> Sequence[Record]:
    wanted = [str(label) for label in recipe.data.classes]
    if not wanted:
        return records
    labels = [None if label is None else str(label) for label in column_of(records, "label")]
    have = {label for label in labels if label is not None}
    if missing := [label for label in wanted if label not in have]:
        fix = f"choose among {', '.join(sorted(have)[:10])}" if have else "name the label column in data.columns.label"
        raise LichenError(f"no row has the label {missing[0]!r}", where="data.classes", fix=fix)
    return Some(records, np.flatnonzero([label in wanted for label in labels]))


def classes_of(recipe: Recipe, records: Sequence[Record]) -> tuple[str, ...]:
    """The labels, sorted; none for a language model.

    Raises:
        LichenError: where there are not at least two, or rows have none.
    """
    if recipe.task == "chat":
        return ()
    classes = label_set(records)
    unlabelled = sum(label is None for label in column_of(records, "label"))
    if classes and unlabelled:
        raise LichenError(
            f"{unlabelled} of {len(records)} rows have no label",
            where="data.columns.label",
            fix="label them, leave them out of the file, or name the labels to keep in data.classes",
        )
    if len(classes) < 2:
        raise LichenError(
            f"the label column holds {len(classes)} class",
            where="data.columns.label",
            fix="name a column with two or more",
        )
    if len(classes) > MOST_CLASSES and _are_measures(classes):
        raise LichenError(
            f"the label column holds {len(classes)} numbers with fractions, such as {classes[0]}: that is regression",
            where="data.columns.label",
            fix="write a column of few classes, such as low, middle and high, and name it; or list data.classes",
        )
    if len(classes) > MOST_CLASSES and 2 * len(classes) > len(records):
        raise LichenError(
            f"the label column holds {len(classes)} classes in {len(records)} rows",
            where="data.columns.label",
            fix="name a column in which classes repeat, or list data.classes",
        )
    return classes


def _are_measures(classes: Sequence[str]) -> bool:
    """Numbers, and not all of them whole."""
    try:
        return any(not float(name).is_integer() for name in classes)
    except ValueError:
        return False


def owners_of(
    recipe: Recipe, records: Sequence[Record], *, test: tuple[Record, ...] | None = None
) -> tuple[Owner, ...]:
    """Part the records among their owners, and each owner's into train, valid and test.

    A drawn partition (``dirichlet``, ``iid``) is scored on one common test set, with its share of
    each class; owners of their own rows are scored on their own.

    Args:
        recipe: Its data section.
        records: All rows.
        test: With a drawn partition: the common test set, if it has been taken out of the records already.

    Raises:
        LichenError: naming the client and the key, for clients that would be left empty.
    """
    part = recipe.data.partition
    if part.by == "client":
        by_name = by_client(records)
        rows: dict[str, Sequence[Record]] = {name: Some(records, index) for name, index in by_name.items()}
        if nobody := len(rows.get("", ())):
            some = f"{nobody} of {len(records)} rows do not name their" if nobody < len(records) else "no row names its"
            raise LichenError(
                f"{some} client",
                where="data.columns.client",
                fix="fill the column or delete these rows" if nobody < len(records) else NO_CLIENT,
            )
        return draw_owners(recipe, rows)
    common, rest = draw_rows(recipe, records) if test is None else (test, list(records))
    labels = np.asarray([str(r.label) for r in rest])
    drawn = (
        iid(len(rest), clients=part.clients, seed=recipe.seed)
        if part.by == "iid"
        else dirichlet(labels, clients=part.clients, alpha=part.alpha, seed=recipe.seed)
    )
    rows = {f"client-{k:03d}": [rest[i] for i in index] for k, index in enumerate(drawn)}
    return tuple(replace(owner, test=common) for owner in draw_owners(recipe, rows, test=0.0))


def draw_rows(recipe: Recipe, records: Sequence[Record]) -> tuple[tuple[Record, ...], list[Record]]:
    """``(a test set with its share of each class, the rest)``, for owners that are drawn.

    Whole groups are drawn, and no row of the rest is a copy of a test row. A test set that comes with catalog data
    is taken as it is.

    Raises:
        LichenError: if it would be empty.
    """
    data, seed = recipe.data, derive(recipe.seed, "common test")
    held = [record for record in records if record.held_out]
    if held:
        chosen = some_of_each(kinds_of(recipe, held), data.test_rows or len(held), seed)
        marks = {fingerprint(record, reads=reads_of(recipe)) for record in held}
        rest = [r for r in records if not r.held_out and fingerprint(r, reads=reads_of(recipe)) not in marks]
        return tuple(held[i] for i in chosen), rest
    share = min(data.test, (data.test_rows or len(records)) / len(records))
    rest, _, test = _split(recipe, records, valid=0.0, test=share, seed=seed)
    if not test or share * len(records) < 0.5:
        fix = "raise it" if data.test < 0.2 else "give more rows, or set data.split_by: row"
        raise LichenError("leaves no row to test on", where="data.test", fix=fix)
    return tuple(_most(recipe, test, seed)), rest


def reads_of(recipe: Recipe) -> Reads:
    """What the recipe's model reads of a row."""
    if recipe.task != "chat" or recipe.data.form in ("plain", "stream"):
        return "text"
    return "messages" if recipe.data.form == "messages" else "pair"


def kinds_of(recipe: Recipe, records: Sequence[Record]) -> list[str]:
    """What every part of a split gets its share of: each class, or each answer that several rows give."""
    if recipe.task != "chat":
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
    return split(records, valid=valid, test=test, seed=seed, by=recipe.data.split_by, reads=reads, kinds=kinds)


def _most(recipe: Recipe, rows: Sequence[Record], seed: int) -> list[Record]:
    """At most ``data.test_rows`` of them, with some of every kind."""
    most = recipe.data.test_rows
    if most is None or len(rows) <= most:
        return list(rows)
    return [rows[i] for i in some_of_each(kinds_of(recipe, rows), most, seed)]


def draw_owners(
    recipe: Recipe, rows: Mapping[str, Sequence[Record]], *, test: float | None = None, salt: str = "clients"
) -> tuple[Owner, ...]:
    """Choose clients with enough rows, cut and part their rows.

    Raises:
        LichenError: if none is left, or one has nothing to train on or to be scored on.
    """
    data, test = recipe.data, recipe.data.test if test is None else test
    enough = sorted(name for name, of in rows.items() if len(of) >= data.min_rows)
    if recipe.task != "chat":
        enough = [name for name in enough if _classes_kept(recipe, name, rows[name])]
    if not enough:
        largest = max((len(of) for of in rows.values()), default=0)
        raise LichenError(
            f"no client has {data.min_rows} rows; the largest has {largest}", where="data.min_rows", fix="lower it"
        )
    if data.max_clients is not None and len(enough) > data.max_clients:
        enough = [enough[i] for i in numpy_generator(recipe.seed, salt).permutation(len(enough))]
    owners: list[Owner] = []
    for name in enough:
        owner = _parted(recipe, name, rows[name], test)
        if owner is not None:
            owners.append(owner)
        if len(owners) == data.max_clients:
            break
    if not owners:
        raise LichenError("no client could be split", where="data.unsplit", fix="lower data.valid and data.test")
    return tuple(sorted(owners, key=lambda owner: owner.name))


def _parted(recipe: Recipe, name: str, rows: Sequence[Record], test: float) -> Owner | None:
    """One client's rows, cut and split; None if it is left out."""
    data, mine = recipe.data, list(rows)
    if data.max_rows is not None and len(mine) > data.max_rows:
        chosen = numpy_generator(recipe.seed, "rows", name).permutation(len(mine))[: data.max_rows]
        mine = [mine[i] for i in sorted(chosen)]
    seed = derive(recipe.seed, "split", name)
    train, valid, held = _split(recipe, mine, valid=data.valid, test=test, seed=seed)
    for key, part, share in (("min_rows", train, 1.0), ("valid", valid, data.valid), ("test", held, test)):
        if share > 0 and not part:
            if data.unsplit == "drop":
                return None
            purpose = "to train on" if part is train else f"for {key}"
            raise LichenError(
                f"client {name!r} has {len(mine)} rows, and none is left {purpose}",
                where=f"data.{key}",
                fix=f"raise data.{key}, or set data.unsplit: drop so that such clients stay out",
            )
    valid, held = _most(recipe, valid, derive(seed, "valid")), _most(recipe, held, derive(seed, "test"))
    return Owner(name=name, train=tuple(train), valid=tuple(valid), test=tuple(held))


def _classes_kept(recipe: Recipe, name: str, rows: Sequence[Record]) -> bool:
    if recipe.data.one_class == "keep" or len({str(r.label) for r in rows}) > 1:
        return True
    if recipe.data.one_class == "refuse":
        raise LichenError(
            f"all {len(rows)} rows of client {name!r} have one label",
            where="data.one_class",
            fix="set it to keep or drop, or raise data.min_rows",
        )
    return False


def encode(
    recipe: Recipe,
    tokenizer: object | None,
    classes: Sequence[str],
    *,
    form: LmForm | Literal["stream"] | None = None,
    keep_private: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Callable[[Sequence[Record]], Shard]:
    """How this recipe's rows become a shard.

    Args:
        recipe: Its data section.
        tokenizer: Of the model; None where rows are arrays.
        classes: The labels.
        form: Another form than the recipe's.
        keep_private: Tokens of private rows may stay in the cache.
        say: Called with what was cut, left out or read otherwise, a line each.
    """
    data, private = recipe.data, is_private(recipe)
    folder = prepared_folder(private=private) if keep_private or not private else None

    def text_lm(records: Sequence[Record]) -> Shard:
        put = form or data.form
        if put == "stream":
            return lm_rows([record.text for record in records], tokenizer, data.max_length)
        notes: Counter[str] = Counter()
        shard = lm_shard(
            records,
            tokenizer,
            form=put,
            max_length=data.max_length,
            thinking=data.thinking,
            notes=notes,
            folder=folder,
        )
        for told in sentences(notes, len(records)):
            say(told)
        return shard

    def text_class(records: Sequence[Record]) -> Shard:
        known = tuple(classes)
        return classify_shard(records, tokenizer, max_length=data.max_length, classes=known, folder=folder)

    def array(records: Sequence[Record]) -> Shard:
        index = {c: i for i, c in enumerate(classes)}
        x = np.stack([np.asarray(r.features, dtype=np.float32) for r in records])
        labels = [-100 if r.label is None else index[str(r.label)] for r in records]
        return ArrayShard(x=x, labels=np.asarray(labels, dtype=np.int64))

    if recipe.task == "chat":
        return text_lm
    return array if tokenizer is None else text_class
