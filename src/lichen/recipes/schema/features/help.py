"""What helps clients: a foundation model, unlabelled rows, one another's answers."""

from __future__ import annotations

from typing import Any

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import Clash, Feature

__all__ = ["HELP"]

_WHOLE_STEPS = frozenset({Property.EPOCHS, Property.ACCUMULATION})


_CHOOSES = Need(
    Property.PSEUDO_LABELS,
    "each step chooses what it learns from, and {who} does not",
    "remove it, or use adamw or sgd",
)


def _helps(key: str, *needs: Need, **more: Any) -> Feature:
    """A section by which a foundation model, or unlabelled rows, help."""
    return Feature(
        key=key,
        used=lambda recipe: getattr(recipe, key) is not None,
        needs=(
            *needs,
            Need(
                Property.ALL_ROWS,
                "nodes of {who} open their own rows alone, without {me}",
                "use local",
                where="engine.name",
            ),
        ),
        clashes=(
            Clash(
                other="exchange",
                used=lambda recipe: recipe.exchange is not None,
                what="was not tried beside an exchange",
                fix="remove one of the two",
            ),
        ),
        **more,
    )


HELP: tuple[Feature, ...] = (
    _helps(
        "teacher",
        summary="a foundation model's answers to public rows are learned from",
        papers=(
            Paper(short="Hinton et al. NIPS Deep Learning Workshop 2014", url="https://arxiv.org/abs/1503.02531"),
            Paper(short="Kim and Rush. EMNLP 2016", url="https://arxiv.org/abs/1606.07947"),
        ),
    ),
    _helps(
        "synthetic",
        summary="a foundation model writes rows: by label, or towards private rows (Private Evolution)",
        papers=(
            Paper(short="Ye et al. EMNLP 2022", url="https://arxiv.org/abs/2202.07922"),
            Paper(short="Lin et al. ICLR 2024", url="https://arxiv.org/abs/2305.15560"),
            Paper(short="Xie et al. ICML 2024", url="https://arxiv.org/abs/2403.01749"),
        ),
    ),
    Feature(
        key="teacher.select",
        used=lambda recipe: recipe.teacher is not None and recipe.teacher.select,
        needs=(_CHOOSES,),
    ),
    _helps(
        "semi",
        _CHOOSES,
        lacks=_WHOLE_STEPS,
        summary="rows without a label are labelled by the model as it learns: FixMatch, FlexMatch, SemiFL",
        papers=(
            Paper(short="Sohn et al. NeurIPS 2020", url="https://arxiv.org/abs/2001.07685"),
            Paper(short="Zhang et al. NeurIPS 2021", url="https://arxiv.org/abs/2110.08263"),
        ),
    ),
    Feature(
        key="exchange",
        summary="unequal students share answers, not weights: FedMD, DS-FL, FedDF",
        papers=(
            Paper(
                short="Li and Wang. NeurIPS Workshop on Federated Learning 2019", url="https://arxiv.org/abs/1910.03581"
            ),
            Paper(short="Itahara et al. IEEE TMC 2023", url="https://arxiv.org/abs/2008.06180"),
            Paper(short="Lin et al. NeurIPS 2020", url="https://arxiv.org/abs/2006.07242"),
        ),
        used=lambda recipe: recipe.exchange is not None,
        needs=(
            Need(Property.ALL_ROWS, "an exchange runs in one process", "use local", where="engine.name"),
            Need(Property.ONE_SERVER, "an exchange runs in one process", "use local", where="engine.name"),
            Need(Property.PLAIN_TRAINING, "{who} trains no student", "use adamw or sgd", where="optimizer.name"),
        ),
        lacks=_WHOLE_STEPS | {Property.CODECS, Property.SHARED_MODEL, Property.RECIPE_WEIGHTS},
    ),
)
