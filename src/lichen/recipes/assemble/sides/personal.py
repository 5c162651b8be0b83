"""Makes of the section ``personal`` what clients train beside the shared model, and what is scored of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.personal.apfl import Apfl
from lichen.clients.personal.ditto import Ditto
from lichen.clients.personal.fedala import FedAla
from lichen.clients.personal.fedalt import FedAlt, FedAltModels
from lichen.clients.personal.feddpa import FedDpa, FedDpaAfterwards
from lichen.clients.personal.norms import NORMS, refuse_norms
from lichen.clients.personal.own_model import OwnModel, made_of
from lichen.clients.personal.pair import refuse_no_factors
from lichen.clients.personal.training import OwnModels, Personal, PersonalMethod, PersonalTraining
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientWork
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.core.tree import Tree
from lichen.data.batches.rows import Shard, pooled
from lichen.models.cohort import Cohort
from lichen.recipes.assemble.sides.server import ServerSide, participants
from lichen.recipes.schema.recipe import Recipe

__all__ = [
    "afterwards",
    "judged_by_own",
    "judging",
    "judging_own",
    "keeps_own",
    "looked_at",
    "model_of_client",
    "norms_of",
    "refuse_personal",
    "rows_of_others",
    "stages_of",
    "trains_own",
    "with_personal",
]


def method_of(server: ServerSide) -> PersonalMethod | None:
    """What clients train beside the shared tensors in every round; None where they train nothing so."""
    config = server.recipe.personal
    if config is None:
        return None
    if config.kind == "ditto":
        return Ditto(config.mu)
    if config.kind == "apfl":
        return Apfl(alpha=config.alpha, rate=config.alpha_rate)
    if config.kind == "fedala":
        return FedAla(layers=config.layers, steps=config.start_steps, rate=config.start_rate)
    return dual_of(server) if config.in_turns else None


def dual_of(server: ServerSide) -> FedDpa | None:
    """The pair of a shared and an own adapter whose weight follows from the row, where the recipe has it."""
    config = server.recipe.personal
    if config is None or config.kind != "feddpa":
        return None
    model = server.model
    assert isinstance(model, Cohort)  # LoRA's factors are trained of no other
    width = model.row_width if config.anchors else 0
    return FedDpa(cap=config.cap, anchors=config.anchors, states=model.row_states, width=width)


def trains_local_adapter(recipe: Recipe) -> bool:
    """Whether clients train an adapter of their own on and on, and never begin from the shared one."""
    return recipe.personal is not None and recipe.personal.kind == "fedalt"


def norms_of(recipe: Recipe) -> tuple[str, ...]:
    """Ends of the names of what stays with its client in every round: norms and biases, or nothing."""
    return NORMS if recipe.personal is not None and recipe.personal.kind == "norms" else ()


def refuse_personal(server: ServerSide) -> None:
    """Refuse a kind that makes no difference with what is trained.

    Raises:
        LichenError: naming the key and the fix.
    """
    config = server.recipe.personal
    if norms_of(server.recipe):
        refuse_norms(server.start.trainable)
    if config is not None and config.kind in ("feddpa", "fedalt"):
        refuse_no_factors(server.start.trainable)
    if trains_local_adapter(server.recipe) and participants(server) < 2:
        what = "with one client in a round there is no rest of the world"
        raise LichenError(what, where="personal.kind", fix="set federation.clients_per_round to 2 or more")


def trains_own(recipe: Recipe) -> bool:
    """Whether clients train tensors of their own in the rounds, beside the shared model that all are scored with."""
    return recipe.personal is not None and recipe.personal.in_rounds


def judged_by_own(recipe: Recipe) -> bool:
    """Whether the best round is chosen by the clients' own models, since nobody uses the shared one as it is."""
    return bool(norms_of(recipe)) or trains_local_adapter(recipe)


def keeps_own(recipe: Recipe) -> bool:
    """Whether clients keep tensors of the model from round to round, so that the best round's must stay."""
    return bool(recipe.aggregation.local_params) or trains_own(recipe)


def with_personal(server: ServerSide, work: ClientWork) -> ClientWork:
    """A method's training, with the clients' own beside it, or in its place, where the recipe has that."""
    if isinstance(work, Train) and trains_local_adapter(server.recipe):
        return FedAlt(work, participants(server))
    method = method_of(server)
    return work if method is None else PersonalTraining(work, method)


def afterwards(server: ServerSide, train: Train) -> ClientWork:
    """What trains in the stages after the rounds: the client's own copy, or its own adapter beside the shared one."""
    dual = dual_of(server)
    return train if dual is None else FedDpaAfterwards(train, dual)


def judging_own(server: ServerSide, *, use_best: bool = False) -> ClientWork:
    """The evaluation of clients' own models; who has none yet has the shared one."""
    model = server.model
    dual, mixed = dual_of(server), FedAltModels() if trains_local_adapter(server.recipe) else None
    form = dual.form if dual is not None else None if mixed is None else mixed.form
    own = Evaluate(model, personal=True, use_best=use_best, form=form)
    maker: OwnModels | None = method_of(server) if mixed is None else mixed
    return own if maker is None else Personal(own, maker)


def model_of_client(recipe: Recipe, shared: Tree, own_C: Tree) -> OwnModel:
    """What one client's private state ``(1, ...)`` makes of the shared tensors."""
    config = recipe.personal
    if config is None:
        return made_of(None, shared, own_C, cap=0.0, anchors=0)
    return made_of(config.kind, shared, own_C, cap=config.cap, anchors=config.anchors)


def stages_of(recipe: Recipe) -> dict[str, int]:
    """Steps of each stage of training after the rounds, by the end of its work's name; none without such a stage."""
    config = recipe.personal
    if config is None or not config.afterwards:
        return {}
    return {f"/{stage}": after - before for stage, (before, after) in enumerate(pairwise((0, *config.steps)))}


def judging(server: ServerSide) -> dict[str, ClientWork]:
    """The works that look at clients' own models and at the shared one beside them, by name."""
    config, model = server.recipe.personal, server.model
    if config is None:
        return {}
    finetuned, dual = bool(stages_of(server.recipe)), dual_of(server)
    own = judging_own(server, use_best=finetuned)
    works: dict[str, ClientWork] = {"personal.test": own}
    if finetuned:
        works["personal.valid"] = KeepBest(model, None if dual is None else dual.form)
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
