"""Chooses the aggregation rule of a recipe, its frozen layers and its local parameters.

Legend: N clients.
"""

from __future__ import annotations

from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import with_innermost
from lichen.models.adapters.layerwise import layerwise_schedule
from lichen.recipes.assemble.sides.server import ServerSide, participants
from lichen.recipes.schema.model import AdapterConfig
from lichen.recipes.schema.recipe import Recipe
from lichen.server.fairness.qffl import QFFL
from lichen.server.private_mean import PrivateMean
from lichen.server.robust.fltrust import FLTrust
from lichen.server.robust.robust import Robust
from lichen.server.robust.table import too_many_liars
from lichen.server.rules import RuleSettings
from lichen.server.sums.summed import Weighting

__all__ = ["aggregator_of", "freeze_schedule_of", "local_params_of", "scaling_of", "weighting_of"]


def scaling_of(adapter: AdapterConfig) -> float:
    """What a LoRA layer puts on ``B A``."""
    return adapter.alpha / (adapter.rank**0.5 if adapter.rslora else adapter.rank)


def freeze_schedule_of(server: ServerSide) -> tuple[tuple[str, ...], ...]:
    """Names that stand still, round by round: those of the rule, and those of the layers whose turn it is not."""
    rule = server.recipe.aggregation.freezes
    groups = server.recipe.federation.layer_groups
    if groups == 1:
        return rule
    turns = layerwise_schedule(server.start.trainable, groups)
    return tuple((*turn, *half) for turn in turns for half in rule or ((),))


def local_params_of(recipe: Recipe) -> tuple[str, ...]:
    """Ends of the names that stay with their clients."""
    return recipe.aggregation.local_params


def aggregator_of(server: ServerSide, lr: float) -> Aggregator:
    """The recipe's aggregator, for clients that train at this rate.

    Raises:
        LichenError: if a robust rule does not stand so many liars among so many clients.
    """
    recipe = server.recipe
    if recipe.noised is not None and recipe.noised.unit == "client":
        return _private(server)
    if recipe.federation.robust is not None:
        return _robust(server)
    if recipe.federation.fair == "qffl":
        fed = recipe.federation
        return QFFL(fed.q, lr=lr, weighting=weighting_of(recipe))
    return _rule(recipe)


def weighting_of(recipe: Recipe) -> Weighting:
    """How the server weighs messages: by the weight each brings, whatever its client has counted, or all alike."""
    return "uniform" if recipe.federation.weighting == "uniform" else "examples"


def _robust(server: ServerSide) -> Aggregator:
    """The recipe's robust rule.

    Raises:
        LichenError: if it does not stand so many liars among so many clients of a round.
    """
    robust = server.recipe.federation.robust
    assert robust is not None
    if robust.asks_server:
        return FLTrust(_no_reference)
    if (fault := too_many_liars(robust.rule, robust.liars, participants(server))) is not None:
        raise fault
    return Robust(
        robust.rule,
        liars=robust.liars,
        mixing=robust.mixing,
        of=robust.of,
        radius=robust.radius,
        iterations=robust.iterations,
    )


def _no_reference(shared: Shared, version: int) -> Tree:
    """Stands for the server's own training, until the run says where that is done."""
    raise LichenError("the server has no rows of its own here", where="federation.robust.rule", fix="use another rule")


def _private(server: ServerSide) -> Aggregator:
    """The recipe's rule around a private mean; whoever runs the rounds brings noise and layout."""
    recipe, config = server.recipe, server.recipe.noised
    assert config is not None
    mean = PrivateMean(float(participants(server)), clip=config.bound, distributed=recipe.masked is not None)
    return mean if recipe.rule == "fedit" else with_innermost(_rule(recipe), mean)


def _rule(recipe: Recipe) -> Aggregator:
    settings = RuleSettings(
        weighting=weighting_of(recipe),
        scaling=scaling_of(recipe.model.adapter),
        energy=recipe.federation.energy,
        seed=recipe.seed,
    )
    rule = recipe.aggregation
    return (rule.make if recipe.masked is None else rule.make_summed or rule.make)(settings)
