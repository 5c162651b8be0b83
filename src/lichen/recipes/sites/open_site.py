"""Opens one site's side of a recipe: its own rows and no other's, its clients at their numbers in the roster.

A site first reads its file and announces what it has (:mod:`lichen.recipes.sites.announced`). The server makes one
roster of all sites and assigns each its clients' numbers. From then on the site can do all that a node of the whole
recipe can, for its own clients: their splits, batches and draws are those of a simulation over a folder in which every
site has its file.

Legend: N clients of the roster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lichen.audit.fingerprint import Fingerprint
from lichen.core.contracts.model import CohortModel
from lichen.core.errors import LichenError
from lichen.core.masks.party import Identity
from lichen.core.roster import PARTS, Member, Roster
from lichen.core.wire.shared import Shared
from lichen.data.batches.rows import Shard
from lichen.data.batches.text import pad_id
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.loaded_model import load_model
from lichen.recipes.assemble.model import make_student, start_of
from lichen.recipes.assemble.open import fetch_named, second_answers, shards_of
from lichen.recipes.assemble.preference.references import with_references
from lichen.recipes.assemble.sides.clients import TOKENS, ClientSide, group_of
from lichen.recipes.assemble.sides.fingerprints import digests_of, fingerprint_rows, own_fingerprints
from lichen.recipes.assemble.sides.privacy import own_accounts
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.rows.checked_cards import Cards
from lichen.recipes.rows.prepare import encode as encoder
from lichen.recipes.rows.site_rows import SiteRows, read_site, refuse_everybodys
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.announced import Announcement, Assignment
from lichen.recipes.sites.announced_cards import cards_to_announce
from lichen.recipes.sites.loaded_site import LoadedSite
from lichen.recipes.sites.open_server import refuse_rows
from lichen.recipes.sites.own_models import own_writer
from lichen.recipes.sites.passports import Papers
from lichen.recipes.sites.rounds_node import RoundsNode
from lichen.recipes.sites.statistics_node import statistics_node
from lichen.tasks.registry import task_of

__all__ = ["Site", "open_site"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The model, and the site's rows as it reads them, one shard a client; ``pairs`` are its owners' secret ones."""

    model: CohortModel
    start: Shared
    classes: tuple[str, ...]
    pad: int
    train: tuple[Shard, ...]
    valid: tuple[Shard, ...]
    test: tuple[Shard, ...]
    pairs: tuple[Shard, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A site that has read its rows.

    Attributes:
        recipe: The recipe, its data being the site's own.
        rows: Its clients and their rows.
        announcement: What it says of them.
        encode: Loads the model for these labels, and encodes the rows for it; once where there are none to wait for.
        papers: By which it and others know one another under masks; None without a kit.
    """

    recipe: Recipe
    rows: SiteRows
    announcement: Announcement
    encode: Callable[[tuple[str, ...]], Encoded]
    papers: Papers | None = None

    def known(self, papers: Papers) -> Site:
        """The same with papers, which it shows."""
        return replace(self, announcement=replace(self.announcement, passport=papers.passport), papers=papers)

    def check(self, assigned: Assignment) -> None:
        """Refuse a place that is for other clients or labels, or among sites that cannot prove who they are.

        Raises:
            LichenError: saying which.
        """
        mine, own = self.announcement.members, assigned.numbers
        if len(own) != len(mine):
            raise _wrong(f"this site is assigned {len(own)} clients, and has announced {len(mine)}")
        if lost := [str(label) for label in self.announcement.labels if str(label) not in assigned.labels]:
            raise _wrong(f"the label {lost[0]!r} of this site is not among those of all sites")
        self._identity(assigned)

    def _identity(self, assigned: Assignment) -> Identity | None:
        if self.papers is None:
            return None
        return self.papers.identity(assigned.sites, assigned.numbers, assigned.clients)

    def join(self, assigned: Assignment, state: Path) -> LoadedSite:
        """Take the place that the server has given this site.

        Args:
            assigned: The place.
            state: The folder of the site's state.

        Raises:
            LichenError: as :meth:`check`, or if the model does not load.
        """
        self.check(assigned)
        mine, own = self.announcement.members, assigned.numbers
        if not task_of(self.recipe.task).procedure.rounds:
            clients_data = dict(zip(own, self.rows.clients_data, strict=True))
            solving = statistics_node(self.recipe, _own_roster(mine, assigned), assigned.labels, clients_data)
            return LoadedSite(node=solving, numbers=own, identity=self._identity(assigned))
        encoded = self.encode(assigned.labels)
        server = ServerSide(
            recipe=self.recipe,
            model=encoded.model,
            start=encoded.start,
            roster=_own_roster(mine, assigned),
            classes=encoded.classes,
            pad=encoded.pad,
        )
        place = {number: at for at, number in enumerate(own)}

        def shards(some: tuple[Shard, ...]) -> tuple[Shard, ...]:
            nothing = some[0].between(0, 0)
            return tuple(some[place[n]] if n in place else nothing for n in range(assigned.clients))

        clients = ClientSide(
            train=shards(encoded.train),
            valid=shards(encoded.valid),
            test=shards(encoded.test),
            pairs=shards(encoded.pairs) if encoded.pairs else (),
            state=state,
        )
        accounts = own_accounts(server, state, assigned.bounds)
        node = RoundsNode(with_references(Experiment(server=server, clients=clients), state), accounts=accounts)
        names = {number: member.name for number, member in zip(own, mine, strict=True)}
        writes = self.recipe.personal is not None and self.recipe.privacy is None
        write = own_writer(self.recipe, encoded.model, state, names) if writes else None
        return LoadedSite(node=node, numbers=own, identity=self._identity(assigned), write=write)


def open_site(
    recipe: Recipe,
    data: Path,
    *,
    secret: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    keep_private: bool = True,
) -> Site:
    """Read one site's rows, in place of those that the recipe names.

    Args:
        recipe: The recipe of the federation; of its ``data.name`` nothing is opened.
        data: The site's file, or its folder of files.
        secret: The key of its owner, or a folder of keys, by which they can claim the model; None: it has none.
        say: Called with what a person should know, a line each.
        keep_private: What is made of its rows may stay in the cache.

    Raises:
        LichenError: if the recipe needs everybody's rows, by its key, or the data cannot be read.
    """
    refuse_rows(recipe)
    refuse_everybodys(recipe)
    labels = task_of(recipe.task).labels
    if labels is not None and not labels.classes:
        raise LichenError(f"labels of task {recipe.task} are no names to announce", where="task", fix="use classify")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"name": os.path.abspath(data)})})
    fetch_named(recipe, say)
    rows = read_site(recipe, data)
    say(f"{len(rows.clients_data)} clients, {sum(len(one.train) for one in rows.clients_data):,} rows to train on")
    for line in (*rows.cards.notes, *(f"left out: {one.why}" for one in rows.cards.left)):
        say(line)

    fingerprints = _fingerprints(recipe, secret, [one.name for one in rows.clients_data], say)

    def encode(labels: tuple[str, ...]) -> Encoded:
        return _encoded(recipe, rows, labels, fingerprints, say=say, keep_private=keep_private)

    counts_N = [{part: len(getattr(one, part)) for part in PARTS} for one in rows.clients_data]
    if recipe.writes:  # there is nothing to wait for, and a stream's rows are counted by their tokens
        whole = encode(())
        counts_N = [{part: getattr(whole, part)[c].size for part in PARTS} for c in range(len(counts_N))]
        encode = lambda labels: whole  # noqa: E731
    named_N = zip(rows.clients_data, counts_N, strict=True)
    members = tuple(Member(name=one.name, rows=counts, group=_group(rows)) for one, counts in named_N)
    # Cards are told of where the recipe asks for them, and only what it can ask for.
    own = rows.cards if recipe.data.require is not None else Cards()
    cards = cards_to_announce(own, [member.name for member in members])
    digests = digests_of(fingerprints)
    announcement = Announcement(members=members, labels=rows.labels, cards=cards, fingerprints=digests)
    return Site(recipe=recipe, rows=rows, announcement=announcement, encode=encode)


def _fingerprints(
    recipe: Recipe, secret: Path | None, names: Sequence[str], say: Callable[[str], None]
) -> dict[str, Fingerprint]:
    """The owners' secret pairs, where the recipe has room for some."""
    if recipe.fingerprint is None:
        if secret is not None:
            say("this recipe has no fingerprint: the secret key is not used, and nobody can claim its model by it")
        return {}
    found = own_fingerprints(secret, names)
    for name, one in found.items():
        say(f"{name}'s secret pairs are among its rows; their key has the digest {one.digest}")
    if not found:
        say("this recipe has a fingerprint, and this site no key: name one by --secret to claim its model later")
    return found


def _group(rows: SiteRows) -> str:
    """What all rows of a site look like."""
    numbers = next((row.features for one in rows.clients_data for row in (*one.train, *one.test)), None)
    return group_of(None if numbers is None else numbers.shape)


def _encoded(
    recipe: Recipe,
    rows: SiteRows,
    labels: tuple[str, ...],
    fingerprints: Mapping[str, Fingerprint],
    *,
    say: Callable[[str], None],
    keep_private: bool,
) -> Encoded:
    """As :func:`lichen.recipes.assemble.open.open_recipe` does it with everybody's rows."""
    loaded = load_model(recipe, labels, (), reads_text=_group(rows) == TOKENS, keep_private=keep_private)
    for note in loaded.notes:
        say(note)
    make = encoder(recipe, loaded.tokenizer, loaded.classes, keep_private=keep_private, say=say)
    apart = recipe.data.form == "stream"
    second = second_answers(recipe)
    train, valid, test = (shards_of(rows.clients_data, part, make, apart=apart, second=second) for part in PARTS)
    model = loaded.model
    if model is None:
        size = len(loaded.tokenizer) if loaded.tokenizer is not None else 0
        model = make_student(recipe, train[0], loaded.classes, vocabulary=size)
    return Encoded(
        model=model,
        start=Shared(start_of(recipe, model, loaded.classes, say=say)),
        classes=loaded.classes,
        pad=pad_id(loaded.tokenizer) if loaded.tokenizer is not None else 0,
        train=train,
        valid=valid,
        test=test,
        pairs=_pairs(recipe, rows, fingerprints, make),
    )


def _pairs(
    recipe: Recipe, rows: SiteRows, fingerprints: Mapping[str, Fingerprint], make: Callable[..., Shard]
) -> tuple[Shard, ...]:
    if recipe.fingerprint is None:
        return ()
    return fingerprint_rows([one.name for one in rows.clients_data], fingerprints, make)


def _own_roster(mine: Sequence[Member], assigned: Assignment) -> Roster:
    """The roster as a site knows it: its own members, and of others only that they are there."""
    elsewhere = "of another site"
    while any(elsewhere in member.name for member in mine):
        elsewhere += "'"
    members = [Member(name=f"client {n} {elsewhere}", rows={}) for n in range(assigned.clients)]
    for number, member in zip(assigned.numbers, mine, strict=True):
        members[number] = member
    return Roster(tuple(members))


def _wrong(what: str) -> LichenError:
    return LichenError(what, where="roster", fix="start server and sites anew, with one recipe")
