"""Builds the parts of a recipe: client work, optimizers, samplers, codecs, algorithm.

Here and in :mod:`lichen.recipes.assemble.aggregation` alone. What a word means stands in the part it becomes.

Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lichen.algorithms.average import Average
from lichen.algorithms.semi import AllowEmpty
from lichen.clients.distillation.distill import Distill
from lichen.clients.distillation.selective import Selective
from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.diloco import Pace, Worker
from lichen.clients.training.fedbpt import BlackBox
from lichen.clients.training.fixmatch import FixMatch
from lichen.clients.training.kseed import FedKSeed, ReplayedWork
from lichen.clients.training.kseed_replay import KSeedReplay
from lichen.clients.training.mezo import WeighBy, ZerothOrder
from lichen.clients.training.optimize import ClientOptimizer, lr_factor
from lichen.clients.training.row_weights import ByRows
from lichen.clients.training.train import Train
from lichen.core.contracts import ClientTask, ClientWork, Sampler, ServerOptimizer, ServerState
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.recipes.assemble.aggregation import aggregator_of, freeze_schedule_of, local_params_of
from lichen.recipes.assemble.experiment import Experiment, lr_name, participants
from lichen.recipes.schema.recipe import Recipe
from lichen.server.kseed import KSeedOptimizer
from lichen.server.optimize import ServerAdam, ServerSGD, ServerYogi
from lichen.server.sampling import Everyone, Poisson, Uniform, Weighted, validators
from lichen.transforms.codec import Chain
from lichen.transforms.parse import parse_codecs
from lichen.transforms.uplink import Compressed

__all__ = [
    "algorithm_of",
    "client_tasks",
    "down_of",
    "initial_shared",
    "lr_scale",
    "sampler_of",
    "server_of",
    "stop_of",
    "tensors_of",
    "trainer",
    "validators_of",
]


def client_tasks(experiment: Experiment) -> dict[str, ClientTask]:
    """All that a node of this recipe can be asked to do."""
    fed, personal = experiment.recipe.federation, bool(local_params_of(experiment.recipe))
    local = experiment.training(
        experiment.train,
        batch=fed.batch_size,
        steps=fed.local_steps,
        epochs=fed.local_epochs,
        parts=fed.gradient_accumulation_steps,
    )
    valid, test = experiment.evaluating(experiment.valid), experiment.evaluating(experiment.test)
    out = {
        "valid": ClientTask(work=Evaluate(experiment.model, personal=personal), source=valid),
        "test": ClientTask(work=Evaluate(experiment.model, personal=personal), source=test),
        "alone.valid": ClientTask(work=KeepBest(experiment.model), source=valid),
        "alone.chosen": ClientTask(work=Evaluate(experiment.model, personal=True, use_best=True), source=valid),
        "alone.test": ClientTask(work=Evaluate(experiment.model, personal=True, use_best=True), source=test),
    }
    for lr in experiment.recipe.optimizer.lr:
        out[f"alone {lr_name(lr)}"] = ClientTask(
            work=_accumulating(experiment, trainer(experiment, lr, personal=True)), source=local
        )
        if experiment.recipe.optimizer.name != "kseed":
            out[f"train {lr_name(lr)}"] = ClientTask(work=federated(experiment, lr), source=local)
            continue
        # One replay for all that a node does at this rate: it keeps the last version's tensors.
        replay = replay_of(experiment, lr)
        out[f"train {lr_name(lr)}"] = ClientTask(work=weighed(experiment, seed_steps(experiment, replay)), source=local)
        out[f"valid {lr_name(lr)}"] = ClientTask(work=ReplayedWork(Evaluate(experiment.model), replay), source=valid)
    return out


def replay_of(experiment: Experiment, lr: float) -> KSeedReplay:
    """What turns FedKSeed's sums into the model's tensors."""
    return KSeedReplay(experiment.start, lr=lr, root=experiment.recipe.seed, count=experiment.recipe.optimizer.seeds)


def seed_steps(experiment: Experiment, replay: KSeedReplay) -> FedKSeed:
    """FedKSeed's client."""
    fed, opt = experiment.recipe.federation, experiment.recipe.optimizer
    clip = {} if opt.clip is None else {"clip": opt.clip}
    return FedKSeed(
        experiment.model, replay, steps=fed.fixed_steps, eps=opt.eps, weigh_by=_weigh_by(experiment.recipe), **clip
    )


