"""Reads the rows of one site and parts them as a simulation does that has everybody's.

A client's split follows from its own rows, its own name and the recipe's seed. What a recipe may ask for beyond that
would need the rows, or the names, of other sites, and is refused by its key.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.core.roster import declared_name
from lichen.core.visible import clipped
from lichen.data.sources.files import data_files, owners_of_files
from lichen.data.sources.table import column_of
from lichen.recipes.rows.checked_cards import Cards
from lichen.recipes.rows.prepare import ClientData, gather_site
from lichen.recipes.rows.public import labelled_of, split_public
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["SiteRows", "read_site", "refuse_everybodys"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRows:
    """What one site has.

    Attributes:
        clients_data: Its clients in name order, each with its rows, already parted.
        labels: The labels of its rows, each once, sorted; none where the task has none.
        cards: The data cards of its rows.
    """

    clients_data: tuple[ClientData, ...]
    labels: tuple[str | int, ...] = ()
    cards: Cards = field(default_factory=Cards)


def read_site(recipe: Recipe, path: Path) -> SiteRows:
    """The clients of a site, with the splits that they have in a simulation over a folder of all sites.

    Rows that name no client are one client's: that of the file's name, or of the folder's.

    Args:
        recipe: One that :func:`refuse_everybodys` lets pass.
        path: The site's file, or its folder of files.

    Raises:
        LichenError: if it cannot be read, leaves a client without a part, or has a data card that is not as the recipe
            requires; by its key or file.
    """
    path = Path(os.path.abspath(path.expanduser()))
    gathered = gather_site(recipe, path, _owner(path, data_files(path)))
    if not any(column_of(gathered.records, "client")):
        raise LichenError(
            f"neither a row nor the name {path.name!r} says whose rows these are",
            where=str(path),
            fix="name a column in data.columns.client, or call the file by its client",
        )
    labels = () if recipe.writes else _labels_of(recipe, column_of(gathered.records, "label"))
    clients_data = split_public(recipe, gathered.records).clients_data
    for client_data in clients_data:
        if declared_name(client_data.name) != client_data.name:
            raise LichenError(
                f"a client is called {clipped(client_data.name, 60)!r}, which is no line of at most 200 letters",
                where="data.columns.client",
                fix="give it a short name; the roster of all sites is sorted by these",
            )
    owned = clients_data if recipe.writes else labelled_of(clients_data)
    return SiteRows(clients_data=owned, labels=labels, cards=gathered.cards)


def _labels_of(recipe: Recipe, labels: Sequence[str | int | None]) -> tuple[str | int, ...]:
    """Each label once, numbers first; what looks like a column of texts is refused, before it is announced.

    Raises:
        LichenError: for rows without a label, and for labels that no classes are called.
    """
    found = {label for label in labels if label is not None}
    task = task_of(recipe.task).labels
    if task is not None and not recipe.data.classes and (len(found) > 1 or None in labels):
        task.names(labels)
    for label in found:
        if declared_name(str(label)) != str(label):
            raise LichenError(
                f"a label of {len(str(label))} letters is no line of at most 200 letters, and would be announced",
                where="data.columns.label",
                fix="name the column of classes",
            )
    return tuple(sorted(found, key=lambda label: (isinstance(label, str), label)))


def _owner(path: Path, files: Sequence[Path]) -> str:
    """Whose rows these are where no column says so, as in a folder with one file or one folder for each site.

    Raises:
        LichenError: if files lie in folders of a folder, and so are several clients'.
    """
    if path.is_dir() and any(file.parent != path for file in files):
        raise LichenError(
            "holds folders, each of which would be a client",
            where=str(path),
            fix="put the files into one folder, and name a column in data.columns.client if there are several clients",
        )
    other = path.parent / ".another" / "site.csv"  # files of one owner alone are nobody's
    return owners_of_files(path.parent, [*files, other])[files[0]]


def refuse_everybodys(recipe: Recipe) -> None:
    """Refuse what follows from the rows of all sites together.

    Raises:
        LichenError: naming the key and the fix.
    """
    data, fed = recipe.data, recipe.federation
    for key, wrong, why, fix in (
        (
            "data.partition.by",
            data.partition.by != "client",
            f"{data.partition.by} deals everybody's rows out to clients",
            "use client",
        ),
        (
            "data.max_clients",
            data.max_clients is not None,
            "clients are drawn among those of all sites",
            "remove it; federation.clients_per_round draws some for each round",
        ),
        (
            "data.copies",
            data.copies == "drop",
            "copies are found by looking at everybody's rows",
            "use keep",
        ),
        (
            "federation.memory",
            fed.memory is not None,
            "what fits is measured on the largest batch of all clients",
            "use federation.ranks",
        ),
    ):
        if wrong:
            raise LichenError(f"a site with its own rows alone: {why}", where=key, fix=fix)
