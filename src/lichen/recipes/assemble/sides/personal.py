"""Makes of the section ``personal`` what clients train beside the shared model, and what is scored of it."""

from __future__ import annotations

from itertools import pairwise

from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.personal.ditto import Ditto
from lichen.clients.personal.training import Personal, PersonalMethod, PersonalTraining
from lichen.core.contracts.client import ClientWork
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe

__all__ = ["judging", "keeps_own", "method_of", "stages_of", "with_personal"]


def method_of(recipe: Recipe) -> PersonalMethod | None:
    """What clients train beside the shared tensors in every round; None where they train nothing."""
    config = recipe.personal
    if config is None or config.kind == "finetune":
        return None
    return Ditto(config.mu)


def keeps_own(recipe: Recipe) -> bool:
    """Whether clients keep tensors of the model from round to round, so that the best round's must stay."""
    return bool(recipe.aggregation.local_params) or method_of(recipe) is not None


def with_personal(recipe: Recipe, work: ClientWork) -> ClientWork:
    """A method's training, with the clients' own beside it where the recipe has that."""
    method = method_of(recipe)
    return work if method is None else PersonalTraining(work, method)


def stages_of(recipe: Recipe) -> dict[str, int]:
    """Steps of each stage of fine-tuning, by the end of its work's name; none where the recipe has no such stage."""
    config = recipe.personal
    if config is None or config.kind != "finetune":
        return {}
    return {f"/{stage}": after - before for stage, (before, after) in enumerate(pairwise((0, *config.steps)))}


def judging(server: ServerSide) -> dict[str, ClientWork]:
    """The works that look at clients' own models, by name."""
    if server.recipe.personal is None:
        return {}
    method, model = method_of(server.recipe), server.model
    if method is None:
        return {"personal.valid": KeepBest(model), "personal.test": Evaluate(model, personal=True, use_best=True)}
    return {"personal.test": Personal(Evaluate(model, personal=True), method)}
