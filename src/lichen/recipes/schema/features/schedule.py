"""When an answer counts, and how long it takes."""

from __future__ import annotations

from typing import Any

from lichen.declared import EVERY_ANSWER, OLD_ANSWERS, Need, Paper, Property
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model

__all__ = ["SCHEDULE"]

_ONE_CLOCK = Need(Property.ONE_SERVER, "the processes of {who} have no common clock", "use engine.name: local")


def _timeless(recipe: Any) -> bool:
    """Whether all clients answer when they are asked."""
    return recipe.engine.name == "local" and recipe.engine.clock is None


_NOBODY_LATE = Clash(
    other="engine.clock",
    used=_timeless,
    what="in one process and without a clock nobody is late",
    fix="set engine.clock: {median: 60}, or engine.name: spawned; for lichen submit the latter",
)

SCHEDULE: tuple[Feature, ...] = (
    of_shared_model(
        "federation.schedule.kind",
        lambda recipe: recipe.federation.schedule.kind == "buffered",
        OLD_ANSWERS,
        _ONE_CLOCK,
        summary="FedBuff: a step after so many answers of whatever age, while the others train on",
        papers=(Paper(short="Nguyen et al. AISTATS 2022", url="https://arxiv.org/abs/2106.06639"),),
        clashes=(
            _NOBODY_LATE,
            Clash(
                other="federation.clients_per_round",
                used=lambda recipe: recipe.federation.clients_per_round is not None,
                what="a buffered step has schedule.arrivals answers of schedule.concurrency clients at work",
                fix="remove it",
                where="federation.clients_per_round",
            ),
            Clash(
                other="federation.sampling",
                used=lambda recipe: recipe.federation.sampling == "poisson",
                what="those at work stay, so that no step draws its clients by their own coins",
                fix="use uniform or weighted",
                where="federation.sampling",
            ),
        ),
    ),
    of_shared_model(
        "federation.schedule.mixing",
        lambda recipe: recipe.federation.schedule.mixing is not None,
        Need(
            Property.MEAN_OF_ONE_LAYOUT,
            "{who} makes no model that could be mixed with the server's",
            "use mean, ffa or fedit with one rank for all",
        ),
        summary="FedAsync: after each answer the server's model is mixed with the client's, the older the less",
        papers=(Paper(short="Xie et al. OPT 2020", url="https://arxiv.org/abs/1903.03934"),),
        clashes=(
            Clash(
                other="federation.server",
                used=lambda recipe: (
                    recipe.federation.server.name != "sgd"
                    or recipe.federation.server.lr != 1
                    or recipe.federation.server.momentum
                ),
                what="a mixture of models is no step that another optimizer could take",
                fix="use sgd, lr 1 and no momentum",
                where="federation.server",
            ),
            Clash(
                other="federation.robust",
                used=lambda recipe: recipe.federation.robust is not None,
                what="of one answer there is no other middle",
                fix="leave federation.robust out, or mixing",
            ),
        ),
    ),
    of_shared_model(
        "federation.schedule.deadline",
        lambda recipe: recipe.federation.schedule.deadline is not None,
        EVERY_ANSWER,
        _ONE_CLOCK,
        clashes=(_NOBODY_LATE,),
    ),
    of_shared_model(
        "federation.schedule.scoring_deadline",
        lambda recipe: recipe.federation.schedule.scoring_deadline is not None,
        _ONE_CLOCK,
        clashes=(
            Clash(
                other="engine.name",
                used=lambda recipe: recipe.engine.name == "local",
                what="in one process all score when they are asked, whatever the clock of training says",
                fix="use engine.name: spawned",
            ),
            Clash(
                other="privacy.secure",
                used=lambda recipe: recipe.masked is not None,
                what="each stage of a masked score has its own time",
                fix="set privacy.stage_seconds",
            ),
        ),
    ),
    of_shared_model("federation.schedule.least", lambda recipe: recipe.federation.schedule.least > 1, EVERY_ANSWER),
    of_shared_model(
        "federation.schedule.max_age", lambda recipe: recipe.federation.schedule.max_age is not None, EVERY_ANSWER
    ),
    of_shared_model(
        "federation.history",
        lambda recipe: recipe.federation.history,
        clashes=(
            Clash(
                other="federation.schedule.kind",
                used=lambda recipe: recipe.federation.schedule.kind == "buffered",
                what="nobody can say whose answers a buffered step would have had without a client",
                fix="set schedule.kind: synchronous",
            ),
        ),
    ),
    of_shared_model(
        "engine.clock",
        lambda recipe: recipe.engine.clock is not None,
        _ONE_CLOCK,
        clashes=(
            Clash(
                other="federation.schedule.deadline",
                used=lambda recipe: recipe.engine.clock.dropout and recipe.federation.schedule.deadline is None,
                what="who drops out never answers, and without a deadline is waited for",
                fix="set federation.schedule.deadline",
                where="engine.clock.dropout",
            ),
        ),
    ),
)
