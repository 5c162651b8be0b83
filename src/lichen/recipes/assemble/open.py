"""Loads everything that a recipe names into an experiment: records, splits, model, shards.

A server and a node open the same recipe and hold the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, final

from lichen.core.contracts.client import ClientTask
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.wire.shared import Shared
from lichen.data.batches.compared_text import mismatched
from lichen.data.batches.content_digest import records_digest
from lichen.data.batches.rows import pooled
from lichen.data.batches.shards import Shard, TextShard
from lichen.data.batches.small_vocabulary import Frequent
from lichen.data.batches.text import pad_id
from lichen.data.sources.catalog import CATALOG
from lichen.data.sources.fetch import fetch_entry
from lichen.data.sources.records import Record
from lichen.recipes.assemble.aggregation import scaling_of
from lichen.recipes.assemble.capacity import capacity_of
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.loaded_model import load_model
from lichen.recipes.assemble.model import make_student, start_of
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.pieces.split_memory import fitting_parts
from lichen.recipes.assemble.pieces.split_parts import split_parts
from lichen.recipes.assemble.sides.attack import refuse_truth
from lichen.recipes.assemble.sides.canaries import Canaries, canaries_of
from lichen.recipes.assemble.sides.clients import ClientSide, declared
from lichen.recipes.assemble.sides.fingerprints import fingerprint_rows, fingerprints_of
from lichen.recipes.assemble.sides.personal import refuse_personal
from lichen.recipes.assemble.sides.poison import poison_of
from lichen.recipes.assemble.sides.server import capacity_from
from lichen.recipes.assemble.sides.withdrawal.absent import absent_of, rows_left, shards_left
from lichen.recipes.assemble.workload import refuse_warmup
from lichen.recipes.rows.checked_cards import Cards
from lichen.recipes.rows.periods import with_replay
from lichen.recipes.rows.prepare import ClientData, classes_of, encode, gather_all
from lichen.recipes.rows.public import PublicSplit, labelled_of, split_public
from lichen.recipes.rows.reading import report_read
from lichen.recipes.rows.requests import repairs
from lichen.recipes.schema.recipe import Recipe

__all__ = ["LoadedExperiment", "fetch_named", "open_recipe", "second_answers", "shards_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedExperiment:
    """A recipe with everything it names at hand.

    Attributes:
        experiment: What the columns work with.
        clients_data: The clients, in roster order.
        classes: The labels in the order of the model's logits; none for a language model.
        foundation: The frozen transformers model; None for a student.
        tokenizer: Its tokenizer; None without one.
        public_split: The clients with their unlabelled rows, and the public rows.
        make: How rows become what the model reads.
        public: The public rows without labels that a classifier learns from, if there are any.
        vocabulary: The student's words, where they were taken from public text.
        rows: How many rows were read, before they were dealt out.
        data: Their digest.
        read: What was read, where it was to be told.
        cards: The data cards of the rows.
    """

    experiment: Experiment
    clients_data: tuple[ClientData, ...]
    classes: tuple[str, ...]
    foundation: Any
    tokenizer: Any
    public_split: PublicSplit
    make: Callable[[Sequence[Record]], Shard]
    public: Shard | None = None
    vocabulary: Frequent | None = None
    rows: int = 0
    data: str = ""
    read: Mapping[str, Any] | None = None
    cards: Cards = field(default_factory=Cards)

    def canaries(self, secret: SecretRandomness) -> Canaries:
        """The canaries that this key puts among its rows."""
        server, train = self.experiment.server, self.experiment.clients.train
        return canaries_of(server, train, secret, make=self.make, tokenizer=self.tokenizer, words=self.vocabulary)

    def planted(self, secret: SecretRandomness) -> LoadedExperiment:
        """The same, its clients with the canaries of this key that are in."""
        return self._with(self.canaries(secret).shards(len(self.clients_data)))

    def fingerprinted(self) -> LoadedExperiment:
        """The same, its clients with the secret pairs that the recipe's section ``fingerprint`` gives them.

        Raises:
            LichenError: as :func:`lichen.recipes.assemble.sides.fingerprints.fingerprints_of`.
        """
        recipe, names = self.experiment.recipe, [one.name for one in self.clients_data]
        if recipe.fingerprint is None:
            return self
        pairs = fingerprint_rows(names, fingerprints_of(recipe, names), self.make)
        return replace(self, experiment=self.experiment.with_rows(pairs=pairs))

    def _with(self, more: Sequence[Shard]) -> LoadedExperiment:
        """The same, with these rows of each client among those that the federation trains on."""
        before = self.experiment.clients.canaries
        both = [pooled(pair) for pair in zip(before, more, strict=True)] if before else more
        return replace(self, experiment=self.experiment.with_rows(canaries=tuple(both)))


def fetch_named(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Fetch what the recipe names from the catalog, before anything is loaded."""
    names = [recipe.model.name, recipe.data.name, recipe.compare.retention_text]
    names += [recipe.stream.rebase.model] if recipe.stream and recipe.stream.rebase else []
    names += [recipe.offsite.model] if recipe.offsite else []
    teacher = recipe.teacher
    names += [teacher.name] if teacher and teacher.kind != "labels" and not teacher.endpoint else []
    if recipe.synthetic:
        names += [] if recipe.synthetic.endpoint else [recipe.synthetic.name]
        names += [recipe.synthetic.embedder] if recipe.synthetic.kind == "evolution" else []
    names += [recipe.model.scratch.text] if recipe.model.scratch else []
    names += [recipe.unsafe_requests] if recipe.writes else []
    names += [recipe.federation.repair.name] if recipe.federation.repair else []
    names += [recipe.attack.requests] if recipe.attack and recipe.attack.kind == "unsafe" else []
    for name in names:
        if name in CATALOG:
            fetch_entry(str(name), say=say)


