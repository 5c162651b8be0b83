"""What a site announces, what it is assigned, and the roster of all sites.

A site announces its clients as members of a roster, and the labels of its rows: names and counts, nothing else of a
row; and of its data cards, where the recipe requires some, under which terms the rows come. The server sorts the
members of all sites by name, as a simulation sorts its clients, so that a client has one number in both: all draws
follow from the seed and that number. Each site is then assigned its clients' numbers, how many clients there are, and
the labels of all.

What comes is checked: it comes from another machine, and may be damage or a lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.roster import MOST_LABELS, MOST_LETTERS, MOST_MEMBERS, MOST_ROWS, PARTS, Member, Roster, declared_name
from lichen.core.visible import clipped
from lichen.recipes.assemble.sides.row_privacy import hides_rows, row_bounds
from lichen.recipes.rows.checked_cards import Cards
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.announced_cards import AnnouncedCard, enrolled_cards
from lichen.recipes.sites.announced_fingerprints import check_fingerprints, enrolled_fingerprints
from lichen.recipes.sites.passports import Passport, SiteClients, all_sites
from lichen.tasks.registry import task_of

__all__ = ["Announcement", "Assignment", "enrolled"]

_MOST_WHOLE = 1 << 63
"""Of a label that is a number."""

_FIX = "both ends must run the same version of lichen; else leave this site out"


def _wrong(what: str) -> LichenError:
    return LichenError(what, where="roster", fix=_FIX)


def _check_labels(labels: object) -> tuple[str | int, ...]:
    if not isinstance(labels, list | tuple) or len(labels) > MOST_LABELS:
        raise _wrong(f"labels are a list of at most {MOST_LABELS:,}")
    for label in labels:
        whole = isinstance(label, int) and not isinstance(label, bool) and abs(label) < _MOST_WHOLE
        if not whole and not (isinstance(label, str) and label and declared_name(label) == label):
            shown = clipped(str(label), 60)
            raise _wrong(f"a label {shown!r} is neither a number nor a line of at most {MOST_LETTERS} letters")
    if len(set(labels)) < len(labels):
        raise _wrong("a label is named twice")
    return tuple(labels)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What one site says of itself.

    Attributes:
        members: Its clients, in name order.
        labels: Those of its rows, each once, sorted; none where the task has none.
        cards: What it tells of its data cards; none where the recipe requires none.
        passport: Proves the key that signs for its clients under masks; None without a kit.
        fingerprints: Digests of its owners' secret keys, by client; none where the recipe has no fingerprints.

    Raises:
        LichenError: if any of this is no such thing.
    """

    members: tuple[Member, ...]
    labels: tuple[str | int, ...] = ()
    cards: tuple[AnnouncedCard, ...] = ()
    passport: Passport | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.members:
            raise _wrong("a site has no client")
        _check_labels(self.labels)
        check_fingerprints(self.fingerprints, {member.name for member in self.members})

    def dump(self) -> dict[str, Any]:
        """What JSON can write of it."""
        cards = {"cards": [card.dump() for card in self.cards]} if self.cards else {}
        passport = {} if self.passport is None else {"passport": self.passport.dump()}
        more = {"fingerprints": dict(self.fingerprints)} if self.fingerprints else {}
        members = [member.dump() for member in self.members]
        return {"members": members, "labels": list(self.labels), **cards, **passport, **more}

    @classmethod
    def load(cls, plain: object) -> Announcement:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if this is no announcement.
        """
        may = {"cards", "passport", "fingerprints"}
        if not isinstance(plain, Mapping) or plain.keys() - may != {"members", "labels"}:
            raise _wrong("a site announces members and labels, and may announce cards, a passport and fingerprints")
        members, cards = plain["members"], plain.get("cards", [])
        if not isinstance(members, list) or not len(members) <= MOST_MEMBERS:
            raise _wrong(f"members are a list of at most {MOST_MEMBERS:,}")
        if not isinstance(cards, list) or len(cards) > MOST_LABELS:
            raise _wrong(f"cards are a list of at most {MOST_LABELS:,}")
        return cls(
            members=tuple(map(Member.load, members)),
            labels=_check_labels(plain["labels"]),
            cards=tuple(AnnouncedCard.load(card, len(members)) for card in cards),
            passport=Passport.load(plain["passport"]) if "passport" in plain else None,
            fingerprints=plain.get("fingerprints", {}),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What the server says to one site.

    Attributes:
        numbers: Of its clients in the roster, in the order in which it has announced them.
        clients: How many the roster has.
        labels: Those of all sites, in class order.
        bounds: Training rows of the clients with fewest and most, where noise hides each row; else None.
        sites: All sites and their clients, where they know one another's keys under masks; else none.

    Raises:
        LichenError: if these are no numbers of a roster.
    """

    numbers: tuple[int, ...]
    clients: int
    labels: tuple[str, ...] = ()
    bounds: tuple[int, int] | None = None
    sites: tuple[SiteClients, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.clients, bool) or not isinstance(self.clients, int) or not 0 < self.clients <= MOST_MEMBERS:
            raise _wrong(f"{self.clients!r} is no number of clients")
        good = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < self.clients for n in self.numbers)
        if not good or any(a >= b for a, b in zip(self.numbers, self.numbers[1:], strict=False)):
            raise _wrong(f"the numbers of a site's clients rise, from 0 to {self.clients - 1}")
        if not all(isinstance(label, str) for label in _check_labels(self.labels)):
            raise _wrong("the labels of all sites are texts")
        if self.bounds is not None:
            whole = all(isinstance(n, int) and not isinstance(n, bool) for n in self.bounds)
            if len(self.bounds) != 2 or not whole or not 0 <= self.bounds[0] <= self.bounds[1] <= MOST_ROWS:
                raise _wrong("bounds are the fewest and the most rows of a client")

    def dump(self) -> dict[str, Any]:
        """What JSON can write of it."""
        bounds = {} if self.bounds is None else {"bounds": list(self.bounds)}
        sites = {"sites": [one.dump() for one in self.sites]} if self.sites else {}
        return {"numbers": list(self.numbers), "clients": self.clients, "labels": list(self.labels), **bounds, **sites}

    @classmethod
    def load(cls, plain: object) -> Assignment:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if this is no assignment.
        """
        if not isinstance(plain, Mapping) or plain.keys() - {"bounds", "sites"} != {"numbers", "clients", "labels"}:
            raise _wrong("a site is assigned numbers, clients and labels, and may be assigned bounds and sites")
        numbers, labels, bounds = plain["numbers"], plain["labels"], plain.get("bounds")
        sites = plain.get("sites", [])
        if not all(isinstance(some, list) for some in (numbers, labels, [] if bounds is None else bounds, sites)):
            raise _wrong("numbers, labels, bounds and sites are lists")
        return cls(
            numbers=tuple(numbers),
            clients=plain["clients"],
            labels=tuple(labels),
            bounds=None if bounds is None else tuple(bounds),
            sites=tuple(map(SiteClients.load, sites)),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """All sites together.

    Attributes:
        roster: Their clients, sorted by name.
        homes: The site of each client.
        labels: Those of all sites, in class order; none where the task has none.
        assigned: What each site is to be told.
        cards: Their data cards, as far as they are announced.
        fingerprints: Digests of owners' secret keys, by client.
    """

    roster: Roster
    homes: tuple[str, ...]
    labels: tuple[str, ...]
    assigned: Mapping[str, Assignment]
    cards: Cards = field(default_factory=Cards)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def signed(self) -> bool:
        """Sites know one another's keys."""
        return all(one.sites for one in self.assigned.values())


