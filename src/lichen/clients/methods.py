"""Every way a client trains that a recipe can name: what it needs and allows, its paper, and how it is made.

Nothing heavy is imported before a method is made, so that recipes are read fast. How to add a method of your own, in
this table or by the entry point ``lichen.client_methods``: :mod:`lichen.declared` and ``docs/extending.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lichen.clients.method import DECIDES, ClientMethod, ClientSettings, Works
from lichen.declared import Family, Need, Paper, Property

if TYPE_CHECKING:
    from lichen.clients.training.kseed_replay import KSeedReplay
    from lichen.core.contracts.server import Aggregator, ServerOptimizer
    from lichen.core.wire.shared import Shared

__all__ = ["DILOCO", "METHODS"]


def _gradients(settings: ClientSettings) -> Works:
    return Works(settings.train)


def _mezo(settings: ClientSettings) -> Works:
    from lichen.clients.training.mezo import ZerothOrder

    train = ZerothOrder(
        settings.model,
        lr=settings.lr,
        eps=settings.eps,
        clip=settings.clip,
        freeze_schedule=settings.train.freeze_schedule,
        weigh_by=settings.weigh_by,
    )
    return Works(train)


def _replay(settings: ClientSettings) -> KSeedReplay:
    from lichen.clients.training.kseed_replay import KSeedReplay

    return KSeedReplay(settings.start.trainable, lr=settings.lr, root=settings.seed, count=settings.directions)


def _kseed(settings: ClientSettings) -> Works:
    from lichen.clients.training.kseed import FedKSeed, ReplayedWork

    # One replay for all that a node does at this rate: it keeps the last version's tensors.
    replay = _replay(settings)
    clip = {} if settings.clip is None else {"clip": settings.clip}
    train = FedKSeed(
        settings.model, replay, steps=settings.local_steps, eps=settings.eps, weigh_by=settings.weigh_by, **clip
    )
    return Works(train, ReplayedWork(settings.evaluate, replay))


def _kseed_sums(settings: ClientSettings) -> Aggregator:
    from lichen.server.kseed import SeedSums

    return SeedSums(settings.directions, weighting=settings.weighting)


def _kseed_server() -> ServerOptimizer:
    from lichen.server.kseed import KSeedOptimizer

    return KSeedOptimizer()


def _cma(settings: ClientSettings) -> Works:
    from lichen.clients.training.fedbpt import BlackBox

    return Works(BlackBox(settings.model, population=settings.population))


def _cma_aggregator(settings: ClientSettings) -> Aggregator:
    from lichen.server.evolution import Evolution

    return Evolution(settings.weighting)


def _kseed_initial(settings: ClientSettings) -> Shared:
    from lichen.core.wire.shared import Shared

    return Shared(_replay(settings).shared())


def _kseed_tensors(settings: ClientSettings, shared: Shared) -> Shared:
    from lichen.core.wire.shared import Shared

    return Shared(_replay(settings).tree(shared.trainable))


def _cma_initial(settings: ClientSettings) -> Shared:
    import torch

    from lichen.core.wire.shared import Shared

    return settings.start | Shared({"std": torch.full_like(settings.start.trainable["std"], settings.lr)})


def _scaffold(settings: ClientSettings) -> Works:
    from dataclasses import replace

    from lichen.clients.training.corrections.scaffold import Scaffold
    from lichen.clients.training.gradient_steps import WeightDecay

    train = settings.train
    # The correction comes last of all: the decay that SGD would add is a part of the gradient before it.
    decay = (WeightDecay(train.optimizer.weight_decay),) if train.optimizer.weight_decay else ()
    steps = (*train.gradient_steps, *decay, Scaffold(settings.lr))
    return Works(replace(train, optimizer=replace(train.optimizer, weight_decay=0.0), gradient_steps=steps))


def _scaffold_aggregator(settings: ClientSettings) -> Aggregator:
    from lichen.server.heterogeneity.scaffold import controlled
    from lichen.server.mean import Mean

    return controlled(Mean(settings.weighting), clients=settings.clients)


def _scaffold_initial(settings: ClientSettings) -> Shared:
    from lichen.server.heterogeneity.scaffold import with_controls

    return with_controls(settings.start)


def _feddyn(settings: ClientSettings) -> Works:
    from dataclasses import replace

    from lichen.clients.training.corrections.feddyn import FedDyn

    train = settings.train
    return Works(replace(train, gradient_steps=(*train.gradient_steps, FedDyn(settings.alpha))))


def _feddyn_aggregator(settings: ClientSettings) -> Aggregator:
    from lichen.server.heterogeneity.feddyn import dynamic_mean

    return dynamic_mean(clients=settings.clients)


def _feddyn_server() -> ServerOptimizer:
    from lichen.server.heterogeneity.feddyn import ServerFedDyn

    return ServerFedDyn()


def _fednova(settings: ClientSettings) -> Works:
    from dataclasses import replace

    from lichen.clients.training.corrections.fednova import Reach

    train = settings.train
    reach = Reach(lr=settings.lr, momentum=train.optimizer.momentum, prox=settings.prox)
    return Works(replace(train, gradient_steps=(*train.gradient_steps, reach)))


def _fednova_aggregator(settings: ClientSettings) -> Aggregator:
    from lichen.server.heterogeneity.fednova import normalized
    from lichen.server.mean import Mean

    return normalized(Mean(settings.weighting))


def _moon(settings: ClientSettings) -> Works:
    from lichen.clients.training.corrections.moon import Moon

    return Works(Moon(settings.train, weight=settings.contrast, temperature=settings.temperature))


def _diloco(settings: ClientSettings) -> Works:
    from lichen.clients.training.diloco import Pace, Worker

    pace = Pace(settings.schedule, steps=settings.local_steps, rounds=settings.rounds, warmup=settings.warmup)
    return Works(Worker(settings.train, fragments=settings.fragments, drop=settings.drop, pace=pace))


_PLAIN = frozenset(DECIDES)
_MESSAGES = frozenset(
    {
        Property.SERVER_STEP,
        Property.MEAN_OF_ONE_LAYOUT,
        Property.BOUNDED_SUM,
        Property.CODECS,
        Property.EPOCHS,
        Property.LAYER_TURNS,
        Property.LATE_ANSWERS,
        Property.LOST_ANSWERS,
    }
)
_OWN = frozenset({Property.LOST_ANSWERS})
_PACE = frozenset({"schedule", "warmup"})
_GRADIENTS = _PACE | {"weight_decay", "clip", "prox"}


def _sums(what: str) -> Need:
    """The method's messages are no changes of tensors, and it has an aggregation of its own."""
    return Need(
        Property.PLAIN_MEAN, f"{{me}} {what}, and {{who}} does not", "leave it out", where="federation.aggregate"
    )


