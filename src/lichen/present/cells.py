"""Escapes foreign text for CSV files, so that no spreadsheet runs it.

Spreadsheets take a cell that begins with one of a few characters for a formula. Such a cell gets an apostrophe in
front, which they hide; so does one that begins with an apostrophe, so that :func:`read_cell` gives back every text.

References:
    OWASP. "CSV Injection." https://owasp.org/www-community/attacks/CSV_Injection
"""

from __future__ import annotations

__all__ = ["read_cell", "text_cell"]

_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "'")
"""What a formula may begin with, full-width forms among them; and the apostrophe that says it is none."""


def text_cell(text: str) -> str:
    """A text as a cell that no spreadsheet takes for a formula.

    >>> text_cell("=1+1"), text_cell("shop 7")
    ("'=1+1", 'shop 7')
    """
    return f"'{text}" if text.startswith(_STARTS) else text


def read_cell(cell: str) -> str:
    """Undo :func:`text_cell`."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_STARTS) else cell
