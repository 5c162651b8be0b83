"""Reports what a recipe read, from records to splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lichen.data.reading import Reading, alike, lengths_of, merged, reading_of
from lichen.data.sources.files import read_notes
from lichen.data.sources.table import column_of
from lichen.present.reading import reading_lines
from lichen.recipes.rows.partition import first_of
from lichen.recipes.rows.prepare import Gathered, is_private
from lichen.recipes.rows.public import PublicSplit
from lichen.recipes.schema.recipe import Recipe

__all__ = ["read_of", "report_read"]


def read_of(recipe: Recipe, gathered: Gathered, public_split: PublicSplit, tokenizer: Any) -> Reading:
    """Count what was found, what goes on and what does not.

    Args:
        recipe: The recipe.
        gathered: Its records.
        public_split: Its clients and public rows.
        tokenizer: Counts tokens; None where the rows are no texts.
    """
    found = reading_of(gathered.records)
    clients_data, by_seed = public_split.clients_data, recipe.data.partition.by != "client"
    tests = [clients_data[at].test for at in sorted(set(first_of([client_data.test for client_data in clients_data])))]
    train = [row for client_data in clients_data for row in client_data.train]
    valid, test = (
        [row for client_data in clients_data for row in client_data.valid],
        [row for rows in tests for row in rows],
    )
    labelled = train if recipe.writes else [row for row in train if row.label is not None]
    public = len(public_split.labelled) + len(public_split.unlabelled)
    used = {
        "clients": len(clients_data),
        "train": len(labelled),
        "valid": len(valid),
        "test": len(test),
        "unlabelled": len(train) - len(labelled),
        "public": public,
    }
    form = recipe.data.form if recipe.writes else "classify"
    lengths = None
    if tokenizer is not None and form != "stream":
        rows, data = [*train, *valid, *test], recipe.data
        lengths = lengths_of(rows, tokenizer, form=form, max_length=data.max_length, thinking=data.thinking)
    notes = gathered.cards.notes + (found.alike if not by_seed else alike("classes", found.labels))
    if by_seed and any(column_of(gathered.records, "client")):
        by = recipe.data.partition.by
        notes += (f"rows name {found.clients} clients, which data.partition.by: {by} does not use",)
    return replace(
        found,
        rows=found.rows + sum(one.rows for one in gathered.left),
        clients=0 if by_seed else found.clients,
        lengths=lengths,
        used=used,
        left=merged((*gathered.left, *public_split.left)),
        copies=public_split.copies,
        alike=notes,
    )


def report_read(
    recipe: Recipe, gathered: Gathered, public_split: PublicSplit, tokenizer: Any, say: Callable[[str], None]
) -> Mapping[str, Any]:
    """The same as JSON holds it, said a line each, after what was assumed about the user's files."""
    path = Path(recipe.data.name).expanduser()
    if is_private(recipe) and path.exists():
        for note in read_notes(path):
            say(note)
    read = read_of(recipe, gathered, public_split, tokenizer).as_dict()
    for line in reading_lines(read):
        say(line)
    return read
