"""Canaries in training: what they do not go beside, since their coins would show or nobody could be asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.declared import Paper
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model
from lichen.tasks.registry import task_of

__all__ = ["CANARIES"]


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str) -> Clash:
    return Clash(other=key, used=used, what=f"with canaries {what}", fix=fix, where=key)


def _unnamed(recipe: Any) -> bool:
    labels = task_of(recipe.task).labels
    return labels is not None and not labels.classes


CANARIES: tuple[Feature, ...] = (
    of_shared_model(
        "audit.canaries",
        lambda recipe: recipe.audit is not None,
        summary="drawn rows in training by secret coins, so that an audit can bound epsilon from below",
        papers=(
            Paper(short="Carlini et al. USENIX Security 2019", url="https://arxiv.org/abs/1802.08232"),
            Paper(short="Steinke et al. NeurIPS 2023", url="https://arxiv.org/abs/2305.08846"),
        ),
        clashes=(
            _clash(
                "federation.local_epochs",
                lambda r: r.federation.local_epochs is not None,
                "a pass over a client's rows would be longer by those that it has, and others see how long it is",
                "set federation.local_steps",
            ),
            _clash(
                "semi",
                lambda r: r.semi is not None,
                "every row has a label, and its clients learn from rows that have none",
                "remove it",
            ),
            _clash(
                "teacher",
                lambda r: r.teacher is not None,
                "a teacher would be asked of rows that its clients never had",
                "remove it",
            ),
            _clash(
                "attack.kind",
                lambda r: r.attack is not None and r.attack.facts.on == "rows",
                "liars would change the rows that are to be found again",
                "use an attack of messages, or remove it",
            ),
            _clash(
                "optimizer.name",
                lambda r: r.method.asks_only,
                "a prompt that is found by asking learns hardly anything of a row, and the audit does not read it",
                "use an optimizer with gradients",
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.local_params,
                "one model is asked, of which a part never leaves its client here",
                "use another federation.aggregate",
            ),
            _clash(
                "task",
                _unnamed,
                "a label is drawn among classes, and the task has none",
                "remove audit.canaries, or use task: classify or chat",
            ),
        ),
    ),
)
