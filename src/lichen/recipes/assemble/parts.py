"""Builds the parts of a recipe: client work, optimizers, samplers, codecs, algorithm.

Here and in :mod:`lichen.recipes.assemble.aggregation` alone. What a word means stands in the part it becomes.

Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lichen.algorithms.average import Average
from lichen.clients.distillation.distill import Distill
from lichen.clients.distillation.private_models import ConcatSource
from lichen.clients.distillation.selective import Selective
from lichen.clients.distillation.teacher_labels import NoBatches
from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.evaluation.metrics import accuracy
from lichen.clients.method import ClientSettings
from lichen.clients.methods import METHODS
from lichen.clients.statistics.declare import Declare
from lichen.clients.training.fix_and_mix import FixAndMix
from lichen.clients.training.fixmatch import FixMatch
from lichen.clients.training.gradient_step import GradientStep
from lichen.clients.training.gradient_steps import Clip, Proximal
from lichen.clients.training.optimize import ClientOptimizer, lr_factor
from lichen.clients.training.row_weights import ByRows
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask, ClientWork, Dialogue, Source
from lichen.core.contracts.server import Aggregator
from lichen.core.seeds import derive
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import Shard, TrainSource
from lichen.present.target import ACCURACY
from lichen.recipes.assemble.aggregation import (
    aggregator_of,
    downlink_of,
    freeze_schedule_of,
    local_params_of,
    sampler_of,
    schedule_of,
    server_of,
    weighting_of,
)
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.sides.attack import lying
from lichen.recipes.assemble.sides.clients import Auxiliary, Secret
from lichen.recipes.assemble.sides.masks import masked, masked_scores
from lichen.recipes.assemble.sides.noise_share import noise_share
from lichen.recipes.assemble.sides.personal import (
    afterwards,
    judged_by_own,
    judging,
    judging_own,
    keeps_own,
    looked_at,
    norms_of,
    stages_of,
    with_personal,
)
from lichen.recipes.assemble.sides.poison import poisoned
from lichen.recipes.assemble.sides.row_privacy import hides_rows, private_source, private_steps
from lichen.recipes.assemble.sides.server import ServerSide, participants
from lichen.recipes.assemble.sides.splitting.works import apart, split_work
from lichen.recipes.assemble.sides.summed_scores import SUMMED_TEST, masked_test, sums_scores
from lichen.recipes.assemble.sides.valuing.works import GRADIENT, OWN_VALUE, remembering, value_works
from lichen.recipes.assemble.workload import warmup_rounds
from lichen.recipes.schema.recipe import Recipe
from lichen.server.allow_empty import AllowEmpty
from lichen.server.sampling import validators
from lichen.transforms.bounds.clip_change import ClipChange
from lichen.transforms.bounds.gate import NormGate
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transform, Transformed
from lichen.transforms.uplink import Coded

__all__ = [
    "algorithm_of",
    "client_tasks",
    "initial_shared",
    "lr_scale",
    "tensors_of",
    "trainer",
    "validators_of",
    "works_of",
]


def works_of(
    server: ServerSide,
    auxiliary: Auxiliary = Auxiliary(),  # noqa: B008
    secret: Secret | None = None,
    state: Path | None = None,
) -> dict[str, ClientWork | Dialogue]:
    """All that clients of this recipe can be asked to do, by name; made without a row.

    Args:
        server: The server's side.
        auxiliary: What clients learn from beside.
        secret: What hides their rows, where they train.
        state: Where they keep files of their own; None: nowhere.
    """
    model, personal = server.model, bool(local_params_of(server.recipe))
    own = judging_own(server) if judged_by_own(server.recipe) else Evaluate(model, personal=personal)
    out: dict[str, ClientWork | Dialogue] = {
        "roster": Declare(server.roster),
        "valid": split_work(server, judged(server, own), "valid"),
        "test": split_work(server, Evaluate(model, personal=personal), "test"),
        "alone.valid": KeepBest(model),
        "alone.chosen": Evaluate(model, personal=True, use_best=True),
        "alone.test": Evaluate(model, personal=True, use_best=True),
    }
    if sums_scores(server.recipe):
        evaluate = Evaluate(model, personal=personal)
        out[SUMMED_TEST] = masked_test(server.recipe, evaluate, len(server.roster))
    out |= value_works(server.recipe, model, len(validators_of(server)), weighting_of(server.recipe), state)
    out |= judging(server)
    for lr in server.recipe.optimizer.lr:
        alone = _accumulating(server, trainer(server, lr, personal=True))
        out |= {f"alone {lr_name(lr)}": alone} | {
            f"personal {lr_name(lr)}{at}": afterwards(server, alone) for at in stages_of(server.recipe)
        }
        works = server.recipe.method.works(settings_of(server, lr))
        work = sent(server, auxiliary, works.train, secret)
        out[f"train {lr_name(lr)}"] = split_work(server, under_masks(server, lr, remembering(server.recipe, work)))
        if works.valid is not None:
            out[f"valid {lr_name(lr)}"] = judged(server, works.valid)
    return out


def under_masks(server: ServerSide, lr: float, work: ClientWork) -> ClientWork | Dialogue:
    """A method's work, its message under masks where the recipe has them."""
    recipe, clients = server.recipe, participants(server)
    if recipe.masked is None:
        return work
    return masked(recipe, work, aggregator_for(server, lr), clients, noise_share(server))


