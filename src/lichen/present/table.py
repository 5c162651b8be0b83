"""Draws tables as text that fits the screen and is written with the letters that it has.

No name and no number is ever cut or broken. Where lines are long enough the columns stand side by side, prose in them
folded between words; on a narrow screen each row is a few lines ``column: value`` instead. In a pipe a line is as long
as it needs to be.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from lichen.core.visible import plain, visible

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["WIDE", "new_table", "table_text"]

WIDE = 10_000
"""Letters of a line where nobody's screen limits it."""

PROSE = 16
"""Letters that a column of prose has at least, where columns stand side by side."""

NUMBER = 24
"""Cells on the right that are no longer are numbers with their units, and stay on one line."""


def new_table(title: str | None, *headers: str, numbers: Sequence[str] = ()) -> Table:
    """An empty table; columns in ``numbers`` stand to the right.

    A title folds at the table's width: names that must stay whole belong into cells.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Text, so that brackets in a recipe's name are not read as markup.
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for header in headers:
        table.add_column(Text(header), overflow="fold", justify="right" if header in numbers else "left")
    return table


def table_text(table: Table, *, width: int = WIDE, terminal: bool = False, encoding: str = "utf-8") -> str:
    """A table of :func:`new_table` as text.

    Args:
        table: The table.
        width: Letters of a line at most, but for a word that is longer.
        terminal: Bold letters and the like, as a terminal reads them.
        encoding: What the text must be written in; letters that it lacks are replaced by plain ones.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    known = _content(table, encoding)
    columned = len(known.cells)
    widths = known.widths(columned, width, whole=True)
    if widths is None:  # what has one value at the end needs no columns
        columned -= next((i for i, row in enumerate(reversed(known.cells)) if not _single(row)), columned)
        widths = known.widths(columned, width) if columned else None
    if widths is None:
        return known.stacked(0, width)
    result = Table(title=Text(known.title) if known.title else None, title_justify="left", box=table.box)
    for column, head, letters in zip(table.columns, known.heads, widths, strict=True):
        result.add_column(Text(head), overflow="fold", justify=column.justify, width=letters)
    for row, cells, styles in list(zip(table.rows, known.cells, known.styles, strict=True))[:columned]:
        texts = [Text(cell, style=style) for cell, style in zip(cells, styles, strict=True)]
        result.add_row(*texts, style=row.style, end_section=row.end_section)
    # Into a text first, because rich would leave the process when the reader of a pipe is gone.
    text = io.StringIO()
    Console(file=text, force_terminal=terminal, width=width).print(result, end="")
    lines = [line.rstrip() for line in plain(text.getvalue(), encoding).split("\n")]
    text_lines = "\n".join(lines).rstrip("\n")
    below = known.stacked(columned, width) if columned < len(known.cells) else ""
    return f"{text_lines}\n\n{below}" if below else text_lines


def _single(row: Sequence[str]) -> bool:
    """Whether a row is a name and one value."""
    return len(row) == 2 or not any(row[2:])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """What stands in a table, as text that steers no terminal."""

    title: str
    heads: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    styles: tuple[tuple[Any, ...], ...]
    sections: tuple[bool, ...]
    right: tuple[bool, ...]

    def widths(self, rows: int, width: int, *, whole: bool = False) -> list[int] | None:
        """Letters of each column of the first rows; None where they do not fit, or not for ``whole`` lines."""
        from rich.cells import cell_len

        inner = width - 3 * len(self.heads) - 1  # edges, and a space to both sides of a cell
        most, least = [], []
        for place, (head, right) in enumerate(zip(self.heads, self.right, strict=True)):
            cells = [head, *(row[place] for row in self.cells[:rows])]
            most.append(max(cell_len(line) for cell in cells for line in cell.split("\n")))
            parts = [part for cell in cells for part in ([cell] if right and len(cell) <= NUMBER else cell.split())]
            longest = max(map(cell_len, parts), default=0)
            least.append(max(longest, min(most[-1], PROSE)))
        spare, lacking = inner - sum(least), sum(most) - sum(least)
        if spare < (lacking if whole else 0):
            return None
        return [
            low + (high - low) * min(spare, lacking) // max(lacking, 1) for low, high in zip(least, most, strict=True)
        ]

    def stacked(self, after: int, width: int) -> str:
        """The rows after so many one below the other; one with one value is ``name: value``."""

        def folded(text: str, indent: int) -> str:
            first, then = " " * indent, " " * (indent + 2)
            return textwrap.fill(
                " ".join(text.split()),
                width,
                initial_indent=first,
                subsequent_indent=then,
                break_long_words=False,
                break_on_hyphens=False,
            )

        parts = list[str]()
        if not after:
            head = folded(self.heads[0], 0)
            parts += [folded(self.title, 0), ""] if self.title else []
            parts += [head, "-" * min(width, max(len(head), 1))]
        edge = 2 if after else 0
        for (name, *values), ends in list(zip(self.cells, self.sections, strict=True))[after:]:
            if _single((name, *values)):
                deep = edge + len(name) - len(name.lstrip())
                parts.append(folded(f"{name}: {values[0]}" if values and values[0] else name, deep))
            else:
                parts.append(folded(name, 0))
                named = zip(self.heads[1:], values, strict=True)
                parts += [folded(f"{head}: {value}", 2) for head, value in named if value]
            parts += [""] if ends else []
        return "\n".join(parts).rstrip("\n")


def _content(table: Table, encoding: str) -> _Content:
    from rich.text import Text

    def clean(text: Any) -> str:
        return plain(visible(str(text)), encoding)  # of a Text, without its styles

    columns = [list(column.cells) for column in table.columns]
    rows = list(zip(*columns, strict=True))
    return _Content(
        title="" if table.title is None else clean(table.title),
        heads=tuple(clean(column.header) for column in table.columns),
        cells=tuple(tuple(map(clean, row)) for row in rows),
        styles=tuple(tuple(cell.style if isinstance(cell, Text) else "" for cell in row) for row in rows),
        sections=tuple(row.end_section for row in table.rows),
        right=tuple(column.justify == "right" for column in table.columns),
    )
