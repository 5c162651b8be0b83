"""Data cards that were checked: whose rows are used under which, and whose were left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lichen.core.visible import listed
from lichen.data.reading import Left
from lichen.recipes.rows.data_card import DataCard

__all__ = ["Cards", "CheckedCard", "Dropped"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedCard:
    """A card whose rows are used.

    Attributes:
        card: What it says.
        sha256: Digest of the card's file.
        clients: Whose rows it speaks for; None: everybody's.
        files: Where they lie.
    """

    card: DataCard
    sha256: str
    clients: frozenset[str] | None = None
    files: frozenset[Path] = frozenset()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Owners whose rows are left out.

    Attributes:
        clients: By the names of their files.
        card: What it says.
        files: What is not read.
        rows: Rows that were read, and are not used.
    """

    clients: tuple[str, ...]
    card: DataCard
    files: tuple[Path, ...]
    rows: int = 0

    @property
    def why(self) -> str:
        """The reason, with its key."""
        return f"the data card ended on {self.card.until} (data.require.expired: leave_out)"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """The cards of a recipe's data.

    Attributes:
        checked: Those whose rows are used.
        dropped: Those whose rows are not.
        notes: What is worth a sentence.
    """

    checked: tuple[CheckedCard, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def unread(self) -> frozenset[Path]:
        """Files that are left out."""
        return frozenset(file for one in self.dropped for file in one.files)

    @property
    def left(self) -> tuple[Left, ...]:
        """What was read says of those."""
        return tuple(
            Left(why=f"{one.why}: {listed(one.clients)}", rows=one.rows, clients=len(one.clients))
            for one in self.dropped
        )

    def of_clients(self, files: Mapping[str, Collection[Path]]) -> Cards:
        """The same, each card with its clients.

        Args:
            files: Where the rows of each client lie.
        """
        checked = tuple(
            replace(one, clients=frozenset(name for name, of in files.items() if not one.files.isdisjoint(of)))
            for one in self.checked
        )
        return replace(self, checked=checked)

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """What a summary holds: the clients of each licence, the cards, and who was left out.

        Args:
            names: The clients that take part.
        """
        licences: dict[str, int] = {}
        cards: list[dict[str, Any]] = []
        taking = frozenset(names)
        for one in self.checked:
            count = len(taking) if one.clients is None else len(taking & one.clients)
            if not count:
                continue
            known = one.card.licence or "not stated"
            licences[known] = licences.get(known, 0) + count
            cards.append({"sha256": one.sha256, "clients": count, **_shown(one.card)})
        gone = [{"clients": list(one.clients), "owner": one.card.owner, "why": one.why} for one in self.dropped]
        return {"licences": licences, "cards": cards, "cards_left": gone}


def _shown(card: DataCard) -> dict[str, Any]:
    return {
        "owner": card.owner,
        "source": card.source,
        "licence": card.licence,
        "consent": card.consent,
        "purposes": list(card.purposes),
        "until": card.until,
    }
