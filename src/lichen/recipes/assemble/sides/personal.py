"""Makes of the section ``personal`` what clients train beside the shared model, and what is scored of it."""

from __future__ import annotations

from itertools import pairwise

from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.personal.apfl import Apfl
from lichen.clients.personal.ditto import Ditto
from lichen.clients.personal.fedala import FedAla
from lichen.clients.personal.norms import NORMS, refuse_norms
from lichen.clients.personal.training import Personal, PersonalMethod, PersonalTraining
from lichen.core.contracts.client import ClientWork
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe

__all__ = [
    "judging",
    "keeps_own",
    "norms_of",
    "refuse_personal",
    "stages_of",
    "trains_own",
    "with_personal",
]


def method_of(recipe: Recipe) -> PersonalMethod | None:
    """What clients train beside the shared tensors in every round; None where they train nothing."""
    config = recipe.personal
    if config is None:
        return None
    if config.kind == "ditto":
        return Ditto(config.mu)
    if config.kind == "apfl":
        return Apfl(alpha=config.alpha, rate=config.alpha_rate)
    if config.kind == "fedala":
        return FedAla(layers=config.layers, steps=config.start_steps, rate=config.start_rate)
    return None


def norms_of(recipe: Recipe) -> tuple[str, ...]:
    """Ends of the names of what stays with its client in every round: norms and biases, or nothing."""
    return NORMS if recipe.personal is not None and recipe.personal.kind == "norms" else ()


def refuse_personal(server: ServerSide) -> None:
    """Refuse a kind that makes no difference with what is trained.

    Raises:
        LichenError: naming the key and the fix.
    """
    if norms_of(server.recipe):
        refuse_norms(server.start.trainable)


def trains_own(recipe: Recipe) -> bool:
    """Whether clients train tensors of their own in the rounds, beside the shared model that all are scored with."""
    return bool(norms_of(recipe)) or method_of(recipe) is not None


def keeps_own(recipe: Recipe) -> bool:
    """Whether clients keep tensors of the model from round to round, so that the best round's must stay."""
    return bool(recipe.aggregation.local_params) or trains_own(recipe)


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
    if norms_of(server.recipe):
        return {"personal.test": Evaluate(model, personal=True)}
    if method is None:
        return {"personal.valid": KeepBest(model), "personal.test": Evaluate(model, personal=True, use_best=True)}
    return {"personal.test": Personal(Evaluate(model, personal=True), method)}