METHODS = Family(
    "lichen.client_methods",
    ClientMethod,
    decides=DECIDES,
    members=(
        ClientMethod(
            name="adamw",
            summary="local steps of AdamW (FedAvg; with optimizer.prox FedProx)",
            works=_gradients,
            papers=(Paper(short="McMahan et al. AISTATS 2017", url="https://arxiv.org/abs/1602.05629"),),
            allows=_PLAIN,
            reads=_GRADIENTS,
        ),
        ClientMethod(
            name="sgd",
            summary="local steps of SGD (FedAvg; with optimizer.prox FedProx)",
            works=_gradients,
            papers=(Paper(short="McMahan et al. AISTATS 2017", url="https://arxiv.org/abs/1602.05629"),),
            allows=_PLAIN,
            reads=_GRADIENTS | {"momentum"},
            base="sgd",
        ),
        ClientMethod(
            name="scaffold",
            summary="SCAFFOLD: SGD whose gradients are corrected by how the client's differ from everybody's",
            works=_scaffold,
            papers=(Paper(short="Karimireddy et al. ICML 2020", url="https://arxiv.org/abs/1910.06378"),),
            needs=(Need(Property.PLAIN_MEAN, "{me} goes with mean, not with {who}", "set federation.aggregate: mean"),),
            allows=frozenset(
                {
                    Property.GRADIENTS,
                    Property.SERVER_STEP,
                    Property.EPOCHS,
                    Property.ACCUMULATION,
                    Property.LAYER_TURNS,
                    Property.LOST_ANSWERS,
                }
            ),
            reads=_PACE | {"weight_decay", "clip"},
            base="sgd",
            aggregator=_scaffold_aggregator,
            initial=_scaffold_initial,
        ),
        ClientMethod(
            name="feddyn",
            summary="FedDyn: SGD on a loss that is bent so that all clients' optima lie in one place",
            works=_feddyn,
            papers=(Paper(short="Acar et al. ICLR 2021", url="https://arxiv.org/abs/2111.04263"),),
            needs=(Need(Property.PLAIN_MEAN, "{me} goes with mean, not with {who}", "set federation.aggregate: mean"),),
            allows=frozenset(
                {Property.GRADIENTS, Property.EPOCHS, Property.ACCUMULATION, Property.LOST_ANSWERS},
            ),
            reads=_PACE | {"weight_decay", "clip", "momentum", "alpha"},
            base="sgd",
            aggregator=_feddyn_aggregator,
            server=_feddyn_server,
        ),
        ClientMethod(
            name="fednova",
            summary="FedNova: SGD whose changes are evened out by how far each client's steps reach",
            works=_fednova,
            papers=(Paper(short="Wang et al. NeurIPS 2020", url="https://arxiv.org/abs/2007.07481"),),
            needs=(Need(Property.PLAIN_MEAN, "{me} goes with mean, not with {who}", "set federation.aggregate: mean"),),
            allows=frozenset(
                {
                    Property.GRADIENTS,
                    Property.SERVER_STEP,
                    Property.EPOCHS,
                    Property.ACCUMULATION,
                    Property.LOST_ANSWERS,
                }
            ),
            reads=_GRADIENTS | {"momentum"},
            base="sgd",
            aggregator=_fednova_aggregator,
        ),
        ClientMethod(
            name="moon",
            summary="MOON: SGD that holds a small model's representations near the shared model's",
            works=_moon,
            papers=(Paper(short="Li et al. CVPR 2021", url="https://arxiv.org/abs/2103.16257"),),
            needs=(
                Need(
                    Property.SMALL_MODEL,
                    "{me} reads what enters the last layer of a small model, and {who} is none",
                    "set model.student",
                ),
            ),
            allows=frozenset(
                {
                    Property.GRADIENTS,
                    Property.SERVER_STEP,
                    Property.MEAN_OF_ONE_LAYOUT,
                    Property.CODECS,
                    Property.EPOCHS,
                    Property.ACCUMULATION,
                    Property.LOST_ANSWERS,
                    Property.LATE_ANSWERS,
                }
            ),
            reads=_GRADIENTS | {"momentum", "contrast", "temperature"},
            base="sgd",
        ),
        ClientMethod(
            name="mezo",
            summary="MeZO: one slope a step along a random direction, no backward pass",
            works=_mezo,
            papers=(Paper(short="Malladi et al. NeurIPS 2023", url="https://arxiv.org/abs/2305.17333"),),
            allows=_MESSAGES,
            reads=_PACE | {"clip", "eps"},
        ),
        ClientMethod(
            name="kseed",
            summary="FedKSeed: slopes along known directions, of which only seeds and slopes are sent",
            works=_kseed,
            papers=(Paper(short="Qin et al. ICML 2024", url="https://arxiv.org/abs/2312.06353"),),
            needs=(
                Need(Property.EVERY_WEIGHT, "{me} rebuilds every weight from seeds", "set model.adapter.kind: full"),
                _sums("adds up slopes by direction"),
            ),
            allows=_OWN,
            reads=_PACE | {"clip", "eps", "seeds"},
            aggregator=_kseed_sums,
            server=_kseed_server,
            initial=_kseed_initial,
            tensors=_kseed_tensors,
            agreed_start=True,
            grows_by_steps=True,
        ),
        ClientMethod(
            name="cma",
            summary="FedBPT: a soft prompt is searched by asking the model for answers",
            works=_cma,
            papers=(Paper(short="Sun et al. 2023", url="https://arxiv.org/abs/2310.01467"),),
            needs=(
                Need(
                    Property.SOFT_PROMPT,
                    "{me} searches a soft prompt in task chat",
                    "set model.adapter.kind: prompt",
                ),
                _sums("joins clients' distributions"),
            ),
            allows=_OWN,
            reads=frozenset({"population", "dimensions"}),
            aggregator=_cma_aggregator,
            initial=_cma_initial,
            asks_only=True,
        ),
    ),
)
"""The words of ``optimizer.name``."""

DILOCO = ClientMethod(
    name="true",
    key="federation.keep_optimizer",
    summary="DiLoCo: each client's optimizer goes on in its next round, and many steps lie between two messages",
    works=_diloco,
    papers=(
        Paper(short="Douillard et al. 2023", url="https://arxiv.org/abs/2311.08105"),
        Paper(short="Douillard et al. 2025", url="https://arxiv.org/abs/2501.18512"),
    ),
    needs=(
        Need(Property.SHARED_MODEL, "does not go with an {who}", "remove it"),
        Need(Property.PLAIN_TRAINING, "goes with adamw or sgd, not with {who}", "set optimizer.name: adamw or sgd"),
        Need(
            Property.ONE_LAYOUT,
            "goes with a rule that trains the same every round, not with {who}",
            "set federation.aggregate: mean or fedit",
        ),
    ),
    allows=frozenset(
        {
            Property.GRADIENTS,
            Property.PLAIN_TRAINING,
            Property.SERVER_STEP,
            Property.MEAN_OF_ONE_LAYOUT,
            Property.CODECS,
            Property.LOST_ANSWERS,
        }
    ),
)
"""What ``federation.keep_optimizer`` makes of adamw or sgd."""
