"""Values of contributions: what they need of a round, and what has no coalitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model

__all__ = ["VALUE"]

MOST_EXACT = 12
"""As :data:`lichen.server.value.game.MOST_EXACT`, which is not imported where recipes are read fast."""


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str, *, where: str = "") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix, where=where or key)


def _no_public(recipe: Any) -> bool:
    public = recipe.data.public
    return recipe.value.rows == "public" and (not recipe.classifies or public is None or not public.labelled)


def _many(recipe: Any) -> bool:
    """More clients a round than have all their coalitions asked for, as far as the recipe says how many."""
    fed, partition = recipe.federation, recipe.data.partition
    everyone = None if partition.by == "client" else partition.clients
    least = min((n for n in (fed.clients_per_round, everyone) if n is not None), default=0)
    return recipe.value.kind == "exact" and (least > MOST_EXACT or fed.sampling == "poisson")


VALUE: tuple[Feature, ...] = (
    Feature(
        key="value.kind",
        used=lambda recipe: recipe.value is not None and recipe.masked is not None,
        needs=(
            Need(
                Property.SERVER_STEP,
                "is found by each client from its own message under masks, and {who} makes another change than a mean",
                "use an aggregate that is a mean, such as mean, fedit, ffa or rolora, or remove value",
            ),
        ),
    ),
    of_shared_model(
        "value",
        lambda recipe: recipe.value is not None,
        Need(
            Property.PLAIN_TRAINING,
            "is shared out among changes of the model, and {who} sends something else",
            "use optimizer.name: adamw or sgd, or remove value",
        ),
        Need(
            Property.ONE_SERVER,
            "each process of {who} sees its own clients' messages alone",
            "use engine.name: local or spawned",
            where="engine.name",
        ),
        summary="what each client contributed: Shapley values (exact, GTG), first order, leave one out",
        papers=(
            Paper(short="Liu et al. ACM TIST 2022", url="https://arxiv.org/abs/2109.02053"),
            Paper(short="Wang et al. 2020", url="https://arxiv.org/abs/2009.06192"),
        ),
        clashes=(
            _clash(
                "privacy",
                lambda r: r.noised is not None,
                "a value tells of a client's message what noise is to hide",
                "remove value, or privacy",
            ),
            _clash(
                "federation.fair",
                lambda r: r.federation.fair != "none",
                "its weights follow from losses of all clients, and a coalition has other ones",
                "use fair: none, or remove value",
            ),
            _clash(
                "federation.robust",
                lambda r: r.federation.robust is not None,
                "a robust rule drops messages, and drops others in each coalition",
                "remove value, or federation.robust",
            ),
            _clash(
                "federation.ranks",
                lambda r: r.federation.ranks is not None or r.federation.memory is not None,
                "clients of unequal ranks share no denominator",
                "remove value, or federation.ranks and federation.memory",
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.local_params,
                "a part of the model never leaves its client, and no coalition can be judged without it",
                "use another federation.aggregate",
            ),
            _clash(
                "federation.schedule.kind",
                lambda r: r.federation.schedule.kind == "buffered",
                "the messages of a buffered step were made for several models",
                "set schedule.kind: synchronous",
            ),
            _clash(
                "semi",
                lambda r: r.semi is not None,
                "clients learn from rows without labels, and the server's own steps belong to nobody",
                "remove value, or semi",
            ),
            _clash(
                "value.rows",
                _no_public,
                "the server has no public rows with labels",
                "use task: classify and set data.public.labelled, or value.rows: valid",
            ),
            _clash(
                "value.rows",
                lambda r: r.value.rows == "valid" and not r.data.valid,
                "clients have no validation rows",
                "set data.valid, or use value.rows: public",
            ),
            _clash(
                "value.rows",
                lambda r: r.value.rows == "public" and r.teacher is not None and r.teacher.kind == "labels",
                "the clients learn from the labels of these rows",
                "use value.rows: valid",
            ),
            _clash(
                "value.kind",
                lambda r: r.value.kind == "first" and r.federation.server.name != "sgd",
                "first order holds for small steps along a change, and adam and yogi turn it",
                "use gtg, or federation.server.name: sgd",
            ),
            _clash(
                "value.kind",
                _many,
                f"more than {MOST_EXACT} clients in a round have too many coalitions, or may have",
                "use gtg, or federation.clients_per_round up to 12",
            ),
            _clash(
                "value.every",
                lambda r: r.value.every > r.federation.rounds,
                "no round is valued",
                "use federation.rounds at most",
            ),
        ),
    ),
)
