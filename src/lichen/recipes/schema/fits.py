"""What goes with what: the parts of a recipe declare what they need, and what no longer holds with them.

The rule, the client method, the engine and the adapter are declared beside their code. The recipe's other keys that
need something of them, or of each other, stand by subject in :mod:`lichen.recipes.schema.features`. :func:`refuse`
puts a recipe's parts side by side and refuses the first that needs what another does not allow; the sentence comes from
the declaration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lichen.declared import Declared, Part, Property, misfit
from lichen.recipes.schema.features.attack import ATTACK
from lichen.recipes.schema.features.changes import CHANGES
from lichen.recipes.schema.features.feature import Feature
from lichen.recipes.schema.features.help import HELP
from lichen.recipes.schema.features.privacy import PRIVACY
from lichen.recipes.schema.features.robust import ROBUSTNESS
from lichen.recipes.schema.features.schedule import SCHEDULE
from lichen.recipes.schema.features.training import TRAINING

__all__ = ["FEATURES", "member", "refuse"]

FEATURES = (*PRIVACY, *HELP, *CHANGES, *ROBUSTNESS, *SCHEDULE, *TRAINING, *ATTACK)
"""In the order in which a recipe is looked through."""


def member(declared: Declared, decides: frozenset[Property], key: str, *, word: str = "") -> Part:
    """A member of a family as a part of a recipe."""
    return Part(key=key, word=word or declared.name, needs=declared.needs, lacks=decides - declared.allows)


def refuse(recipe: Any, members: Sequence[Part]) -> None:
    """Refuse the first part that needs what another part does not allow, or that clashes with another key.

    Args:
        recipe: The recipe.
        members: Its rule, client method, engine and what is trained.

    Raises:
        ValueError: naming the key and the fix.
    """
    features = tuple(feature for feature in FEATURES if feature.used(recipe))
    parts = (*map(_part, features), *members)
    for place, part in enumerate(parts):
        if (error := misfit(parts, part)) is not None:
            raise ValueError(f"{error.where}: {error.what}; {error.fix}")
        for clash in features[place].clashes if place < len(features) else ():
            if clash.used(recipe):
                raise ValueError(f"{clash.where or part.key}: {clash.what}; {clash.fix}")


def _part(feature: Feature) -> Part:
    """A feature that is in use."""
    return Part(key=feature.key, word=feature.key, needs=feature.needs, lacks=feature.lacks)
