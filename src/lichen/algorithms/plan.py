"""Refuses parts of a federation that do not go together, from what each part declares of itself.

Recipes are held together by the same declarations (:mod:`lichen.declared`), key by key and before anything is opened.
This holds for whoever puts an algorithm together in Python, and for recipes once more: no part is asked for its name.
"""

from __future__ import annotations

from lichen.core.contracts.client import ClientWork, Dialogue
from lichen.core.contracts.server import Aggregator
from lichen.core.timing.schedule import Schedule
from lichen.core.wrapping import layers
from lichen.declared import EVERY_ANSWER, OLD_ANSWERS, Part, Property, misfit
from lichen.transforms.transform import Transform, Transformed

__all__ = ["check_plan", "transforms_of"]


def transforms_of(work: ClientWork | Dialogue | None) -> tuple[Transform, ...]:
    """What happens to the messages of a work on their way; nothing where that is not known."""
    return next((layer.transforms for layer in layers(work) if isinstance(layer, Transformed)), ())


def check_plan(*, aggregator: Aggregator, work: ClientWork | Dialogue | None, schedule: Schedule) -> None:
    """Refuse what cannot be: the key, the reason, what would work.

    Args:
        aggregator: Folds the messages.
        work: The clients'; None where it is not known here.
        schedule: When a round has enough.

    Raises:
        LichenError: at the first part that needs what another does not allow.
    """
    lacks = frozenset({Property.SUMS} if aggregator.needs == "single" else ())
    lacks |= frozenset({Property.LATE_ANSWERS} if aggregator.one_version else ())
    parts = (
        *(Part(key=one.key, word=one.key, needs=one.needs, lacks=one.lacks) for one in transforms_of(work)),
        Part(key="federation.aggregate", word="this aggregator", lacks=lacks),
        Part(
            key="federation.schedule",
            word="this schedule",
            needs=(
                *((EVERY_ANSWER,) if schedule.loses_answers else ()),
                *((OLD_ANSWERS,) if schedule.takes_old else ()),
            ),
        ),
    )
    for part in parts:
        error = misfit(parts, part)
        if error is not None:
            raise error
