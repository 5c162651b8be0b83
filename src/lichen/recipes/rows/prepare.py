"""Loads a recipe's records and classes, and encodes rows for the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.visible import listed
from lichen.data.batches.compared_text import preference_shard
from lichen.data.batches.pack_rows import lm_rows
from lichen.data.batches.rows import TextShard
from lichen.data.batches.shards import ArrayShard, Shard
from lichen.data.batches.text import LmForm
from lichen.data.batches.token_cache import classify_shard, lm_shard
from lichen.data.encode_notes import sentences
from lichen.data.reading import Left
from lichen.data.sources.cache import prepared_folder
from lichen.data.sources.catalog import CATALOG, fetch_entry
from lichen.data.sources.record_cache import cached_records
from lichen.data.sources.records import Record, load_records
from lichen.data.sources.table import Some, column_of
from lichen.recipes.rows.cards import cards_of, check_cards
from lichen.recipes.rows.checked_cards import Cards
from lichen.recipes.rows.client_cards import client_cards
from lichen.recipes.rows.partition import ClientData, first_of, split_clients
from lichen.recipes.rows.periods import periods_of, up_to
from lichen.recipes.rows.preferences import differing_pairs, goods_of, refuse_preferences, scarce_clients, unread_roles
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = [
    "ClientData",
    "Gathered",
    "classes_of",
    "encode",
    "first_of",
    "gather",
    "gather_all",
    "gather_periods",
    "gather_site",
    "is_private",
    "split_clients",
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The records of a recipe's data, what was left out of them, and the data cards that they come with.

    Of one period of a stream ``before`` has the records of each earlier one, where clients train on some again.
    """

    records: Sequence[Record]
    left: tuple[Left, ...] = ()
    cards: Cards = field(default_factory=Cards)
    before: tuple[Sequence[Record], ...] = ()


def gather(recipe: Recipe) -> Sequence[Record]:
    """The records of :func:`gather_all`."""
    return gather_all(recipe).records


def gather_all(recipe: Recipe) -> Gathered:
    """The recipe's data, as they lie there, without rows that hold nothing to learn from; a folder's files are clients.

    Of a stream's period its rows alone.

    Raises:
        LichenError: if they cannot be read, none has what ``data.form`` reads or a label of ``data.classes``, a data
            card is not as ``data.require`` wants it, or they come in periods, of which the recipe names none.
    """
    records, whole = _read(recipe)
    if recipe.stream is None:
        return whole(records)
    if recipe.stream.period is None:
        raise LichenError(
            "is a stream of periods, each of which is a run of its own",
            where="stream",
            fix="name one, such as -s stream.period=2018-05, or use its folder below periods/ in the stream's",
        )
    *before, now = map(whole, up_to(recipe, records))
    return replace(now, before=tuple(one.records for one in before))


def gather_periods(recipe: Recipe) -> tuple[dict[str, Gathered], int]:
    """What :func:`gather_all` gives of each period of a stream, the earliest first; and how many rows wait for theirs.

    Raises:
        LichenError: as that, or for a row without a date that can be read.
    """
    records, whole = _read(recipe)
    found, waiting = periods_of(recipe, records)
    return {one.name: whole(Some(records, one.rows)) for one in found}, waiting


def _read(recipe: Recipe) -> tuple[Sequence[Record], Callable[[Sequence[Record]], Gathered]]:
    """All records as they lie there, and what makes some of them what is learned from."""
    cards = cards_of(recipe.data)
    columns = {str(role): name for role, name in recipe.data.columns.items()}
    path = Path(recipe.data.name).expanduser()
    path_client = "none" if path.is_file() else "auto"
    unread = unread_roles(recipe)
    files: dict[str, set[Path]] = {}

    def make() -> Sequence[Record]:
        name = recipe.data.name
        return load_records(
            name,
            columns=columns,
            path_client=path_client,
            unread=unread,
            empty="keep",
            but=cards.unread,
            client_files=files,
        )

    if is_private(recipe) or CATALOG[recipe.data.name].registry == "bundled":
        records = make()
    else:
        how = recipe.data.name, sorted(columns.items()), path_client, unread
        records = cached_records(fetch_entry(recipe.data.name), make, *how, folder=prepared_folder(private=False))
    if recipe.data.cards is not None:
        return records, partial(_with_client_cards, recipe)
    by_name = files and recipe.data.partition.by == "client"

    def whole(some: Sequence[Record]) -> Gathered:
        gathered = _of_classes(recipe, _readable(recipe, some), elsewhere=recipe.stream is not None)
        return _with_cards(gathered, cards.of_clients(files) if by_name else cards)

    return records, whole