def judged(server: ServerSide, work: ClientWork) -> ClientWork | Dialogue:
    """An evaluation of rounds, its sums under masks where the recipe has them."""
    return masked_scores(server.recipe, work, len(validators_of(server))) if sums_scores(server.recipe) else work


def client_tasks(experiment: Experiment) -> dict[str, ClientTask]:
    """All that a node of this recipe can be asked to do: works, and the rows that they are done with."""
    fed, rows = experiment.recipe.federation, experiment.clients

    def training(shards: Sequence[Shard], own_steps: int | None = None) -> Source:
        parts = fed.gradient_accumulation_steps
        steps, epochs = (fed.local_steps, fed.local_epochs) if own_steps is None else (own_steps, None)
        return experiment.training(shards, batch=fed.batch_size, steps=steps, epochs=epochs, parts=parts)

    local = training(rows.train)
    planted = training(rows.planted) if rows.canaries else local
    lied = poisoned(experiment.server, rows, planted)
    valid, test = experiment.evaluating(rows.valid), experiment.evaluating(rows.test)
    sources: dict[str, Source] = {
        "roster": NoBatches(),
        OWN_VALUE: NoBatches(),
        "train": lied,
        "alone": local,
        "valid": valid,
        "test": test,
    }
    sources |= {"alone.valid": valid, "alone.chosen": valid, "alone.test": test, SUMMED_TEST: test, GRADIENT: valid}
    own_rows = looked_at(experiment.recipe, rows.valid, rows.test)
    sources |= {name: experiment.evaluating(shards) for name, shards in own_rows.items()}
    stages = {at: training(rows.train, steps) for at, steps in stages_of(experiment.recipe).items()}
    if rows.secret is not None and isinstance(planted, TrainSource):
        sources["train"] = private_source(experiment.server, planted, rows.secret.randomness)
    fingerprint = experiment.recipe.fingerprint
    if fingerprint is not None and rows.pairs:
        sources["train"] = ConcatSource((sources["train"], training(rows.pairs, fingerprint.steps)))
    works = works_of(experiment.server, rows.auxiliary, rows.secret, rows.state)

    def source(name: str) -> Source:
        kind, _, rate = name.partition(" ")
        return stages[rate[rate.index("/") :]] if kind == "personal" else sources[kind]

    return {name: ClientTask(work=work, source=apart(work, source(name))) for name, work in works.items()}


