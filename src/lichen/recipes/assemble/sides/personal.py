"""Makes of the section ``personal`` what clients train beside the shared model, and what is scored of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.personal.apfl import Apfl
from lichen.clients.personal.ditto import Ditto
from lichen.clients.personal.fedala import FedAla
from lichen.clients.personal.norms import NORMS, refuse_norms
from lichen.clients.personal.training import Personal, PersonalMethod, PersonalTraining
from lichen.core.contracts.client import ClientWork
from lichen.core.seeds import numpy_generator
from lichen.data.batches.rows import Shard, pooled
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe

__all__ = [
    "judging",
    "keeps_own",
    "looked_at",
    "norms_of",
    "refuse_personal",
    "rows_of_others",
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
    """The works that look at clients' own models and at the shared one beside them, by name."""
    config, model = server.recipe.personal, server.model
    if config is None:
        return {}
    method, finetuned = method_of(server.recipe), bool(stages_of(server.recipe))
    plain = Evaluate(model, personal=True, use_best=finetuned)
    own = plain if method is None else Personal(plain, method)
    works: dict[str, ClientWork] = {"personal.test": own}
    if finetuned:
        works["personal.valid"] = KeepBest(model)
    if config.choose:
        works |= {"choose.own": own, "choose.shared": Evaluate(model)}
    if config.others is not None:
        works |= {"others.own": own, "others.shared": Evaluate(model)}
    return works


def looked_at(recipe: Recipe, valid: Sequence[Shard], test: Sequence[Shard]) -> dict[str, Sequence[Shard]]:
    """The rows that each of those works sees, by client.

    Args:
        recipe: The recipe.
        valid: Validation rows by client.
        test: Test rows by client.
    """
    config = recipe.personal
    rows = {"personal.test": test, "personal.valid": valid, "choose.own": valid, "choose.shared": valid}
    if config is not None and config.others is not None:
        others = rows_of_others(test, config.others, recipe.seed)
        rows |= {"others.own": others, "others.shared": others}
    return rows


def rows_of_others(shards: Sequence[Shard], count: int, seed: int) -> tuple[Shard, ...]:
    """So many rows for each client, drawn among those of all others; all of them where there are no more.

    Args:
        shards: Rows by client.
        count: How many are drawn.
        seed: Draws them.
    """
    rows = [(client, row) for client, shard in enumerate(shards) for row in range(shard.size)]
    out = []
    for own, shard in enumerate(shards):
        others = [place for place in rows if place[0] != own]
        rng = numpy_generator(seed, "others", own)
        some = sorted(rng.choice(len(others), size=min(count, len(others)), replace=False).tolist()) if others else []
        picked = [shards[client].between(row, row + 1) for client, row in (others[at] for at in some)]
        out.append(pooled(picked) if picked else shard.between(0, 0))
    return tuple(out)
