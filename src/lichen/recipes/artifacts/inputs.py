"""Remembers digests of a run's inputs, and compares them on resume.

A run that goes on with other rows, another model or other tokens would mix two runs and say nothing. Digests follow
what was read, not where it lay, so that data and models may move.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lichen.clients.attack.rows import Unsafe
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.tree import digest
from lichen.data.batches.content_digest import shards_digest
from lichen.data.batches.shards import Shard
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.recipe import Recipe

__all__ = ["FORMAT", "Inputs", "agree", "inputs_of", "require_rows", "require_same", "row_digests", "rows_digest"]

FORMAT = 1
"""Of a run's folder; one of another format cannot be gone on with."""

_NAME = "inputs.json"
_NEW = "start a new run: lichen run RECIPE"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Digests of what a run is made from.

    Attributes:
        rows: How many were read.
        data: Of the rows as they were read.
        model: Of the frozen weights and of what is trained, before the first round.
        tokens: Of the rows as the model reads them, client by client.
    """

    rows: int
    data: str
    model: str = ""
    tokens: str = ""


def inputs_of(loaded: LoadedExperiment, *experiments: Experiment) -> Inputs:
    """Those of an opened recipe.

    Args:
        loaded: The recipe with its rows.
        experiments: Of its models, where there are several.
    """
    experiment, clients = loaded.experiment, loaded.experiment.clients
    models = [[one.model.base, digest(one.start.flat())] for one in experiments or (experiment,)]
    return Inputs(
        rows=loaded.rows,
        data=loaded.data,
        model=hashlib.sha256(json.dumps(models).encode()).hexdigest(),
        tokens=shards_digest(clients.train, clients.valid, clients.test, *_requests(experiment)),
    )


def _requests(experiment: Experiment) -> list[tuple[Shard]]:
    """Rows of unsafe requests that liars or the server train on."""
    poison, repair = experiment.clients.poison, experiment.server.repair
    lied: list[tuple[Shard]] = [(poison.rows,)] if isinstance(poison, Unsafe) else []
    return lied if repair is None else [*lied, (repair,)]


def agree(folder: RunFolder, recipe: Recipe, inputs: Inputs) -> None:
    """Remember what the run is made from; where it goes on, compare.

    Args:
        folder: The run folder.
        recipe: Names the data and the model.
        inputs: What was read this time.

    Raises:
        LichenError: naming what has changed since the run began.
    """
    folder.ranks.ask_first(lambda: _agree(folder, recipe, inputs))


def _agree(folder: RunFolder, recipe: Recipe, inputs: Inputs) -> None:
    file = folder.path / "state" / _NAME
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.finished() and not folder.journal.adopted:
            raise LichenError("is missing", where=str(file), fix=f"put it back from a copy, or {_NEW}") from None
        before = {"format": 0} if folder.finished() else None
    except (OSError, ValueError):
        before = {"sha256": ""}
    # With a digest it is as it was written; without one, an earlier version's.
    if isinstance(before, dict) and before.keys() - {"format", *Inputs.__slots__}:
        mark = before.pop("sha256", "")
        if _mark(before) != mark:
            raise LichenError("is damaged", where=str(file), fix=f"put it back from a copy, or {_NEW}")
    now = {"format": FORMAT, **{name: getattr(inputs, name) for name in Inputs.__slots__}}
    if before is None:
        _remember(file, now)
        return
    _compare(folder.path, recipe, before, inputs)
    if before != now:
        _remember(file, now)


def require_same(run: Path, recipe: Recipe, inputs: Inputs) -> None:
    """Hold a finished run's data and model against what it was made from; nothing is written.

    Args:
        run: The run's folder.
        recipe: Its recipe.
        inputs: What was read this time.

    Raises:
        LichenError: naming what has changed, or that the folder does not say.
    """
    file = run / "state" / _NAME
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise LichenError("is missing or damaged", where=str(file), fix=f"put it back from a copy, or {_NEW}") from None
    _compare(run, recipe, before, inputs)


def _compare(run: Path, recipe: Recipe, before: object, inputs: Inputs) -> None:
    if not isinstance(before, Mapping) or before.get("format") != FORMAT:
        raise LichenError(
            "was begun by another version of lichen, whose runs this one cannot go on with",
            where=str(run),
            fix=f"go on with that version, or {_NEW}",
        )
    for name, (what, where, fix) in _changes(recipe, before, inputs).items():
        if before.get(name, getattr(inputs, name)) != getattr(inputs, name):
            raise LichenError(what, where=where, fix=fix)


def _remember(file: Path, now: Mapping[str, object]) -> None:
    write_atomic(file, (json.dumps({**now, "sha256": _mark(now)}, indent=2) + "\n").encode())


def _mark(known: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def require_rows(run: Path, of: Path) -> None:
    """Let a run that has not begun refuse other rows than those of another run.

    Args:
        run: The folder of the new run.
        of: The folder of a run of the same data.
    """
    file = run / "state" / _NAME
    try:
        known = json.loads((of / "state" / _NAME).read_text(encoding="utf-8"))
        some = {name: known[name] for name in ("format", "rows", "data")}
    except (OSError, ValueError, KeyError, TypeError):
        return  # an earlier version's, which does not say
    if not file.exists():
        _remember(file, some)


def row_digests(run: Path) -> int:
    """How many rows a run was made from; 0 for the folder of an earlier version."""
    try:
        return int(json.loads((run / "state" / _NAME).read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def rows_digest(run: Path) -> str:
    """The digest of the rows that a run was made from; empty where its folder does not say."""
    try:
        return str(json.loads((run / "state" / _NAME).read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _changes(recipe: Recipe, before: Mapping[str, object], now: Inputs) -> dict[str, tuple[str, str, str]]:
    """What to say of each thing that may have changed, the first cause first."""
    moved = "name where it lies now: lichen run --resume FOLDER -s"
    model = recipe.model.name or recipe.name
    begun = f" and {recipe.model.adapter.init_from}" if recipe.model.adapter.init_from else ""
    return {
        "data": (
            f"has changed since the run began: {before.get('rows')} rows then, {now.rows} now, which are not the same",
            recipe.data.name,
            f"put the file of then back, or {moved} data.name=PATH, or {_NEW}",
        ),
        "model": (
            "holds other weights than when the run began",
            f"{model}{begun}",
            f"put the model of then back, or {moved} model.name=PATH, or {_NEW}",
        ),
        "tokens": (
            "rows become other tokens, or go to other clients, than when the run began",
            model,
            f"go on with the tokenizer and the versions of then, or {_NEW}",
        ),
    }
