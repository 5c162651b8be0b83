"""Says of a finished run which rows of a client have helped the model on its validation rows, and which have harmed it.

Rows, gradients and numbers stay where the rows are: whoever runs this has them, and the file is its own.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lichen.clients.evaluation.influence import influences
from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.manifest import MANIFEST, check
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.data.sources.record import Record
from lichen.present.cells import text_cell
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.inputs import inputs_of, require_same
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.assemble.sides.withdrawal.absent import no_such_client
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage
from lichen.tasks.registry import task_of

__all__ = ["influence"]

_LETTERS = 200
"""Of a row's text, in the file."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class InfluentialRow:
    """A training row.

    Attributes:
        client: Whose.
        row: Its place among the client's training rows, from 0.
        influence: What the client's validation loss would rise by, a unit of the row's weight; above 0 it harms.
        label: Its label; empty where it has none.
        text: How it begins.
    """

    client: str
    row: int
    influence: float
    label: str
    text: str


def influence(folder: Path | str, *, client: str | None = None, out: Path | None = None) -> tuple[InfluentialRow, ...]:
    """Find the influence of training rows of a finished run, and write them down, those that harm most first.

    Args:
        folder: The run's folder; its data and its model are opened again.
        client: Whose rows; None: those of every client that has validation rows, each held against its own.
        out: The file; None: ``influence.csv`` in the folder.

    Returns:
        The rows, as in the file.

    Raises:
        LichenError: if the run is not finished or its data have changed, if the client is not known or has no
            validation rows, or if a part of the model stays with its clients.
    """
    folder = last_stage(folder)
    read_summary(folder)
    recipe = recipe_of(folder)
    _refuse(recipe, folder)
    check(folder, MANIFEST, fix=f"make it again: lichen run --resume {folder}")
    refuse_withdrawn(folder)
    loaded = open_recipe(recipe)
    require_same(folder, recipe, inputs_of(loaded))
    shared = Shared.of_flat(load_tree(folder / "state" / "final.safetensors")[0])
    names = [one.name for one in loaded.clients_data]
    if client is not None and client not in names:
        raise no_such_client(client, names, where="--client")
    found: list[InfluentialRow] = []
    for place, name in enumerate(names):
        sides = loaded.experiment.clients
        judged = bool(sides.valid[place].size and sides.train[place].size)
        if name == client or (client is None and judged):
            found += _rows(loaded, shared, place)
    if not found:
        raise LichenError("no client has validation rows to be judged by", where="data.valid", fix="set data.valid")
    found.sort(key=lambda one: (-one.influence, one.client, one.row))
    write_atomic(out or folder / "influence.csv", _csv(found).encode("utf-8", "backslashreplace"))
    return tuple(found)


def _refuse(recipe: Recipe, folder: Path) -> None:
    if recipe.prefers:
        what = "a row of task prefer is two answers and a reference, and one answer alone is looked at here"
        raise LichenError(what, where=str(folder), fix="use a run of another task")
    if not task_of(recipe.task).procedure.rounds or recipe.method.asks_only or recipe.exchange is not None:
        raise LichenError(f"a run of task {recipe.task} has no one model that was trained in rounds", where=str(folder))
    if recipe.aggregation.local_params:
        what = "a part of the model never left its clients, and a row's gradient needs all of it"
        raise LichenError(what, where=str(folder), fix="use a run with another federation.aggregate")


def _rows(loaded: LoadedExperiment, shared: Shared, client: int) -> list[InfluentialRow]:
    """Those of one client."""
    experiment, data = loaded.experiment, loaded.clients_data[client]
    train, valid = experiment.clients.train[client], experiment.clients.valid[client]
    rows = experiment.evaluating([train])
    found_N = influences(
        experiment.model, shared, lambda: _batches(rows), lambda: _batches(experiment.evaluating([valid]))
    )
    records = data.train if len(data.train) == train.size else ()  # rows of a stream are none of the file's
    return [
        InfluentialRow(client=data.name, row=row, influence=value, label=_label(records, row), text=_text(records, row))
        for row, value in zip(_order(rows), found_N.tolist(), strict=True)
        if math.isfinite(value)
    ]


def _batches(source: Source) -> Iterator[Batch]:
    return source.batches((0,), 0)


def _order(rows: Source) -> list[int]:
    """Places of the rows among the client's, in the order of its batches."""
    return [place for batch in _batches(rows) for place in batch["index_CB"][0].tolist() if place >= 0]


def _label(records: Sequence[Record], row: int) -> str:
    label = records[row].label if records else None
    return "" if label is None else str(label)


def _text(records: Sequence[Record], row: int) -> str:
    if not records:
        return ""
    record = records[row]
    parts = [str(message.get("content", "")) for message in record.messages]
    text = " ".join(" ".join([record.prompt, record.text, *parts]).split())
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"


def _csv(rows: Sequence[InfluentialRow]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["client", "row", "influence", "label", "text"])
    for one in rows:
        cells = (text_cell(one.client), one.row, repr(one.influence), text_cell(one.label), text_cell(one.text))
        writer.writerow(cells)
    return out.getvalue()
