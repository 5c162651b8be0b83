"""Finds data sets that other installed packages declare, by name.

A package declares one by an entry point of the group ``lichen.datasets`` that names a :class:`Dataset`; a recipe then
says ``data.name: wine`` as it would for one of the catalog::

    [project.entry-points."lichen.datasets"]
    wine = "my_package.wine:WINE"

Only the one that a recipe names is imported. A name of the catalog stays the catalog's. Rows of other packages count as
private: nothing of them is written where other users of the machine can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import final

from lichen.core.errors import LichenError
from lichen.data.sources.entries import CATALOG
from lichen.data.sources.record import Record

__all__ = ["Dataset", "declared_datasets", "read_dataset"]

GROUP = "lichen.datasets"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A data set of another package.

    Attributes:
        name: What a recipe calls it; that of the entry point.
        read: Makes its rows. It is given ``data.columns``, the user's column by role, which are empty if the recipe
            names none; a set that has no columns refuses them.
    """

    name: str
    read: Callable[[Mapping[str, str]], Sequence[Record]]


def declared_datasets() -> dict[str, EntryPoint]:
    """Data sets of other packages by name, those of the catalog left out; none is imported.

    Raises:
        LichenError: if two packages declare one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found and found[point.name].value != point.value:
            raise LichenError(
                f"two packages declare the data set {point.name!r}: {found[point.name].value} and {point.value}",
                where=_place(point),
                fix="uninstall one of them",
            )
        if point.name not in CATALOG:
            found[point.name] = point
    return found


def read_dataset(point: EntryPoint, columns: Mapping[str, str]) -> list[Record]:
    """The rows of a declared data set.

    Args:
        point: As :func:`declared_datasets` gives it.
        columns: The user's column by role.

    Raises:
        LichenError: what the data set says of its columns; or if it cannot be imported or read, or gives no rows.
    """
    fix = "mend or uninstall the package that declares it"
    try:
        found = point.load()
        if not isinstance(found, Dataset) or found.name != point.name:
            raise LichenError(
                f"is a data set called {found.name!r}" if isinstance(found, Dataset) else "is no Dataset",
                where=_place(point),
                fix=f"let it name a lichen.data.sources.datasets.Dataset called {point.name!r}",
            )
        rows = list(found.read(columns))
    except LichenError:
        raise
    except Exception as error:  # another's code may raise anything
        raise LichenError(f"cannot be read: {type(error).__name__}: {error}", where=_place(point), fix=fix) from error
    if not rows or not all(isinstance(row, Record) for row in rows):
        raise LichenError(
            "gives no rows" if not rows else "gives rows that are no Record", where=_place(point), fix=fix
        )
    return rows


def _place(point: EntryPoint) -> str:
    return f"entry point {point.name} = {point.value}"
