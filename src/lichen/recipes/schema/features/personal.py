"""Models of the clients' own: what goes with tensors that are trained at home beside the shared ones."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import NO_LATE, Clash, Feature, of_shared_model

__all__ = ["PERSONAL"]


def _in_rounds(recipe: Any) -> bool:
    """Whether clients train their own tensors beside the shared ones, in every round."""
    return recipe.personal is not None and recipe.personal.kind != "finetune"


def _set(key: str) -> Callable[[Any], bool]:
    """Whether a key is there."""
    return lambda recipe: attrgetter(key)(recipe) is not None


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "remove one of the two") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix, where=key)


PERSONAL: tuple[Feature, ...] = (
    of_shared_model(
        "personal.kind",
        lambda recipe: recipe.personal is not None,
        Need(
            Property.PLAIN_TRAINING, "own tensors are trained by SGD or AdamW, and {who} does more", "use adamw or sgd"
        ),
        summary="a model for each client beside the shared one: steps from it (finetune), or one that is pulled to it "
        "(Ditto)",
        papers=(Paper(short="Li et al. ICML 2021", url="https://arxiv.org/abs/2012.04221"),),
        clashes=(
            *(
                _clash(key, _set(key), "own models were not tried beside it")
                for key in ("teacher", "synthetic", "semi")
            ),
            *(
                _clash(key, _set(key), "own tensors are as large as the shared ones, which not every client holds here")
                for key in ("federation.ranks", "federation.memory")
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.local_params,
                "clients keep a part of the model by this rule already",
                "use fedit or mean, or leave the section personal out",
            ),
            _clash(
                "federation.repair",
                lambda r: r.federation.repair is not None,
                "the server's repair would not reach the models that are at home",
            ),
            _clash(
                "attack.kind",
                lambda r: r.attack is not None and r.attack.facts.on == "rows",
                "a liar's own model would learn from the rows that it has changed",
                "use an attack of messages, or remove it",
            ),
            _clash(
                "privacy",
                lambda r: r.privacy is not None and r.engine_kind.nodes,
                "under privacy no node answers with its scores, and nobody else has its clients' own models",
                "use engine.name: local",
            ),
        ),
    ),
    of_shared_model(
        "personal.kind",
        _in_rounds,
        lacks=NO_LATE,
        clashes=(
            _clash(
                "privacy.unit",
                lambda r: r.noised is not None and r.noised.unit == "row",
                "own tensors are trained on whole batches, and here a batch is a sample in parts",
                "use personal.kind: finetune",
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.patch is not None,
                "the frozen layers move with the shared model, and own tensors would no longer fit them",
                "use fedit or mean, or personal.kind: finetune",
            ),
        ),
    ),
)