def _weigh_by(recipe: Recipe) -> WeighBy:
    return "one" if recipe.federation.weighting == "uniform" else "examples"


def initial_shared(experiment: Experiment, lr: float) -> Tree:
    """What the server's shared tensors begin as."""
    if experiment.recipe.optimizer.name == "cma":
        return {**experiment.start, "std": torch.full_like(experiment.start["std"], lr)}
    return replay_of(experiment, lr).shared() if experiment.recipe.optimizer.name == "kseed" else experiment.start


def tensors_of(experiment: Experiment, lr: float, shared: Tree) -> Tree:
    """The model's tensors that shared ones stand for."""
    return replay_of(experiment, lr).tree(shared) if experiment.recipe.optimizer.name == "kseed" else shared


def trainer(experiment: Experiment, lr: float, *, personal: bool = False) -> Train:
    """The recipe's local training by gradients, at one learning rate."""
    recipe, opt = experiment.recipe, experiment.recipe.optimizer
    return Train(
        experiment.model,
        optimizer=ClientOptimizer(
            name="sgd" if opt.name == "sgd" else "adamw", lr=lr, momentum=opt.momentum, weight_decay=opt.weight_decay
        ),
        clip=opt.clip,
        weigh_by=_weigh_by(recipe),
        prox=0.0 if personal else opt.prox,
        personal=personal,
        freeze_schedule=() if personal else freeze_schedule_of(experiment),
        local_params=() if personal else local_params_of(recipe),
    )


def _accumulating(experiment: Experiment, train: Train) -> Train:
    """Training whose source hands over as many micro-batches as the recipe says."""
    return replace(train, accumulate=experiment.recipe.federation.gradient_accumulation_steps)


def weighed(experiment: Experiment, work: ClientWork) -> ClientWork:
    """The work, its message weighed by the client's training rows where the recipe says so."""
    if experiment.recipe.federation.weighting != "rows":
        return work
    return ByRows(work, tuple(shard.size for shard in experiment.train))


def federated(experiment: Experiment, lr: float) -> ClientWork:
    """What a client does in a round, at one learning rate."""
    recipe, fed, opt = experiment.recipe, experiment.recipe.federation, experiment.recipe.optimizer
    work: ClientWork
    if opt.name == "cma":
        work = BlackBox(experiment.model, population=opt.population)
    elif opt.name == "mezo":
        work = ZerothOrder(experiment.model, lr=lr, eps=opt.eps, clip=opt.clip, weigh_by=_weigh_by(recipe))
    elif fed.keep_optimizer:
        pace = Pace(opt.schedule, steps=fed.fixed_steps, rounds=fed.rounds, warmup=opt.warmup)
        work = Worker(trainer(experiment, lr), fragments=fed.stream_fragments, drop=fed.drop_prob, pace=pace)
    else:
        work = with_auxiliary(experiment, _accumulating(experiment, trainer(experiment, lr)))
    work = weighed(experiment, work)
    return Compressed(work, parse_codecs(recipe.wire.up)) if recipe.wire.up else work