def enrolled(recipe: Recipe, announced: Mapping[str, Announcement]) -> Enrolled:
    """The roster of a federation, from what its sites have announced.

    Args:
        recipe: The recipe.
        announced: By site.

    Raises:
        LichenError: if two sites have a client of one name, clients are missing, labels cannot be learned, or a data
            card does not fit the recipe.
    """
    homes: dict[str, str] = {}
    members: dict[str, Member] = {}
    for site, announcement in announced.items():
        for member in announcement.members:
            if member.name in homes:
                both = f"{homes[member.name]!r} and {site!r}" if homes[member.name] != site else f"{site!r} twice"
                raise LichenError(
                    f"sites {both} announce the client {member.name!r}",
                    where="roster",
                    fix="give clients names of their own, by the file's name or in the column data.columns.client",
                )
            homes[member.name], members[member.name] = site, member
    names = sorted(members)
    ranks = recipe.federation.ranks
    roster = Roster(
        tuple(
            members[name] if ranks is None else replace(members[name], capacity=(ranks[n % len(ranks)], None))
            for n, name in enumerate(names)
        )
    )
    labels = _labels_of(recipe, announced, roster)
    number = {name: n for n, name in enumerate(names)}
    bounds = row_bounds(roster) if hides_rows(recipe) else None
    numbers_of = {site: tuple(number[m.name] for m in one.members) for site, one in announced.items()}
    sites_of_all = all_sites({site: one.passport for site, one in announced.items()}, numbers_of)
    assigned = {
        site: Assignment(numbers=own, clients=len(names), labels=labels, bounds=bounds, sites=sites_of_all)
        for site, own in numbers_of.items()
    }
    terms = {site: (one.members, one.cards) for site, one in announced.items()}
    return Enrolled(
        roster=roster,
        homes=tuple(homes[name] for name in names),
        labels=labels,
        assigned=assigned,
        cards=enrolled_cards(recipe.data.require, terms),
        fingerprints=enrolled_fingerprints(recipe, [one.fingerprints for one in announced.values()]),
    )


def _labels_of(recipe: Recipe, announced: Mapping[str, Announcement], roster: Roster) -> tuple[str, ...]:
    """The labels of all rows, in the order that they have in a simulation."""
    labels = task_of(recipe.task).labels
    if labels is None:
        return ()
    found = list(dict.fromkeys(label for one in announced.values() for label in one.labels))
    if recipe.data.classes and not all(one.labels for one in announced.values()):
        found = list(recipe.data.classes)  # a site may keep to itself which of them it has
    have = set(map(str, found))
    missing = [str(label) for label in recipe.data.classes if str(label) not in have]
    if missing or not found:
        what = f"no site has a row with the label {missing[0]!r}" if missing else "no site has a label"
        raise LichenError(what, where="data.classes" if missing else "data.columns.label", fix="name those of the data")
    rows = sum(sum(roster.rows(part)) for part in PARTS)
    # As many as there are rows, so that a column in which nothing repeats is refused as in a simulation.
    return labels.names(found * max(1, rows // len(found)))
