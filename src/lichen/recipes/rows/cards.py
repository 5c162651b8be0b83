"""Holds owners' data cards against a recipe's ``data.require``, before a row is read.

Without ``data.require`` no card is needed and none refuses a run: those that lie there are read for the summary, and
what is wrong with one is told. A card that has ended may be left out with its rows, which are then not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.visible import listed
from lichen.data.cards.card_files import Covered, card_place, covered_by, rows_sha256
from lichen.data.cards.licences import is_allowed
from lichen.data.sources.catalog import CATALOG, Entry, looks_like_hub_id
from lichen.data.sources.datasets import declared_datasets
from lichen.recipes.rows.catalogued import catalogued_card
from lichen.recipes.rows.checked_cards import Cards, CheckedCard, Dropped
from lichen.recipes.rows.data_card import DataCard, card_text, read_card
from lichen.recipes.schema.data import DataConfig, RequireConfig

__all__ = ["Today", "card_fault", "cards_of", "check_cards", "refuse_terms", "refuse_unstated", "utc_today"]

Today = Callable[[], date]


def utc_today() -> date:
    """The day in UTC, by which a card ends."""
    return datetime.now(UTC).date()


def cards_of(data: DataConfig) -> Cards:
    """The cards of a recipe's data, checked before a row is read.

    Args:
        data: The section; a catalogue's data set has the card that the catalogue can make.

    Raises:
        LichenError: as :func:`check_cards`, and for data that can have no card where some are required.
    """
    name, require = data.name, data.require
    if data.cards is not None:
        return Cards()  # by client, once it is known who has rows
    if name in CATALOG:
        return _catalog_cards(require, CATALOG[name]) if CATALOG[name].kind == "data" else Cards()
    path = Path(name).expanduser()
    if name not in declared_datasets() and path.exists():
        return check_cards(require, path)
    if require is not None and (name in declared_datasets() or looks_like_hub_id(name)):
        what = f"{name!r} is neither a file nor of the catalogue, and has no data card"
        raise LichenError(what, where="data.require", fix="save its rows as a file, and: lichen card FILE --write")
    return Cards()


def _catalog_cards(require: RequireConfig | None, entry: Entry) -> Cards:
    """The card of a data set of the catalogue.

    Raises:
        LichenError: for what ``data.require`` asks for and the catalogue does not know, or does not grant.
    """
    card = catalogued_card(entry)
    if require is not None:
        refuse_unstated(require, card, f"the catalogue's {entry.name}", "its card in the catalogue")
    return Cards(checked=(CheckedCard(card=card, sha256=hashlib.sha256(card_text(card).encode()).hexdigest()),))


def check_cards(require: RequireConfig | None, path: Path, *, client: str = "", today: Today = utc_today) -> Cards:
    """The cards of a file or folder of rows.

    Args:
        require: What they must say; None: nothing.
        path: The file or folder.
        client: Whose it is, where its name does not say so.
        today: The day that a card's last one is held against.

    Raises:
        LichenError: naming the client and the card, for a card that is missing, damaged, not of these rows, or does not
            say what is required; and if all rows would be left out.
    """
    checked: list[CheckedCard] = []
    dropped: list[Dropped] = []
    notes: list[str] = []
    day = today()
    for one in covered_by(path):
        who = _who(one, path, client)
        try:
            card, sha256 = _read(one, who, required=require is not None)
            if card is None:
                continue
            if card.ended(day) and require is not None:
                if require.expired == "leave_out":
                    names = (client,) if client else one.owners
                    dropped.append(Dropped(clients=names, card=card, files=one.files))
                    continue
                fix = "ask the owner to renew it, or set data.require.expired: leave_out"
                raise LichenError(f"the data card of {who} ended on {card.until}", where=str(one.card), fix=fix)
            _check_digest(one, card, who, required=require is not None)
            if require is not None:
                refuse_unstated(require, card, who, str(one.card))
            elif card.ended(day):
                notes.append(f"the data card of {who} ended on {card.until}")
        except LichenError as error:
            if require is not None:
                raise
            notes.append(f"a data card says nothing here, {error.where}: {error.what}")
            continue
        checked.append(CheckedCard(card=card, sha256=sha256, files=frozenset(one.files)))
    if dropped and not checked:
        fix = "ask the owners to renew theirs"
        raise LichenError("every data card has ended, and no row is left", where="data.require.expired", fix=fix)
    return Cards(checked=tuple(checked), dropped=tuple(dropped), notes=tuple(notes))


def card_fault(one: Covered, path: Path, *, today: Today = utc_today) -> LichenError | None:
    """What is wrong with a card by itself: it is missing, damaged, not of these rows, blank, or has ended.

    Args:
        one: The card and its files.
        path: The file or folder that was asked for.
        today: The day that its last one is held against.
    """
    who = _who(one, path, "")
    try:
        card, _ = _read(one, who, required=True)
        assert card is not None
        _check_digest(one, card, who, required=True)
        if card.owner is None:
            raise LichenError("owner is not filled in", where=str(one.card), fix="fill it in")
        if card.ended(today()):
            fix = "ask the owner to renew it"
            raise LichenError(f"the data card ended on {card.until}", where=str(one.card), fix=fix)
    except LichenError as error:
        return error
    return None


def _who(one: Covered, path: Path, client: str) -> str:
    if client:
        return f"client {client!r}"
    if one.files == (path,):
        return path.name
    return f"client{'s' if len(one.owners) > 1 else ''} {listed(map(repr, one.owners), most=3)}"


def _read(one: Covered, who: str, *, required: bool) -> tuple[DataCard | None, str]:
    """The card, if somebody has filled it in; None where none is there, and none is needed."""
    if one.card is None:
        if required:
            fix = f"write one and fill it in: lichen card {one.rows} --write"
            raise LichenError(f"{who} has no data card", where=str(card_place(one.rows)), fix=fix)
        return None, ""
    card, sha256 = read_card(one.card)
    return (None if card.blank and not required else card), sha256


def _check_digest(one: Covered, card: DataCard, who: str, *, required: bool) -> None:
    again = f"if the card still holds: lichen card {one.rows} --write"
    if card.rows_sha256 is None:
        if required:
            raise LichenError(f"rows_sha256 of {who} is not filled in", where=str(one.card), fix=again)
    elif card.rows_sha256 != rows_sha256(one.rows):
        raise LichenError(f"the rows of {who} changed after the card was written", where=str(one.card), fix=again)


def refuse_unstated(require: RequireConfig, card: DataCard, who: str, where: str) -> None:
    """Refuse what a card does not say, and then as :func:`refuse_terms`.

    Raises:
        LichenError: for a value that ``data.require`` asks for and nobody has filled in.
    """
    for key, needed in (
        ("owner", True),
        ("licence", bool(require.licences)),
        ("purposes", bool(require.purposes)),
        ("consent", require.consent),
    ):
        if needed and not getattr(card, key):
            fix = "fill it in, or leave this client out"
            raise LichenError(f"{key} of {who} is not filled in, and data.require asks for it", where=where, fix=fix)
    refuse_terms(require, card, who, where)


def refuse_terms(require: RequireConfig, card: DataCard, who: str, where: str) -> None:
    """Refuse a licence that is not allowed, and purposes that are not granted.

    Args:
        require: What is required.
        card: What its owner says.
        who: Whose it is.
        where: The card's place.

    Raises:
        LichenError: saying which.
    """
    if require.licences and not (card.licence and is_allowed(card.licence, require.licences)):
        what = f"{who} comes under {card.licence or 'no licence'}, which data.require.licences does not allow"
        raise LichenError(what, where=where, fix=f"leave it out, or add to those allowed: {listed(require.licences)}")
    if missing := [word for word in require.purposes if word not in card.purposes]:
        what = f"{who} does not grant {listed(missing)}, which data.require.purposes asks for"
        raise LichenError(what, where=where, fix="ask its owner, leave it out, or ask for less")
