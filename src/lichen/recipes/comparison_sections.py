"""Reads the sections of a comparison's file; each error names the section.

Keys are dotted or nested, and a nested section changes what it names and leaves the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.recipes.schema.read import gallery, read_values, read_with_notes
from lichen.recipes.schema.renamed_keys import with_new_names

__all__ = [
    "as_overrides",
    "check_name",
    "read_also",
    "read_at",
    "read_base",
    "read_changes",
    "read_levels",
    "read_seeds",
    "refuse_seed",
]

MOST_SEEDS = 1000
_NAME = r"[A-Za-z0-9][\w.+-]{0,59}"
_KEY = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"


def read_levels(value: Any, where: str, renamed: list[str]) -> dict[str, dict[str, Any]]:
    """Keys by level; one level without a name where there are none."""
    if value is None:
        return {"": {}}
    if not isinstance(value, Mapping) or not value:
        raise LichenError("must hold a name for each level, with its keys", where=where, fix="see the guide")
    for level in value:
        check_name(level, f"{where}.{level}")
    return {level: read_changes(changes, f"{where}.{level}", renamed) for level, changes in value.items()}


def read_at(value: Any, rows: Mapping[str, Any], levels: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    """Levels of methods that are not run at all of them."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise LichenError("must hold a list of levels for some methods", where=where, fix="see the guide")
    for row, some in value.items():
        if row not in rows:
            raise LichenError("no such method", where=f"{where}.{row}", fix=f"the methods are: {', '.join(rows)}")
        if not isinstance(some, list) or not some or any(level not in levels for level in some):
            raise LichenError("no such levels", where=f"{where}.{row}", fix=f"list some of: {', '.join(levels)}")
    return {row: tuple(level for level in levels if level in some) for row, some in value.items()}


def read_also(value: Any, rows: Mapping[str, Any], where: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Columns that are rows of their own, each ``(row, column)``, by the method whose runs hold them.

    A column of one method is a row of its own name; one of a list of methods is called ``method.column`` in each.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise LichenError("must hold a method for each column", where=where, fix="for example {alone: scratch}")
    found: dict[str, tuple[tuple[str, str], ...]] = {}
    for column, named in value.items():
        for row in named if isinstance(named, list) else [named]:
            if not isinstance(row, str) or row not in rows:
                raise LichenError(
                    f"no method {row!r}", where=f"{where}.{column}", fix=f"use some of: {', '.join(rows)}"
                )
            name = f"{row}.{column}" if isinstance(named, list) else str(column)
            if name in rows:
                raise LichenError("is a method's name, too", where=f"{where}.{column}", fix="rename the method")
            found[row] = (*found.get(row, ()), (name, str(column)))
    return found


def read_base(value: Any, where: str, file: Path, renamed: list[str]) -> dict[str, Any]:
    """What the base recipe says, read once: a name, or a file beside the comparison or in the working directory."""
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 1000:
        what = "is missing" if value is None else "must be a recipe's name or file"
        raise LichenError(what, where=where, fix="name a recipe of `lichen list`, or a YAML file")
    try:
        sibling = value not in gallery() and (file.parent / value).is_file()
    except OSError:
        sibling = False
    base: str | Path = file.parent / value if sibling else value
    try:
        read_with_notes(base)
        values, notes = read_values(base)
    except LichenError as error:
        raise LichenError(error.what, where=f"{where}: {error.where}", fix=error.fix) from None
    renamed += notes
    return values


def read_changes(value: Any, where: str, renamed: list[str]) -> dict[str, Any]:
    """Keys that are changed, all of them dotted and by their new names; ``renamed`` gets a note for each old one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise LichenError("must hold keys with values", where=where, fix="for example {federation.rounds: 5}")
    found: dict[str, Any] = {}
    for old, given in _leaves(value, where):
        outer, dot, last = old.rpartition(".")
        new, notes = with_new_names({last: given}, outer + dot)
        renamed += notes
        for name, leaf in new.items():
            key = outer + dot + name
            refuse_seed(key, where)
            if key == "name":
                raise LichenError("is the method's own", where=f"{where}: name", fix="rename the method instead")
            if key in found:
                raise LichenError("is set twice", where=f"{where}: {key}", fix="remove one of them")
            found[key] = leaf
    return found


def _leaves(section: Mapping[Any, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if not isinstance(key, str) or not re.fullmatch(_KEY, key):
            raise LichenError(f"has the key {key!r}, which is no key of a recipe", where=where, fix="see the guide")
        if isinstance(value, Mapping) and value and all(isinstance(k, str) and re.fullmatch(_KEY, k) for k in value):
            yield from _leaves(value, where, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """As the command line would say it; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def refuse_seed(key: str, where: str) -> None:
    """No method has a seed of its own."""
    if key == "seed":
        raise LichenError("every method runs with the same seeds", where=where, fix="set seeds: [0, 1, 2], or --seeds")


def check_name(name: Any, where: str) -> None:
    """Names become folders."""
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise LichenError(
            f"{str(name)[:60]!r} cannot be a name", where=where, fix="use up to 60 letters, digits and any of . _ + -"
        )


def read_seeds(value: Any, where: str) -> tuple[int, ...]:
    """A list of different seeds, or one."""
    seeds = value if isinstance(value, list) else [value]
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**31 for seed in seeds)
    if not whole or not 0 < len(seeds) <= MOST_SEEDS or len(set(seeds)) < len(seeds):
        raise LichenError("must be different whole numbers", where=where, fix="for example [0, 1, 2]")
    return tuple(seeds)