def with_auxiliary(experiment: Experiment, train: Train) -> ClientWork:
    """Training that also learns from rows without labels, or takes a teacher's word only where it is worth it."""
    recipe, auxiliary = experiment.recipe, experiment.auxiliary
    if recipe.semi is not None and auxiliary.views is not None:
        semi = recipe.semi
        work = FixMatch(
            train,
            auxiliary.views,
            threshold=semi.threshold,
            weight=semi.weight,
            rows=max((shard.size for shard in auxiliary.rows), default=1) if semi.by_class else None,
            by="received",
            teacher_rounds=semi.teacher_rounds,
            warm=semi.warmup_rounds,
        )
        return Distill(work, answers=auxiliary.answers) if auxiliary.answers else work
    if auxiliary.judge is not None and auxiliary.teacher_label_M is not None:
        return Selective(train, judge=auxiliary.judge, teacher_label_M=auxiliary.teacher_label_M)
    return train


def down_of(recipe: Recipe) -> Chain | None:
    """How changes of the shared tensors are coded on their way to the clients."""
    return parse_codecs(recipe.wire.down) if recipe.wire.down else None


def server_of(recipe: Recipe) -> ServerOptimizer:
    """The recipe's server optimizer."""
    server = recipe.federation.server
    if recipe.optimizer.name == "kseed":
        return KSeedOptimizer()
    if server.name == "sgd":
        return ServerSGD(lr=server.lr, momentum=server.momentum, nesterov=server.nesterov)
    return (ServerAdam if server.name == "adam" else ServerYogi)(lr=server.lr)


def sampler_of(experiment: Experiment) -> Sampler:
    """The recipe's sampler."""
    fed, count = experiment.recipe.federation, participants(experiment)
    if count == len(experiment.train) and fed.sampling != "poisson":
        return Everyone()
    if fed.sampling == "poisson":
        return Poisson(rate=count / len(experiment.train))
    return (Weighted if fed.sampling == "weighted" else Uniform)(count=count)


def validators_of(experiment: Experiment) -> tuple[int, ...]:
    """The clients that validate in the rounds of the federation."""
    most = experiment.recipe.federation.valid_clients
    return validators([shard.size for shard in experiment.valid], most, derive(experiment.recipe.seed, "valid"))


def stop_of(recipe: Recipe) -> Callable[[ServerState], bool]:
    """Whether a column has validated as often without improving as the recipe has patience for."""
    fed = recipe.federation
    patience, every = fed.patience, fed.valid_every

    def stop(state: ServerState) -> bool:
        if patience is None or state.best_round < 1:
            return False
        return state.round // every - state.best_round // every >= patience

    return stop


def lr_scale(recipe: Recipe, rounds: int) -> Callable[[int], float]:
    """Factor on the learning rate by round."""
    opt, fed = recipe.optimizer, recipe.federation
    warmup = opt.warmup // fed.fixed_steps if fed.keep_optimizer else opt.warmup  # which counts a DiLoCo worker's steps
    return lambda r: lr_factor(opt.schedule, r, rounds, warmup=warmup)


def algorithm_of(experiment: Experiment, lr: float, until: int) -> Average:
    """The federation at one learning rate, up to round ``until``."""
    fed = experiment.recipe.federation
    return Average(
        # Rows without a label may leave every client of a round with nothing to send.
        aggregator=AllowEmpty(aggregator_of(experiment, lr))
        if experiment.recipe.semi is not None
        else aggregator_of(experiment, lr),
        optimizer=server_of(experiment.recipe),
        sampler=sampler_of(experiment),
        weight_N=torch.tensor([s.size for s in experiment.train], dtype=torch.float64),
        rounds=until,
        work=f"train {lr_name(lr)}",
        valid=f"valid {lr_name(lr)}" if experiment.recipe.optimizer.name == "kseed" else "valid",
        valid_every=fed.valid_every,
        validators=validators_of(experiment),
        personal=bool(local_params_of(experiment.recipe)),
        # A DiLoCo worker's rate follows its own steps.
        lr_scale=(lambda _: 1.0) if fed.keep_optimizer else lr_scale(experiment.recipe, fed.rounds),
        base=experiment.model.base,
        down=down_of(experiment.recipe),
        agreed=True,
        capacity=experiment.capacity,
    )
