"""What goes with what: the parts of a recipe declare what they need, and what no longer holds with them.

The rule, the client method, the engine and the adapter are declared beside their code. The recipe's other keys that
need something of them, or of each other, stand by subject in :mod:`lichen.recipes.schema.features`. :func:`refuse`
puts a recipe's parts side by side and refuses the first that needs what another does not allow; the sentence comes from
the declaration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lichen.core.errors import LichenError
from lichen.declared import Declared, Part, Property, misfit
from lichen.recipes.schema.features.attack import ATTACK
from lichen.recipes.schema.features.audit import CANARIES
from lichen.recipes.schema.features.changes import CHANGES
from lichen.recipes.schema.features.emulators.offsite import OFFSITE
from lichen.recipes.schema.features.feature import FaultsError, Feature
from lichen.recipes.schema.features.fingerprint import FINGERPRINT
from lichen.recipes.schema.features.help import HELP
from lichen.recipes.schema.features.masks import MASKS
from lichen.recipes.schema.features.periods.stream import STREAM
from lichen.recipes.schema.features.personal import PERSONAL
from lichen.recipes.schema.features.pieces.split import SPLIT
from lichen.recipes.schema.features.prefer import PREFER
from lichen.recipes.schema.features.privacy import PRIVACY, published_whole
from lichen.recipes.schema.features.reward import REWARD
from lichen.recipes.schema.features.robust import ROBUSTNESS
from lichen.recipes.schema.features.schedule import SCHEDULE
from lichen.recipes.schema.features.training import TRAINING
from lichen.recipes.schema.features.value import VALUE
from lichen.recipes.schema.features.withdrawal.absent import ABSENT

__all__ = ["FEATURES", "member", "refuse"]

FEATURES = (
    *PRIVACY,
    *MASKS,
    *HELP,
    *CHANGES,
    *ROBUSTNESS,
    *SCHEDULE,
    *TRAINING,
    *ATTACK,
    *CANARIES,
    *VALUE,
    *REWARD,
    *PERSONAL,
    *FINGERPRINT,
    *OFFSITE,
    *STREAM,
    *PREFER,
    *ABSENT,
    *SPLIT,
)
"""In the order in which a recipe is looked through."""


def member(declared: Declared, decides: frozenset[Property], key: str, *, word: str = "") -> Part:
    """A member of a family as a part of a recipe."""
    return Part(key=key, word=word or declared.name, needs=declared.needs, lacks=decides - declared.allows)


def refuse(recipe: Any, members: Sequence[Part]) -> None:
    """Refuse the first part that needs what another part does not allow, or that clashes with another key.

    What does not go with ``privacy`` is told all at once, since there is much of it.

    Args:
        recipe: The recipe.
        members: Its rule, client method, engine and what is trained.

    Raises:
        FaultsError: naming keys and fixes.
    """
    features = tuple(feature for feature in FEATURES if feature.used(recipe))
    parts = (*map(_part, features), *members)
    faults = [
        error
        for place, part in enumerate(parts)
        if place < len(features) and features[place] in (*PRIVACY, *MASKS)
        for error in _faults(recipe, parts, part, features[place])
    ]
    if recipe.noised is not None and (whole := published_whole(recipe)) is not None:
        faults.append(whole)
    if faults:
        raise FaultsError("privacy", faults)
    for place, part in enumerate(parts):
        for error in _faults(recipe, parts, part, features[place] if place < len(features) else None):
            raise FaultsError(part.key, [error])


def _faults(recipe: Any, parts: Sequence[Part], part: Part, feature: Feature | None) -> Iterator[LichenError]:
    """Why a part does not go with others: for what it needs, and for other keys."""
    if (error := misfit(parts, part)) is not None:
        yield error
    for clash in () if feature is None else feature.clashes:
        if clash.used(recipe):
            yield LichenError(clash.what, where=clash.where or part.key, fix=clash.fix)


def _part(feature: Feature) -> Part:
    """A feature that is in use."""
    return Part(key=feature.key, word=feature.key, needs=feature.needs, lacks=feature.lacks)
