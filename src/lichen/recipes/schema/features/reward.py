"""Rewards in coordinates of the model: what goes with clients that each train a model of their own from the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import NO_LATE, Clash, of_shared_model

__all__ = ["REWARD"]


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix or f"remove it, or {key}", where=key)


REWARD = (
    of_shared_model(
        "federation.reward",
        lambda recipe: recipe.federation.reward != "none",
        Need(
            Property.MEAN_OF_ONE_LAYOUT,
            "pays in coordinates of a mean of changes of the same tensors, and {who} makes none",
            "use aggregate: mean, fedit, ffa or rolora",
        ),
        Need(Property.PLAIN_TRAINING, "clients train models of their own, not by {who}", "use adamw or sgd"),
        Need(
            Property.ONE_SERVER,
            "each process of {who} sees its own clients' messages alone",
            "use engine.name: local or spawned",
            where="engine.name",
        ),
        lacks=NO_LATE | {Property.SUMS, Property.BOUNDED_SUM},
        summary="clients are paid in coordinates of the common change, by how their own point the same way (CGSV)",
        papers=(
            Paper(
                short="Xu et al. NeurIPS 2021",
                url="https://proceedings.neurips.cc/paper/2021/hash/8682cc30db9c025ecd3fee433f8ab54c-Abstract.html",
            ),
        ),
        clashes=(
            _clash(
                "federation.clients_per_round",
                lambda r: r.federation.clients_per_round is not None or r.federation.sampling == "poisson",
                "who is not in a round is not paid for it, and its model falls behind for good",
                "leave it out: all come to every round",
            ),
            _clash(
                "federation.schedule.kind",
                lambda r: r.federation.schedule.kind == "buffered",
                "a reward is for a round, and a buffered step takes answers of several",
                "set schedule.kind: synchronous",
            ),
            _clash(
                "privacy",
                lambda r: r.noised is not None,
                "a reward tells how a client's change points, which noise is to hide",
            ),
            _clash("federation.robust", lambda r: r.federation.robust is not None, "it leaves out whom it distrusts"),
            _clash("federation.fair", lambda r: r.federation.fair != "none", "it weighs by losses of one shared model"),
            _clash("personal", lambda r: r.personal is not None, "each client has one model of its own already"),
            _clash("value", lambda r: r.value is not None, "coalitions are judged by one model that all begin from"),
            _clash("audit.canaries", lambda r: r.audit is not None, "an audit asks one model that all have trained"),
            _clash("semi", lambda r: r.semi is not None, "the server's own steps are nobody's change"),
            _clash("wire.down", lambda r: r.wire.down, "clients hold no common view that steps could lead on"),
            _clash(
                "federation.history", lambda r: r.federation.history, "rounds are replayed from tensors that all share"
            ),
            _clash(
                "federation.repair",
                lambda r: r.federation.repair is not None,
                "the server's repair would not reach the clients' models",
            ),
            *(
                _clash(key, used, "clients of unequal layouts have no coordinates in common")
                for key, used in (
                    ("federation.ranks", lambda r: r.federation.ranks is not None),
                    ("federation.memory", lambda r: r.federation.memory is not None),
                )
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.local_params,
                "a part of the model never leaves its client, and cannot be paid in",
                "use fedit or mean",
            ),
        ),
    ),
)
