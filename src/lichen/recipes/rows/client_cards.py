"""Holds a folder of data cards, one a client by its name, against data in which rows of many clients lie together.

Beside a file or folder of each client lies its card (:mod:`lichen.data.cards.card_files`). Where one file, or one
package, holds everybody's rows, ``data.cards`` names a folder in which ``NAME.card.yaml`` is the card of client NAME.
Rows of others are not used: who has no card there takes no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.visible import listed
from lichen.data.cards.card_files import CARD, rows_sha256
from lichen.data.sources.catalog import CATALOG
from lichen.recipes.rows.cards import Today, refuse_unstated, utc_today
from lichen.recipes.rows.checked_cards import Cards, CheckedCard, Dropped
from lichen.recipes.rows.data_card import DataCard, read_card
from lichen.recipes.schema.data import DataConfig

__all__ = ["client_cards"]

_KEY = "data.cards"


def client_cards(data: DataConfig, rows: Mapping[str, int], *, today: Today = utc_today) -> Cards:
    """The cards of the clients that take part, and who was left out.

    Args:
        data: The section, with ``data.cards``.
        rows: How many rows each client of the data has.
        today: The day that a card's last one is held against.

    Raises:
        LichenError: for no folder, a card of no client, one that is damaged or of other rows, or that does not say what
            ``data.require`` asks for; and if nobody is left.
    """
    folder, require = Path(str(data.cards)).expanduser(), data.require
    files = {file.name.removesuffix(f".{CARD}"): file for file in sorted(folder.glob(f"*.{CARD}"))}
    if not files:
        raise LichenError(f"{folder} holds no data card", where=_KEY, fix=f"write NAME.{CARD} there for each client")
    if strangers := sorted(files.keys() - rows.keys()):
        what = f"{listed(map(repr, strangers), most=3)} is no client of {data.name}"
        raise LichenError(what, where=_KEY, fix=f"call a card NAME.{CARD} by its client's name, or take it away")
    checked: list[CheckedCard] = []
    dropped: list[Dropped] = []
    notes: list[str] = []
    for name, file in files.items():
        card, sha256 = read_card(file)
        who = f"client {name!r}"
        if card.ended(today()):
            if require is not None and require.expired == "leave_out":
                dropped.append(Dropped(clients=(name,), card=card, files=(), rows=rows[name]))
                continue
            if require is not None:
                fix = "ask the owner to renew it, or set data.require.expired: leave_out"
                raise LichenError(f"the data card of {who} ended on {card.until}", where=str(file), fix=fix)
            notes.append(f"the data card of {who} ended on {card.until}")
        _check_rows(data, card, who, file)
        if require is not None:
            refuse_unstated(require, card, who, str(file))
        checked.append(CheckedCard(card=card, sha256=sha256, clients=frozenset({name})))
    if not checked:
        fix = "ask the owners to renew theirs"
        raise LichenError("every data card has ended, and no row is left", where="data.require.expired", fix=fix)
    return Cards(checked=tuple(checked), dropped=tuple(dropped), notes=tuple(notes))


def _check_rows(data: DataConfig, card: DataCard, who: str, file: Path) -> None:
    """Hold the digest in a card against the file that everybody's rows lie in; a package's is that of the catalogue."""
    if card.rows_sha256 is None:
        return
    path = Path(data.name).expanduser()
    if data.name in CATALOG:
        now = CATALOG[data.name].sha256
    elif path.exists():
        now = rows_sha256(path)
    else:
        what = f"rows_sha256 of {who} can be held against no file"
        raise LichenError(what, where=str(file), fix="leave it null, or save the rows as a file")
    if card.rows_sha256 != now:
        what = f"{data.name}, in which the rows of {who} lie, changed after the card was written"
        raise LichenError(what, where=str(file), fix=f"if the card still holds: rows_sha256: {now or 'null'}")
