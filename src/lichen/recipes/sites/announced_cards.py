"""What a site announces of its data cards where a recipe requires some: licence, purposes, last day and digest.

A site holds its own cards against the recipe, where the rows lie, and tells nothing else of them: not who the owner is,
nor where the rows come from. The server holds what it is told against the recipe once more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.roster import MOST_MEMBERS, Member
from lichen.recipes.rows.cards import refuse_terms, utc_today
from lichen.recipes.rows.checked_cards import Cards, CheckedCard
from lichen.recipes.rows.data_card import DataCard
from lichen.recipes.schema.data import RequireConfig
from lichen.recipes.schema.strict import check, plain

__all__ = ["AnnouncedCard", "cards_to_announce", "enrolled_cards"]

_KEYS = ("licence", "purposes", "until")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIX = "both ends must run the same version of lichen; else leave this site out"


def _wrong(what: str) -> LichenError:
    return LichenError(what, where="roster", fix=_FIX)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncedCard:
    """A card, as far as a site tells of it.

    Attributes:
        card: Licence, purposes and last day; nothing else is filled in.
        sha256: Digest of the card's file.
        clients: Places of the card's clients among the members that the site announces.
    """

    card: DataCard
    sha256: str
    clients: tuple[int, ...]

    def dump(self) -> dict[str, Any]:
        """What JSON can write of it."""
        terms = self.card.model_dump(mode="json", include=set(_KEYS))
        return {**terms, "sha256": self.sha256, "clients": list(self.clients)}

    @classmethod
    def load(cls, dumped: object, members: int) -> AnnouncedCard:
        """Undo :meth:`dump`.

        Args:
            dumped: What came.
            members: How many clients the site announces.

        Raises:
            LichenError: if this is no such card.
        """
        if not isinstance(dumped, Mapping) or dumped.keys() != {*_KEYS, "sha256", "clients"}:
            raise _wrong("of a data card a site announces licence, purposes, until, sha256 and clients")
        sha256, clients = dumped["sha256"], dumped["clients"]
        if not isinstance(sha256, str) or not _DIGEST.fullmatch(sha256):
            raise _wrong("the digest of a data card has 64 small hex digits")
        if not isinstance(clients, list) or not 0 < len(clients) <= MOST_MEMBERS:
            raise _wrong("a data card is of one client at least")
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < members for n in clients):
            raise _wrong(f"the clients of a data card are numbers from 0 to {members - 1}")
        if len(set(clients)) < len(clients):
            raise _wrong("a data card names a client twice")
        try:
            card = check(DataCard, plain({key: dumped[key] for key in _KEYS}, "card"))
        except LichenError as error:
            raise _wrong(f"a data card is announced with {error.where}, which {error.what}") from None
        return cls(card=card, sha256=sha256, clients=tuple(clients))


def cards_to_announce(cards: Cards, names: Sequence[str]) -> tuple[AnnouncedCard, ...]:
    """What a site tells of its cards.

    Args:
        cards: Its own, checked.
        names: Its clients, in the order in which it announces them.
    """
    found = []
    for one in cards.checked:
        clients = tuple(n for n, name in enumerate(names) if one.clients is None or name in one.clients)
        if clients:
            card = DataCard(**{key: getattr(one.card, key) for key in _KEYS})
            found.append(AnnouncedCard(card=card, sha256=one.sha256, clients=clients))
    return tuple(found)


def enrolled_cards(
    require: RequireConfig | None,
    announced: Mapping[str, tuple[Sequence[Member], Sequence[AnnouncedCard]]],
    *,
    today: Callable[[], date] = utc_today,
) -> Cards:
    """The cards of all sites, held against what the recipe requires, as far as they are announced.

    Args:
        require: What they must say.
        announced: Each site's members and cards.
        today: The day that a card's last one is held against.

    Raises:
        LichenError: naming the site and the client, for a client without a card, or a card that does not fit.
    """
    checked = []
    for site, (members, cards) in announced.items():
        for one in cards:
            clients = frozenset(members[n].name for n in one.clients)
            who = f"client {min(clients)!r} of site {site!r}"
            if require is not None:
                refuse_terms(require, one.card, who, f"site {site}")
                if one.card.ended(today()):
                    fix = "ask the site to renew it"
                    raise LichenError(
                        f"the data card of {who} ended on {one.card.until}", where=f"site {site}", fix=fix
                    )
            checked.append(CheckedCard(card=one.card, sha256=one.sha256, clients=clients))
        covered = {n for one in cards for n in one.clients}
        bare = [member.name for n, member in enumerate(members) if n not in covered]
        if bare and require is not None:
            what = f"client {bare[0]!r} of site {site!r} is announced without a data card"
            raise LichenError(what, where="data.require", fix="ask the site: lichen card DATA --write")
    return Cards(checked=tuple(checked))
