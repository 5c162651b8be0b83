"""Chooses what a recipe's server does: its rule, step, invitations and schedule, and what clients are sent.

Legend: N clients.
"""

from __future__ import annotations

import math

from lichen.algorithms.rewarded import EachItsOwn
from lichen.core.contracts.server import Aggregator, Sampler, ServerOptimizer
from lichen.core.errors import LichenError
from lichen.core.timing.schedule import Schedule
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import with_innermost
from lichen.models.adapters.layerwise import layerwise_schedule
from lichen.recipes.assemble.sides.server import ServerSide, at_work, participants
from lichen.recipes.schema.model import AdapterConfig
from lichen.recipes.schema.recipe import Recipe
from lichen.server.fairness.qffl import QFFL
from lichen.server.optimize import ServerAdam, ServerSGD, ServerYogi
from lichen.server.private_mean import PrivateMean
from lichen.server.robust.fltrust import FLTrust
from lichen.server.robust.robust import Robust
from lichen.server.robust.table import too_many_liars
from lichen.server.rules import RuleSettings
from lichen.server.sampling import Everyone, Poisson, Uniform, Weighted
from lichen.server.schedules import Buffered, Synchronous
from lichen.server.sums.summed import Weighting
from lichen.transforms.codec import Chain
from lichen.transforms.downlink import Deltas, Direct, Downlink
from lichen.transforms.parse import parse_codecs

__all__ = [
    "aggregator_of",
    "down_of",
    "downlink_of",
    "freeze_schedule_of",
    "local_params_of",
    "sampler_of",
    "scaling_of",
    "schedule_of",
    "server_of",
    "weighting_of",
]


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


def down_of(recipe: Recipe) -> Chain | None:
    """How changes of the shared tensors are coded on their way to the clients."""
    return parse_codecs(recipe.wire.down) if recipe.wire.down else None


def downlink_of(server: ServerSide) -> Downlink:
    """What happens to jobs on their way to the clients.

    Raises:
        LichenError: if changes are coded, and clients have declared unequal capacities.
    """
    chain = down_of(server.recipe)
    if server.recipe.federation.reward == "cgsv":
        return EachItsOwn()
    if chain is None:
        return Direct(server.capacity)
    if server.capacity is not None:
        raise LichenError(
            "clients of unequal capacity hold no common view that steps could lead on",
            where="wire.down",
            fix="remove it",
        )
    return Deltas(chain, agreed=not server.recipe.starts_at_server)


def server_of(recipe: Recipe) -> ServerOptimizer:
    """The recipe's server optimizer."""
    server, own = recipe.federation.server, recipe.method.server
    if own is not None:
        return own()
    if server.name == "sgd":
        return ServerSGD(lr=server.lr, momentum=server.momentum, nesterov=server.nesterov)
    return (ServerAdam if server.name == "adam" else ServerYogi)(lr=server.lr)


def sampler_of(server: ServerSide) -> Sampler:
    """The recipe's sampler."""
    fed, count = server.recipe.federation, at_work(server)
    if count == len(server.roster) and fed.sampling != "poisson":
        return Everyone()
    if fed.sampling == "poisson":
        return Poisson(rate=count / len(server.roster))
    return (Weighted if fed.sampling == "weighted" else Uniform)(count=count)


def schedule_of(server: ServerSide) -> Schedule:
    """The recipe's schedule."""
    schedule = server.recipe.federation.schedule
    deadline = math.inf if schedule.deadline is None else schedule.deadline
    if schedule.kind == "synchronous":
        return Synchronous(deadline=deadline, least=schedule.least)
    return Buffered(
        arrivals=participants(server),
        concurrency=at_work(server),
        exponent=schedule.exponent,
        hinge=schedule.hinge,
        mixing=schedule.mixing,
        max_age=schedule.max_age,
        deadline=deadline,
        least=schedule.least,
    )
