"""A rule that liars cannot lead, in the place of the mean."""

from __future__ import annotations

from typing import Any

from lichen.declared import Need, Property
from lichen.recipes.schema.features.feature import NO_LATE, Clash, Feature, of_shared_model
from lichen.server.robust.table import NNM, ROBUST

__all__ = ["ROBUSTNESS"]


def _used(recipe: Any) -> bool:
    return recipe.federation.robust is not None


def _trusts(recipe: Any) -> bool:
    return _used(recipe) and recipe.federation.robust.asks_server


def _of_products(recipe: Any) -> bool:
    return _used(recipe) and recipe.federation.robust.of == "products"


ROBUSTNESS: tuple[Feature, ...] = (
    of_shared_model(
        "federation.robust",
        _used,
        Need(
            Property.MEAN_OF_ONE_LAYOUT,
            "stands in the place of a mean of changes of the same tensors, and {who} takes none",
            "use aggregate: mean, fedit or ffa and adamw, sgd or mezo, or remove it",
        ),
        lacks=frozenset({Property.PLAIN_MEAN, Property.SUMS}),
        summary="a few lying clients cannot lead the change: Krum, medians, trimmed means, clipping; with or without "
        "nearest-neighbour mixing",
        papers=tuple(dict.fromkeys((*(paper for rule in ROBUST.values() for paper in rule.papers), NNM))),
        clashes=(
            Clash(
                other="federation.weighting",
                used=lambda recipe: recipe.federation.weighting == "rows",
                what="robust rules count every client as 1",
                fix="remove it, or use uniform",
                where="federation.weighting",
            ),
        ),
    ),
    Feature(
        key="federation.robust.rule",
        used=_trusts,
        lacks=NO_LATE,
        needs=(Need(Property.ONE_SERVER, "fltrust trains in one process", "use engine.name: local or spawned"),),
        clashes=(
            Clash(
                other="semi.kind",
                used=lambda recipe: recipe.semi is not None,
                what="clients learn from rows without labels there, which the server's own change cannot be like",
                fix="remove one",
            ),
        ),
    ),
    Feature(
        key="federation.robust.of",
        used=_of_products,
        needs=(Need(Property.LORA_FACTORS, "{who} has no LoRA factors", "use of: factors"),),
        clashes=(
            Clash(
                other="federation.aggregate",
                used=lambda recipe: recipe.aggregation.freezes or recipe.aggregation.local_params,
                what="clients send one factor of each pair, and its product with the other is linear in it",
                fix="use of: factors, or federation.aggregate: fedit",
            ),
        ),
    ),
)