def shards_of(
    clients_data: Sequence[ClientData],
    part: str,
    make: Callable[[Sequence[Record]], Shard],
    *,
    apart: bool = False,
    second: Callable[[Shard], Shard] | None = None,
) -> tuple[Shard, ...]:
    """One shard a client; a part that all clients share is made once.

    Args:
        clients_data: The clients.
        part: ``"train"``, ``"valid"`` or ``"test"``.
        make: Makes a shard of records.
        apart: A record is no row, so that each client's shard is made by itself; else all are stretches of one.
        second: Gives the rows of one client what they are compared with, from these rows alone.
    """
    parts = {id(rows): rows for client_data in clients_data if (rows := getattr(client_data, part))}
    if apart:
        each = {place: make(rows) for place, rows in parts.items()}
        return tuple(
            each[id(rows)] if (rows := getattr(client_data, part)) else make(()) for client_data in clients_data
        )
    records = [record for rows in parts.values() for record in rows]
    whole = make(records)
    begin = dict(zip(parts, accumulate(map(len, parts.values()), initial=0), strict=False))
    made = {place: whole.between(begin[place], begin[place] + len(rows)) for place, rows in parts.items()}
    if second is not None:
        made = {place: second(shard) for place, shard in made.items()}
    nothing = whole.between(0, 0)
    return tuple(made.get(id(getattr(client_data, part)), nothing) for client_data in clients_data)