def _with_client_cards(recipe: Recipe, records: Sequence[Record]) -> Gathered:
    """The rows of those who have a card of their own in ``data.cards``."""
    names = column_of(records, "client")
    cards = client_cards(recipe.data, Counter(map(str, names)))
    taking = {name for one in cards.checked for name in one.clients or ()}
    gone = {name for one in cards.dropped for name in one.clients}
    chosen = np.flatnonzero([name in taking for name in names])
    strangers = [name for name in names if name not in taking and name not in gone]
    left = Left(why="clients without a card in data.cards", rows=len(strangers), clients=len(set(strangers)))
    gathered = _of_classes(recipe, _readable(recipe, Some(records, chosen)))
    return _with_cards(replace(gathered, left=(left, *gathered.left)), cards)


def _with_cards(gathered: Gathered, cards: Cards) -> Gathered:
    return replace(gathered, cards=cards, left=(*cards.left, *gathered.left))


def gather_site(recipe: Recipe, path: Path, client: str) -> Gathered:
    """The rows of one site of many, read as a simulation reads them in a folder with those of all sites.

    A class of ``data.classes`` may have no row here, since others have some. The site's data cards are held against the
    recipe's ``data.require`` here, where the rows lie.

    Args:
        recipe: Its columns and classes; its ``data.name`` is not looked at.
        path: The site's file, or its folder of files, in full.
        client: Whose the rows are that name no client.

    Raises:
        LichenError: as :func:`gather_all`.
    """
    cards, files = check_cards(recipe.data.require, path, client=client), dict[str, set[Path]]()
    columns = {str(role): name for role, name in recipe.data.columns.items()}
    unread = unread_roles(recipe)
    records = load_records(
        str(path),
        columns=columns,
        path_client="none",
        unread=unread,
        empty="keep",
        but=cards.unread,
        client_files=files,
    )
    owned = [record if record.client else replace(record, client=client) for record in records]
    if "" in files:
        files[client] = files.pop("") | files.get(client, set())
    return _with_cards(_of_classes(recipe, _readable(recipe, owned), elsewhere=True), cards.of_clients(files))


def _readable(recipe: Recipe, records: Sequence[Record]) -> Gathered:
    """Those of the records that hold what the recipe's form reads."""
    if isinstance(records, list) and (numbers := [record.features is not None for record in records]) and any(numbers):
        reads_text = recipe.model.name is not None or recipe.model.scratch is not None
        if reads_text and not any(record.text or record.messages for record in records):
            raise LichenError(
                f"the rows are numbers, and {recipe.model.name or 'a language model'} reads texts",
                where="model",
                fix="use a student of kind image-mlp or image-cnn, or name a column of texts in data.columns.text",
            )
        return _some_of(records, np.array(numbers), "rows without numbers")
    talks = recipe.writes and recipe.data.form == "messages"
    texts, messages = (column_of(records, name) for name in ("text", "messages"))
    good = np.array([bool(some) for some in (messages if talks else texts)], dtype=bool)
    if not good.any() and any(texts if talks else messages):
        if not recipe.writes:
            raise LichenError(
                "the rows hold conversations and no texts", where="data.columns.text", fix="name a column of texts"
            )
        raise LichenError(
            "the rows hold texts and no conversations" if talks else "the rows hold conversations and no texts",
            where="data.form",
            fix="use chat, or name the column of conversations in data.columns.messages" if talks else "use messages",
        )
    return _some_of(records, good, "rows without a conversation" if talks else "rows without text")


def _some_of(records: Sequence[Record], good: np.ndarray, why: str) -> Gathered:
    """The good ones of the records; ``why`` the others were left out."""
    if good.all():
        return Gathered(records=records)
    left = Left(why=why, rows=int((~good).sum()))
    return Gathered(records=Some(records, np.flatnonzero(good)), left=(left,))


def is_private(recipe: Recipe) -> bool:
    """Whether the recipe's rows are somebody's own: all that the catalog does not name."""
    return recipe.data.name not in CATALOG