def settings_of(server: ServerSide, lr: float) -> ClientSettings:
    """What the recipe tells its client method, at one learning rate."""
    recipe, fed, opt = server.recipe, server.recipe.federation, server.recipe.optimizer
    return ClientSettings(
        model=server.model,
        start=server.start,
        train=_accumulating(server, trainer(server, lr)),
        evaluate=Evaluate(server.model),
        lr=lr,
        clip=opt.clip,
        prox=opt.prox,
        alpha=opt.alpha,
        contrast=opt.contrast,
        temperature=opt.temperature,
        eps=opt.eps,
        population=opt.population,
        directions=opt.seeds,
        seed=recipe.seed,
        steps=fed.local_steps,
        rounds=fed.rounds,
        schedule=opt.schedule,
        warmup=opt.warmup,
        fragments=fed.stream_fragments,
        drop=fed.drop_prob,
        weighting=weighting_of(recipe),
        clients=len(server.roster),
    )


def initial_shared(server: ServerSide, lr: float) -> Shared:
    """What the server's shared tensors begin as."""
    initial = server.recipe.method.initial
    return server.start if initial is None else initial(settings_of(server, lr))


def tensors_of(server: ServerSide, lr: float, shared: Shared) -> Shared:
    """The model's tensors that shared ones stand for."""
    tensors = server.recipe.method.tensors
    return shared.for_model if tensors is None else tensors(settings_of(server, lr), shared)


def trainer(server: ServerSide, lr: float, *, personal: bool = False) -> Train:
    """The recipe's local training by gradients, at one learning rate."""
    recipe, opt = server.recipe, server.recipe.optimizer
    clip: tuple[GradientStep, ...] = () if opt.clip is None else (Clip(opt.clip),)
    return Train(
        server.model,
        optimizer=ClientOptimizer(
            name=METHODS[opt.name].base, lr=lr, momentum=opt.momentum, weight_decay=opt.weight_decay
        ),
        gradient_steps=clip + ((Proximal(opt.prox),) if opt.prox and not personal else ()),
        weigh_by="one" if recipe.federation.weighting == "uniform" else "examples",
        personal=personal,
        freeze_schedule=() if personal else freeze_schedule_of(server),
        local_params=() if personal else (*local_params_of(recipe), *norms_of(recipe)),
    )


def _accumulating(server: ServerSide, train: Train) -> Train:
    """Training whose source hands over as many micro-batches as the recipe says."""
    return replace(train, accumulate=server.recipe.federation.gradient_accumulation_steps)


def weighed(server: ServerSide, work: ClientWork) -> ClientWork:
    """The work, its message weighed by the training rows that the client has declared, where the recipe says so."""
    if server.recipe.federation.weighting != "rows":
        return work
    return ByRows(work, server.roster.rows("train"))


def sent(server: ServerSide, auxiliary: Auxiliary, work: ClientWork, secret: Secret | None = None) -> ClientWork:
    """A method's work as the recipe has it: helped where it trains by gradients alone, weighed, clipped and coded.

    Where noise hides single rows, training is in private steps, which take none without a secret.

    Liars lie before their messages are clipped and coded.
    """
    recipe = server.recipe
    if hides_rows(recipe) and isinstance(work, Train):
        pull = tuple(step for step in work.gradient_steps if not isinstance(step, Clip))  # rows are clipped one by one
        train = replace(work, weigh_by="one", accumulate=1, gradient_steps=pull)
        key, sigma = (None, 0.0) if secret is None else (secret.randomness, secret.sigma)
        work = private_steps(server, train, key, sigma)
    work = with_auxiliary(recipe, auxiliary, work) if isinstance(work, Train) else work
    work = weighed(server, with_personal(server, work))
    work = lying(server, work)
    transforms = transforms_of(recipe)
    return Transformed(work, transforms) if transforms else work


def transforms_of(recipe: Recipe) -> tuple[Transform, ...]:
    """What happens to clients' messages on their way, left to right."""
    wire = recipe.wire
    gate = (NormGate(wire.gate),) if wire.gate is not None else ()
    clip: tuple[Transform, ...] = (ClipChange(wire.clip),) if wire.clip is not None else ()
    config = recipe.privacy
    if config is not None and config.clip is not None and not hides_rows(recipe):
        clip = (ClipChange(config.clip, private=config.noised),)
    coded = (Coded(parse_codecs(wire.up)),) if wire.up else ()
    return (*gate, *clip, *coded)


