"""What a column is called on the screen and in recipes, where files call it otherwise.

Files keep the name they always had, so that results of every version can be read together.
"""

from __future__ import annotations

__all__ = ["column_in_files", "column_title"]

_IN_FILES = {"no_help": "without"}
_TITLES = {name: title for title, name in _IN_FILES.items()}


def column_title(column: str) -> str:
    """What a column of a summary or a trace is called where people read it.

    >>> column_title("without"), column_title("alone")
    ('no_help', 'alone')
    """
    return _TITLES.get(column, column)


def column_in_files(title: str) -> str:
    """What files call a column that a recipe or a comparison names.

    >>> column_in_files("no_help"), column_in_files("without")
    ('without', 'without')
    """
    return _IN_FILES.get(title, title)
