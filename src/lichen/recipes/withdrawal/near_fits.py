"""Which runs a client can be unlearned from by an approximation, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

from lichen.core.collecting.history import History
from lichen.core.errors import LichenError
from lichen.declared import Property
from lichen.recipes.assemble.aggregation import local_params_of
from lichen.recipes.assemble.sides.personal import norms_of
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["require_messages", "require_rounds"]


def require_rounds(recipe: Recipe, folder: Path, how: str) -> None:
    """Nothing, where rounds of plain training have made the model.

    Args:
        recipe: The run's.
        folder: The run's.
        how: ``eraser``, ``negate`` or ``npo``.

    Raises:
        LichenError: what stands in the way, and what can be done instead.
    """
    where = str(folder)
    if not task_of(recipe.task).procedure.rounds or recipe.exchange or recipe.method.asks_only:
        what = f"{how} changes a model that all have trained in rounds, and this run has none"
        raise LichenError(what, where=where, fix="use --how subtract or replay")
    fed = recipe.federation
    others = {
        "help of teacher, synthetic or semi": recipe.has_help,
        "federation.repair": fed.repair is not None,
        "a part of the model that stays with its client": bool(local_params_of(recipe) or norms_of(recipe)),
        "the section personal": recipe.personal is not None,
        "noise": recipe.noised is not None,
        "masks": recipe.masked is not None,
        f"federation.fair: {fed.fair}": fed.fair != "none",
        f"federation.reward: {fed.reward}": fed.reward != "none",
        "a robust rule that trusts rows of the server": fed.robust is not None and fed.robust.asks_server,
        f"federation.schedule.kind: {fed.schedule.kind}": fed.schedule.kind != "synchronous",
        f"optimizer.name: {recipe.optimizer.name}": Property.PLAIN_TRAINING not in recipe.method.allows,
        "federation.keep_optimizer": fed.keep_optimizer,
        "a stream": recipe.streams,
        "the section split": recipe.split is not None,
    }
    for name, there in others.items():
        if there:
            raise LichenError(f"{how} takes plain rounds, and there is {name}", where=where, fix="use --how replay")
    if how == "npo" and recipe.prefers:
        what = "npo lowers the likelihood of one answer a row, and a row of task prefer has two"
        raise LichenError(what, where=where, fix="use --how replay")


def require_messages(recipe: Recipe, folder: Path, how: str, history: History) -> None:
    """Nothing, where the messages are there that a way works by, or it works by none.

    Args:
        recipe: The run's.
        folder: The run's.
        how: ``eraser``, ``negate`` or ``npo``.
        history: Of its federated column.

    Raises:
        LichenError: what stands in the way, and what can be done instead.
    """
    where, fed = str(folder), recipe.federation
    if how == "npo":
        return
    if not fed.history or not history.rounds():
        fix = "use --how npo or replay; the next run keeps them with federation.history: true"
        raise LichenError(f"kept no messages, by which {how} works", where=where, fix=fix)
    if how == "negate" and (fed.server.name != "sgd" or fed.server.momentum):
        by = "momentum" if fed.server.name == "sgd" else fed.server.name
        what = f"the server stepped by {by}, and no client's share of its steps is a sum of its changes"
        raise LichenError(what, where=where, fix="use --how eraser, npo or replay")
    if how == "negate" and (recipe.rule not in ("mean", "fedit", "ffa") or fed.robust is not None):
        what = "the change of a round was no plain mean, and no client's share of it is a sum of its changes"
        raise LichenError(what, where=where, fix="use --how eraser, npo or replay")
