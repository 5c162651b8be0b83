"""Prints what could be read at cuts: a table, and plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from lichen.audit.crossing import recovery_sentence
from lichen.core.errors import LichenError
from lichen.present.table import new_table
from lichen.recipes.audit.crossings import Crossing

__all__ = ["crossings_table", "crossings_words", "cuts_of"]

LITTLE = 0.2
"""A share of tokens below which a text is mostly not read."""


def cuts_of(text: str) -> tuple[int, ...]:
    """Cuts as they are written on the command line.

    Raises:
        LichenError: if one is no whole number.

    >>> cuts_of("1, 2,8"), cuts_of("")
    ((1, 2, 8), ())
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if bad := [word for word in words if not (word.isascii() and word.isdigit() and len(word) < 6)]:
        raise LichenError(f"{bad[0]!r} is no number of blocks", where="--cuts", fix="write for example: --cuts 1,2,8")
    return tuple(int(word) for word in words)


def crossings_table(found: Sequence[Crossing]) -> Table:
    """A line for each cut."""
    heads = "nearest embedding", "linear decoder", "a guess", "bytes a token"
    table = new_table("Tokens read off what crosses a cut", "blocks below it", *heads, numbers=heads)
    for x in found:
        shares = (x.recovery.nearest, x.recovery.linear, x.recovery.constant)
        table.add_row(str(x.cut), *(f"{share:.1%}" for share in shares), f"{x.nbytes:,}")
    return table


def crossings_words(found: Sequence[Crossing]) -> list[str]:
    """One sentence on the first cut, where little can be read, and of a classifier's labels."""
    lines = [recovery_sentence(found[0].cut, found[0].recovery)]
    low = [x.cut for x in found if max(x.recovery.linear, x.recovery.nearest) < LITTLE]
    where = f"first at {min(low)} blocks below it" if low else "at none of these cuts"
    lines.append(f"Under {LITTLE:.0%} of the tokens are read {where}; other readers may read more.".replace("%", " %"))
    if found[0].labels is not None:
        lines.append(
            f"Where the head were the server's, gradients of logits would give it {found[0].labels:.0%} of the labels; "
            "in split learning the head stays with the client.".replace("%", " %")
        )
    return lines
