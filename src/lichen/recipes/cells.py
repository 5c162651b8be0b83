"""What of a comparison is finished: its runs, each method with each seed, and the tables of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.present.charts.levels import levels_markdown
from lichen.present.compare import ComparisonRow, Outcome, comparison_rows
from lichen.present.compare_table import comparison_csv, comparison_markdown, notes
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.former_names import adopt_folder
from lichen.recipes.artifacts.shared_scores import former_shared_key, shared_key
from lichen.recipes.assemble.experiment import metric_of
from lichen.recipes.comparison import Comparison, Method
from lichen.recipes.schema.read import former_sha256, recipe_sha256
from lichen.recipes.schema.recipe import Recipe

__all__ = ["Cell", "adopt_cells", "cells_of", "memory_file", "write_tables"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method with one seed.

    Attributes:
        method: The method.
        recipe: Its recipe with the seed.
        folder: The run's folder.
    """

    method: Method
    recipe: Recipe
    folder: Path

    def summary(self) -> dict[str, Any] | None:
        """What it ended with; None if it has not, or its folder holds another recipe's."""
        try:
            found = read_summary(self.folder)
        except LichenError:
            return None
        return found if found["recipe_sha256"] == recipe_sha256(self.recipe) else None


def cells_of(comparison: Comparison, out: Path) -> tuple[Cell, ...]:
    """Every run of a comparison, the first seed of all methods first."""
    return tuple(
        Cell(
            method=method,
            recipe=(recipe := method.recipe.model_copy(update={"seed": seed})),
            folder=_method_folder(method, out) / f"seed-{recipe.seed}",
        )
        for seed in comparison.seeds
        for method in comparison.methods
    )


def _method_folder(method: Method, out: Path) -> Path:
    return out / f"{method.name}-{recipe_sha256(method.recipe)[:8]}"


def adopt_cells(comparison: Comparison, out: Path) -> None:
    """Let runs count that were made before keys of recipes were renamed.

    Args:
        comparison: What is run.
        out: The comparison's folder.
    """
    for method in comparison.methods:
        own = [cell for cell in cells_of(comparison, out) if cell.method is method]
        before = out / f"{method.name}-{former_sha256(method.recipe)[:8]}"
        adopt_folder(before, _method_folder(method, out), [(Path(cell.folder.name), cell.recipe) for cell in own])
        for cell in own:
            adopt_folder(out / "shared" / former_shared_key(cell.recipe), out / "shared" / shared_key(cell.recipe))


def memory_file(method: Method, out: Path) -> Path:
    """Where the memory that a client of a method needs is kept."""
    return _method_folder(method, out) / "memory.json"


def _client_bytes(method: Method, out: Path) -> int | None:
    try:
        found = json.loads(memory_file(method, out).read_text())
    except (OSError, ValueError):
        return None
    return None if found is None else int(found["frozen"]) + int(found["training"])


def _outcomes(comparison: Comparison, out: Path, faults: Mapping[str, Sequence[str]]) -> Iterator[Outcome]:
    cells = cells_of(comparison, out)
    for method in comparison.methods:
        own = [cell for cell in cells if cell.method is method]
        done = Outcome(
            method=method.name,
            summaries={cell.recipe.seed: found for cell in own if (found := cell.summary()) is not None},
            wanted=len(own),
            memory=_client_bytes(method, out),
            faults=(
                *faults.get(method.name, ()),
                *(f"seed {cell.recipe.seed}: {one}" for cell in own for one in _failures(cell)),
            ),
        )
        _, *level = method.name.split("@")
        yield from (
            replace(done, method="@".join([row, *level]), column=column, faults=()) for row, column in method.also
        )
        yield done


def _failures(cell: Cell) -> Sequence[str]:
    found = cell.summary()
    return () if found is None else found["failures"]


def write_tables(
    comparison: Comparison, out: Path, faults: Mapping[str, Sequence[str]]
) -> tuple[tuple[ComparisonRow, ...], dict[str, Any]]:
    """Write ``compare.json``, ``.md`` and ``.csv``; the rows, and all of it as JSON can write it.

    Args:
        comparison: Of what.
        out: The comparison's folder.
        faults: Why runs of a method failed in this sitting, by method.
    """
    rows = comparison_rows(tuple(_outcomes(comparison, out, faults)))
    first = comparison.methods[0].recipe
    metric = metric_of(first)
    table = {
        "name": comparison.name,
        "question": comparison.question,
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "seeds": list(comparison.seeds),
        "levels": list(comparison.levels),
        "rows": [row.as_dict() for row in rows],
        "notes": list(notes(rows)),
    }
    text = comparison_markdown(rows, title=comparison.name, question=comparison.question)
    if comparison.levels:
        text += "\n" + levels_markdown(rows, comparison.levels)
    write_atomic(out / "compare.json", (json.dumps(table, indent=2, allow_nan=False) + "\n").encode())
    write_atomic(out / "compare.md", text.encode())
    write_atomic(out / "compare.csv", comparison_csv(rows).encode())
    return rows, table