def _preferred(recipe: Recipe, gathered: Gathered, *, elsewhere: bool) -> Gathered:
    """Without pairs of which none is better, and rows that nobody rated, or that are rated neither good nor bad."""
    refuse_preferences(recipe, gathered.records, elsewhere=elsewhere)
    there_N, same_N = differing_pairs(recipe, gathered.records)
    paired = _some_of(gathered.records, there_N, "rows without a chosen or a rejected answer")
    differing = _some_of(paired.records, ~same_N[there_N], "rows with two equal answers")
    rated = _some_of(differing.records, goods_of(recipe, differing.records) >= 0, "rows rated neither good nor bad")
    left = (*gathered.left, *paired.left, *differing.left, *rated.left)
    scarce = scarce_clients(recipe, rated.records)
    if not scarce:
        return replace(rated, left=left)
    names = column_of(rated.records, "client")
    chosen = np.flatnonzero([name not in scarce for name in names])
    why = f"clients with fewer than {recipe.preference.min_good} good or {recipe.preference.min_bad} bad rows"
    out = Left(why=why, rows=len(names) - len(chosen), clients=len(scarce))
    return Gathered(records=Some(rated.records, chosen), left=(*left, out))


def _of_classes(recipe: Recipe, gathered: Gathered, *, elsewhere: bool = False) -> Gathered:
    if recipe.prefers:
        return _preferred(recipe, gathered, elsewhere=elsewhere)
    records, named_classes = gathered.records, {str(label) for label in recipe.data.classes}
    if not named_classes:
        return gathered
    labels = [None if label is None else str(label) for label in column_of(records, "label")]
    have = {label for label in labels if label is not None}
    missing = [str(label) for label in recipe.data.classes if str(label) not in have]
    if missing and not elsewhere:
        fix = f"choose among {listed(sorted(have))}" if have else "name the label column in data.columns.label"
        raise LichenError(f"no row has the label {missing[0]!r}", where="data.classes", fix=fix)
    chosen = np.flatnonzero([label in named_classes for label in labels])
    left = Left(why="rows of other labels (data.classes)", rows=len(records) - len(chosen))
    return Gathered(records=Some(records, chosen), left=(*gathered.left, left))


def classes_of(recipe: Recipe, records: Sequence[Record]) -> tuple[str, ...]:
    """The names of the model's outputs, such as the sorted classes; none for a language model.

    Raises:
        LichenError: where the labels cannot be learned.
    """
    labels = task_of(recipe.task).labels
    if labels is None:
        return ()
    return labels.names(column_of(records, "label") if recipe.stream is None else recipe.data.classes)


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
    data, private, labels = recipe.data, is_private(recipe), task_of(recipe.task).labels
    folder = prepared_folder(private=private) if keep_private or not private else None

    def text_lm(records: Sequence[Record]) -> Shard:
        put = form or data.form
        if put == "stream":
            return lm_rows([record.text for record in records], tokenizer, data.max_length)
        notes: Counter[str] = Counter()
        how: dict[str, Any] = {"form": put, "max_length": data.max_length, "thinking": data.thinking, "folder": folder}

        def encode(rows: Sequence[Record]) -> TextShard:
            return lm_shard(rows, tokenizer, notes=notes, **how)

        if recipe.prefers and form is None:
            good_N = goods_of(recipe, records)
            shard = preference_shard(records, encode, good_N=good_N, turns=put == "messages")
        else:
            shard = encode(records)
        for sentence in sentences(notes, len(records)):
            say(sentence)
        return shard

    def encoded(records: Sequence[Record]) -> np.ndarray:
        assert labels is not None
        return labels.encode([record.label for record in records], classes)

    def text_class(records: Sequence[Record]) -> Shard:
        assert labels is not None
        known = tuple(classes) if labels.classes else ()
        rows = records if labels.classes else [replace(record, label=None) for record in records]
        shard = classify_shard(rows, tokenizer, max_length=data.max_length, classes=known, folder=folder)
        return shard if labels.classes else replace(shard, labels=encoded(records))

    def array(records: Sequence[Record]) -> Shard:
        rows = [np.asarray(r.features, dtype=np.float32) for r in records]
        x = np.stack(rows) if rows else np.zeros((0, 1), dtype=np.float32)  # nobody validates where no row may
        return ArrayShard(x=x, labels=encoded(records))

    if labels is None:
        return text_lm
    return array if tokenizer is None else text_class
