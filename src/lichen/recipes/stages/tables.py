"""Makes the table of a recipe's stages: a row each, with what it did to its own score and to general perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.core.files.manifest import sha256_of
from lichen.present.summary import read_summary
from lichen.present.table import new_table
from lichen.present.units import bytes_text, score_text, seconds_text
from lichen.recipes.stages.folder import stage_done
from lichen.recipes.stages.read import Staged

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["rows_of", "stages_markdown", "stages_table"]


def rows_of(staged: Staged, out: Path) -> list[dict[str, Any]]:
    """What is known of each stage, as JSON can write it; one that is not finished has null for each number.

    Args:
        staged: The stages.
        out: Their folder.

    Raises:
        LichenError: if the summary of a finished one is damaged.
    """
    rows: list[dict[str, Any]] = []
    for stage in staged.stages:
        folder = out / stage.folder
        summary = read_summary(folder) if stage_done(folder) else None
        rows.append(
            {
                "stage": stage.name,
                "folder": stage.folder,
                "begins": stage.begins,
                "task": stage.recipe.task,
                "finished": summary is not None,
                **_numbers(summary),
                "sha256": None if summary is None else sha256_of(folder / "state" / "final.safetensors"),
            }
        )
    return rows


def _numbers(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    columns: Mapping[str, Any] = {} if summary is None else summary["columns"]
    extra: Mapping[str, Any] = {} if summary is None else summary["extra"]

    def mean(name: str) -> float | None:
        column = columns.get(name)
        return None if column is None else column["mean"]

    return {
        "metric": None if summary is None else summary["metric"],
        "base": mean("base"),
        "federated": mean("federated"),
        "general_before": extra.get("forgotten.before"),
        "general_after": extra.get("forgotten.after"),
        "bytes_up": None if summary is None else summary["bytes_up"],
        "bytes_down": None if summary is None else summary["bytes_down"],
        "seconds": None if summary is None else summary["seconds"],
    }


HEADS = ("stage", "begins with", "metric", "base", "federated", "general perplexity", "up", "down", "time")


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    found = []
    for position, row in enumerate(rows):
        before = rows[position - 1]["stage"]
        begins = {"anew": "its own model", "base": f"the model of {before}", "start": f"the adapter of {before}"}
        general = [score_text(row[key]) for key in ("general_before", "general_after")]
        found.append(
            (
                row["stage"],
                begins[row["begins"]],
                row["metric"] or "not finished",
                score_text(row["base"]),
                score_text(row["federated"]),
                "-" if general == ["-", "-"] else " → ".join(general),
                *("-" if row[key] is None else bytes_text(row[key]) for key in ("bytes_up", "bytes_down")),
                "-" if row["seconds"] is None else seconds_text(row["seconds"]),
            )
        )
    return found


def stages_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row a stage.

    Args:
        rows: As :func:`rows_of` gives them.
    """
    from rich.text import Text

    table = new_table(None, *HEADS, numbers=HEADS[3:])
    for cells in _cells(rows):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def stages_markdown(name: str, question: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as a page of Markdown.

    Args:
        name: What the stages are called together.
        question: What they answer.
        rows: As :func:`rows_of` gives them.
    """
    lines = [f"# {name}", "", *([question, ""] if question else [])]
    lines += [" | ".join(("", *cells, "")).strip() for cells in (HEADS, ("---",) * len(HEADS), *_cells(rows))]
    return "\n".join(lines) + "\n"
