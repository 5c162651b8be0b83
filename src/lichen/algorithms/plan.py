"""Refuses parts of a federation that do not go together, from what each part declares of itself.

Recipes are held together by their keys (:mod:`lichen.declared`). This holds for whoever puts an algorithm together in
Python, and for recipes once more: no part is asked for its name.
"""

from __future__ import annotations

from lichen.core.contracts.client import ClientWork, Dialogue
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.timing.schedule import Schedule
from lichen.transforms.transform import Transform, Transformed

__all__ = ["check_plan", "transforms_of"]

FAR = 1 << 20
"""An age, in server steps, at which a schedule that gives jobs up for their age has done so."""


def transforms_of(work: ClientWork | Dialogue | None) -> tuple[Transform, ...]:
    """What happens to the messages of a work on their way; nothing where that is not known."""
    return work.transforms if isinstance(work, Transformed) else ()


def check_plan(
    *,
    aggregator: Aggregator,
    work: ClientWork | Dialogue | None,
    schedule: Schedule,
) -> None:
    """Refuse what cannot be: the key, the reason, what would work.

    Args:
        aggregator: Folds the messages.
        work: The clients'; None where it is not known here.
        schedule: When a round has enough.

    Raises:
        LichenError: at the first pair of parts that do not go together.
    """
    composes: frozenset[str] = frozenset({"sum", "single"})
    for transform in transforms_of(work):
        composes &= transform.composes
        if not composes:
            raise LichenError(
                "what comes before it is no sum of messages, and after it messages can only be added up",
                where=transform.key,
                fix=f"leave out {transform.key}, or the transforms before it",
            )
        if aggregator.needs == "single" and "single" not in composes:
            raise LichenError(
                "the aggregator needs single messages, and after it there is only their sum",
                where=transform.key,
                fix=f"leave out {transform.key}, or use an aggregator that needs only a sum",
            )
        if transform.remembers and (schedule.deadline < float("inf") or schedule.discount(FAR) == 0):
            raise LichenError(
                "remembers what a message lost, and would remember wrongly where a message comes too late to count",
                where=transform.key,
                fix="leave out deadline and max_age of federation.schedule, or wire.up",
            )