def open_recipe(
    recipe: Recipe,
    *,
    say: Callable[[str], None] = lambda _: None,
    keep_private: bool = True,
    report_counts: bool = False,
) -> LoadedExperiment:
    """Open a recipe of task chat or classify.

    Args:
        recipe: Is to have been read.
        say: Called with lines of progress.
        keep_private: What is made of private rows may stay in the cache for the next time.
        report_counts: Count what was read, and say it.

    Raises:
        LichenError: whatever does not fit, by its key.
    """
    fetch_named(recipe, say)
    gathered = gather_all(recipe)
    labels = classes_of(recipe, gathered.records)
    public_split = with_replay(recipe, gathered.before, split_public(recipe, gathered.records))
    declaring = public_split.clients_data if recipe.writes else labelled_of(public_split.clients_data)
    absent = absent_of(recipe, [one.name for one in declaring])
    clients_data = rows_left(declaring, absent)
    public_split = replace(public_split, clients_data=rows_left(public_split.clients_data, absent))
    say(f"{len(clients_data)} clients, {sum(len(o.train) for o in clients_data):,} rows to train on")
    texts = declaring[0].train[0].features is None if declaring[0].train else True
    loaded = load_model(recipe, labels, clients_data, reads_text=texts, keep_private=keep_private)
    model, tokenizer, classes = loaded.model, loaded.tokenizer, loaded.classes
    read = report_read(recipe, gathered, public_split, tokenizer, say) if report_counts else None
    for note in loaded.notes:
        say(note)
    mute = None if read is None else lambda _: None  # what the encoder counts has been said of all rows together
    make = encode(recipe, tokenizer, classes, keep_private=keep_private, say=mute or say)
    apart = recipe.data.form == "stream"
    # A language model learns from what a teacher wrote after public rows, not from these.
    public: Shard | None = make(public_split.unlabelled) if public_split.unlabelled and classes else None
    words: Frequent | None = None
    if model is None and isinstance(public, TextShard):
        words = words_of(public, tokenizer)
        make, public = _in_words(make, words), words.renumber(public)
    second = second_answers(recipe)
    whole = ClientSide(
        train=shards_of(declaring, "train", make, apart=apart, second=second),
        valid=shards_of(declaring, "valid", make, apart=apart, second=second),
        test=shards_of(declaring, "test", make, apart=apart, second=second),
    )
    if model is None:
        size = len(words) if words else len(tokenizer) if tokenizer else 0
        model = make_student(recipe, whole.train[0], classes, vocabulary=size)
    pad = pad_id(tokenizer) if tokenizer is not None else 0
    clients = ClientSide(
        train=shards_left(whole.train, absent),
        valid=shards_left(whole.valid, absent),
        test=shards_left(whole.test, absent),
        absent=absent,
    )
    experiment = Experiment.of(
        recipe,
        model,
        clients,
        start=Shared(start_of(recipe, model, classes, say=say)),
        classes=classes,
        pad=words.words[pad] if words else pad,
    )
    names = [client_data.name for client_data in clients_data]
    labels = classes if recipe.declares_labels else ()
    roster = declared(whole, names, classes=labels, capacity_N=_capacity_N(replace(experiment, clients=whole)))
    capacity = capacity_from(roster, scaling=scaling_of(recipe.model.adapter))
    robust = recipe.federation.robust
    judged = recipe.value is not None and recipe.value.rows == "public"
    own = judged or (robust is not None and robust.asks_server)
    labelled = make(public_split.labelled) if own else None
    repair = make(repairs(recipe)) if recipe.federation.repair is not None else None
    split = split_parts(recipe, loaded.foundation, model)
    experiment = experiment.with_server(roster=roster, capacity=capacity, labelled=labelled, repair=repair, split=split)
    if split is not None and recipe.federation.memory is not None:
        whole_experiment = replace(experiment, clients=whole)
        experiment = experiment.with_server(split=fitting_parts(whole_experiment, _task(whole_experiment)))
    refuse_warmup(experiment.server)
    refuse_personal(experiment.server)
    refuse_truth(experiment.server)
    experiment = experiment.with_rows(poison=poison_of(experiment.server, clients.train, tokenizer, words, make=make))
    return LoadedExperiment(
        experiment=experiment,
        clients_data=clients_data,
        classes=classes,
        foundation=loaded.foundation,
        tokenizer=tokenizer,
        public_split=public_split,
        make=make,
        public=public,
        vocabulary=words,
        rows=len(gathered.records),
        data=records_digest(gathered.records),
        read=read,
        cards=gathered.cards,
    )


def second_answers(recipe: Recipe) -> Callable[[Shard], Shard] | None:
    """Gives a client's rows mismatched answers, where the loss of preferences is held against them."""
    if not recipe.prefers or not recipe.preference.facts.of_batch:
        return None

    def second(shard: Shard) -> Shard:
        assert isinstance(shard, TextShard)
        assert shard.compared is not None
        other = cache(partial(mismatched, shard, max_length=recipe.data.max_length))
        return replace(shard, compared=replace(shard.compared, second=other))

    return second


def words_of(public: TextShard, tokenizer: Any) -> Frequent:
    """The 4,096 most frequent words of public text, for students that are trained from nothing."""
    keep = sorted({int(t) for t in (pad_id(tokenizer), tokenizer.unk_token_id) if t is not None})
    unknown = int(tokenizer.unk_token_id if tokenizer.unk_token_id is not None else keep[0])
    return Frequent.of([public], size=4096, keep=keep, unknown=unknown)


def _in_words(make: Callable[[Sequence[Record]], Shard], words: Frequent) -> Callable[[Sequence[Record]], Shard]:
    def made(records: Sequence[Record]) -> Shard:
        shard = make(records)
        assert isinstance(shard, TextShard)
        return words.renumber(shard)

    return made


def _capacity_N(experiment: Experiment) -> Sequence[Hashable]:
    """What each client can train, by the recipe's ranks or by its memory; nothing where all train everything."""
    fed, count = experiment.recipe.federation, len(experiment.clients.train)
    if fed.memory is not None and experiment.recipe.split is None:
        capacity = capacity_of(experiment, _task(experiment))
        return () if capacity is None else [capacity.key(client) for client in range(count)]
    return () if fed.ranks is None else [(fed.ranks[client % len(fed.ranks)], None) for client in range(count)]


def _task(experiment: Experiment) -> ClientTask:
    """What clients do in a round."""
    return client_tasks(experiment)[f"train {lr_name(experiment.recipe.optimizer.lr[0])}"]
