"""Audits several finished runs on the same data, to see what each gave away and what protected it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.present.summary import read_summary
from lichen.recipes.audit.audit import Audit, audit
from lichen.recipes.schema.read import recipe_of

__all__ = ["AuditedRun", "audit_several"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedRun:
    """A run, what protects it, and what was found.

    Attributes:
        folder: The run's, as it was named.
        protected_by: In a few words; ``none`` where nothing does.
        epsilon: What was spent of it; None where nothing is promised.
        found: By the audit.
    """

    folder: str
    protected_by: str
    epsilon: float | None
    found: Audit


def audit_several(
    folders: Sequence[Path], *, rows: int = 1000, messages: int = 8, sums: bool = False, seed: int = 0
) -> list[AuditedRun]:
    """Audit runs of one task on the same data, one after the other.

    Args:
        folders: Of the runs.
        rows: Training rows, and test rows, of each run that are scored at most.
        messages: Retained messages of each run that are read at most.
        sums: Read sums of rounds in place of messages.
        seed: Of the intervals.

    Returns:
        What was found, in the order of the folders.

    Raises:
        LichenError: naming the folder, before any run is audited if a run is not finished or was made on other data
            than the first, and as :func:`lichen.recipes.audit.audit.audit`.
    """
    summaries = [read_summary(folder) for folder in folders]
    first, *others = (recipe_of(folder) for folder in folders)
    for folder, recipe in zip(folders[1:], others, strict=True):
        for part in ("task", "data", "seed"):
            if getattr(recipe, part) != getattr(first, part):
                raise LichenError(
                    f"its {part} differs from that of {folders[0]}, so that other rows were trained on",
                    where=str(folder),
                    fix="audit it by itself",
                )
    return [
        AuditedRun(
            folder=str(folder),
            protected_by=_protection(summary),
            epsilon=(summary.get("privacy") or {}).get("epsilon"),
            found=_audit(folder, rows=rows, messages=messages, sums=sums, seed=seed),
        )
        for folder, summary in zip(folders, summaries, strict=True)
    ]


def _audit(folder: Path, *, rows: int, messages: int, sums: bool, seed: int) -> Audit:
    try:
        return audit(folder, rows=rows, messages=messages, sums=sums, seed=seed)
    except LichenError as error:
        if str(folder) in error.where:
            raise
        where = f"{folder}: {error.where}" if error.where else str(folder)
        raise LichenError(error.what, where=where, fix=error.fix, reason=error.reason) from None


def _protection(summary: Mapping[str, Any]) -> str:
    privacy = summary.get("privacy")
    if summary.get("masks") is not None:
        return "masks" if privacy is None else f"masks, {_protection({'privacy': privacy})}"
    if privacy is None:
        return "none"
    if privacy["epsilon"] is None:
        return "none: no noise" if privacy["sigma"] == 0 else "none: seeded noise"
    return f"noise for one {privacy['unit']}, δ = {privacy['delta']:.2g}"