def with_auxiliary(recipe: Recipe, auxiliary: Auxiliary, train: Train) -> ClientWork:
    """Training that also learns from rows without labels, or takes a teacher's word only where it is worth it."""
    if recipe.semi is not None and auxiliary.views is not None:
        semi, known = recipe.semi, {"threshold": recipe.semi.threshold, "weight": recipe.semi.weight}
        if auxiliary.source is not None:
            return FixAndMix(train, auxiliary.views, auxiliary.source, mixup=semi.mixup, **known)
        by_class = semi.kind == "flexmatch"
        work = FixMatch(
            train,
            auxiliary.views,
            rows=max((shard.size for shard in auxiliary.rows), default=1) if by_class else None,
            unlabelled=auxiliary.unlabelled if by_class else (),
            teacher_rounds=semi.teacher_rounds,
            warm=semi.warmup_rounds,
            **known,
        )
        return Distill(work, answers=auxiliary.answers) if auxiliary.answers else work
    if auxiliary.judge is not None and auxiliary.teacher_label_M is not None:
        return Selective(train, judge=auxiliary.judge, teacher_label_M=auxiliary.teacher_label_M)
    return train


def _accuracy(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of all clients' rows that are right."""
    return {ACCURACY: accuracy(sums["confusion"].sum(0))} if "confusion" in sums else {}


def validators_of(server: ServerSide) -> tuple[int, ...]:
    """The clients that validate in the rounds of the federation."""
    most = server.recipe.federation.valid_clients
    return validators(server.roster.rows("valid"), most, derive(server.recipe.seed, "valid"))


def lr_scale(recipe: Recipe, rounds: int) -> Callable[[int], float]:
    """Factor on the learning rate by round."""
    schedule, warmup = recipe.optimizer.schedule, warmup_rounds(recipe)
    return lambda r: lr_factor(schedule, r, rounds, warmup=warmup)


def summing(server: ServerSide, lr: float) -> Aggregator:
    """The client method's own aggregator, or the one of the recipe's rule."""
    own = server.recipe.method.aggregator
    return aggregator_of(server, lr) if own is None else own(settings_of(server, lr))


def aggregator_for(server: ServerSide, lr: float) -> Aggregator:
    """What closes the sum of a round, and lifts its messages where they are masked."""
    # Rows without a label may leave every client of a round with nothing to send.
    return AllowEmpty(summing(server, lr)) if server.recipe.semi is not None else summing(server, lr)


def algorithm_of(server: ServerSide, lr: float, until: int) -> Average:
    """The federation at one learning rate, up to round ``until``."""
    fed, private = server.recipe.federation, server.recipe.noised is not None
    return Average(
        aggregator=aggregator_for(server, lr),
        optimizer=server_of(server.recipe),
        sampler=sampler_of(server),
        weight_N=server.roster.rows_N("train"),
        rounds=until,
        work=f"train {lr_name(lr)}",
        valid=None if private else "valid" if server.recipe.method.tensors is None else f"valid {lr_name(lr)}",
        steps_always=private and not hides_rows(server.recipe) and server.recipe.masked is None,
        valid_every=fed.valid_every,
        validators=validators_of(server),
        valid_average=fed.judged_by,
        judged=_accuracy if server.recipe.compare.target_metric == "accuracy" else None,
        schedule=schedule_of(server),
        scoring=fed.schedule.scoring_seconds,
        personal=keeps_own(server.recipe),
        # A DiLoCo worker's rate follows its own steps.
        lr_scale=(lambda _: 1.0) if fed.keep_optimizer else lr_scale(server.recipe, fed.rounds),
        base=server.model.base,
        downlink=downlink_of(server),
    )
