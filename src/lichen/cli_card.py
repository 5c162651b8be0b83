"""The command ``card``: checks a data card against its rows, writes one, or prints it as Croissant.

Nothing heavy is imported until the command needs it.
"""

from __future__ import annotations

from pathlib import Path

from lichen.core.errors import LichenError
from lichen.shell import log, print_json, show

__all__ = ["card_command"]


def card_command(rows: Path, /, *, write: bool = False, croissant: bool = False) -> None:
    """Check what owners say of their rows, in card.yaml beside them, against the rows.

    Parameters
    ----------
    rows
        A file of rows, or a folder of them.
    write
        Write a card to be filled in; where there is one, only the digest of rows that have changed.
    croissant
        Print the card as Croissant, in JSON-LD, and nothing else, on standard output.
    """
    from lichen.data.cards.card_files import card_place, rows_sha256
    from lichen.recipes.rows.data_card import read_card, renew_card, write_card

    rows = rows.expanduser()
    if not rows.exists():
        raise LichenError("no such file or folder", where=str(rows), fix="check the path")
    if write:
        if croissant:
            raise LichenError("writes a card and prints none", where="--write", fix="leave out --croissant")
        place = write_card(rows)
        if place is not None:
            log(f"wrote {place}; fill it in")
        else:
            renewed = renew_card(rows)
            log(f"{card_place(rows)}: {'the digest of the rows is renewed' if renewed else 'is of these rows already'}")
        return
    if not croissant:
        _table(rows)
        return
    from lichen.recipes.rows.croissant import croissant_of

    card, _ = read_card(card_place(rows))
    if card.rows_sha256 not in (None, rows_sha256(rows)):
        fix = f"if the card still holds: lichen card {rows} --write"
        raise LichenError("the rows changed after the card was written", where=str(card_place(rows)), fix=fix)
    print_json(croissant_of(rows, card))


def _table(rows: Path) -> None:
    """A line for each card, and the first thing that is wrong with one."""
    from lichen.core.visible import listed
    from lichen.data.cards.card_files import covered_by
    from lichen.present.table import new_table
    from lichen.recipes.rows.cards import card_fault
    from lichen.recipes.rows.data_card import read_card

    table = new_table(None, "card", "rows of", "owner", "licence", "consent", "purposes", "until", "is")
    faults: list[LichenError] = []
    for one in covered_by(rows):
        fault = card_fault(one, rows)
        faults += [fault] if fault is not None else []
        words = ["-"] * 5
        try:
            if one.card is not None:
                card, _ = read_card(one.card)
                words = [str(word or "-") for word in (card.owner, card.licence, card.consent)]
                words += [", ".join(card.purposes) or "-", card.until or "no end"]
        except LichenError:
            pass  # it is the fault
        name = "none" if one.card is None else str(one.card.relative_to(rows) if rows.is_dir() else one.card.name)
        table.add_row(name, listed(one.owners, most=3), *words, "whole" if fault is None else fault.what)
    show(table)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise LichenError(faults[0].what + more, where=faults[0].where, fix=faults[0].fix)
