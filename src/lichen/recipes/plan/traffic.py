"""Counts the bytes of a federation before it runs.

They are exact where shapes are: jobs are built from the tensors a run starts from, for the clients its sampler will
invite, and a message is one that came back. Two patches grow with the rounds by as much as clients differ, and have a
bound instead: a round of FedEx adds at most (P + 2) r to a patch's rank and one of FLoRA at most P r, and a patch as
large as its layer is held dense.

Legend: P clients of a round, r rank, m rows and n columns of a layer's weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lichen.clients.evaluation.gradient import Gradient
from lichen.clients.evaluation.own_value import SHARE, OwnValue
from lichen.clients.masking.masked import Masked
from lichen.core.conventions.factor_pairs import factor_names, layers_with_factors
from lichen.core.fold import BEST
from lichen.core.message import Job, size, sizes
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.parts import algorithm_of, initial_shared, validators_of, works_of
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.assemble.sides.valuing.works import GRADIENT, OWN_VALUE
from lichen.recipes.plan.workload import evaluations, marks

__all__ = ["TrafficEstimate", "first_order", "traffic"]

HEADER = 256
"""Bytes of a tensor's name and shape in a job, at most."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficEstimate:
    """Bytes of the federated column, as the run's summary counts them.

    Attributes:
        client_up: From one client, for one training.
        client_down: To one client, for one training.
        round_up: From all clients in a round, validation included, on average.
        round_down: To all of them.
        up: In all.
        down: In all.
        valid_up: Of ``up``, those of validation.
        valid_down: Of ``down``, those of validation.
        validators: Clients that validate.
        bound: Whether what goes down is at most this much, and not exactly.
    """

    client_up: int
    client_down: int
    round_up: int
    round_down: int
    up: int
    down: int
    valid_up: int = 0
    valid_down: int = 0
    validators: int = 0
    bound: bool = False


def _patch_bytes(start: Tree, rounds: int, adapters: int) -> int:
    """A growing patch after so many rounds, at most."""
    total = 0
    for layer in layers_with_factors(start):
        a_ri, b_or = (start[name] for name in factor_names(layer))
        m, n, rank = b_or.shape[0], a_ri.shape[1], a_ri.shape[0]
        grown = rounds * min(adapters * rank, m, n)
        total += min(grown * (m + n), m * n) * a_ri.element_size() + 2 * HEADER
    return total if rounds else 0


def first_order(server: ServerSide, shared: Shared, invited: int) -> tuple[int, int]:
    """Bytes ``(up, down)`` of a gradient, and under masks of a job for each client of a round, which values itself.

    Args:
        server: The server's side.
        shared: The tensors.
        invited: Clients of a round.
    """
    recipe, value = server.recipe, server.recipe.value
    judges = validators_of(server) if value is not None and value.rows == "valid" else ()
    base, works, lr = server.model.base, works_of(server), lr_name(recipe.optimizer.lr[0])

    def job(work: str, tensors: Shared, *clients: int, **settings: float) -> Job:
        return Job(work=work, shared=tensors, version=1, clients=clients, seed=0, base=base, settings=settings)

    up = down = 0
    if judges:
        request = job(GRADIENT, shared.for_model, 0)
        work = works[GRADIENT]
        if isinstance(work, Masked):
            stages = work.sizes(request)
            up += len(judges) * sum(u for u, _ in stages)
            down += len(judges) * (sum(d for _, d in stages) + sizes(request))
        else:
            assert isinstance(work, Gradient)
            up += len(judges) * size(work.final(work.init(request, (0,), None))[0])
            down += len(judges) * sizes(request)
    own = works.get(f"{OWN_VALUE} {lr}")
    if isinstance(own, OwnValue):
        sent = job(f"{OWN_VALUE} {lr}", Shared(shared.trainable), 0, **{SHARE: 1.0})
        up += invited * size(own.final(own.init(sent, (0,), None))[0])
        down += invited * sizes(sent)
    return up, down


def traffic(
    experiment: Experiment, invited: Sequence[Sequence[int]], *, train_up: int, score_up: int
) -> TrafficEstimate:
    """The bytes of the federated column at the learning rate that is chosen.

    Args:
        experiment: The recipe's.
        invited: The clients of every round.
        train_up: Bytes of one client's message after training.
        score_up: Bytes of one after validation.
    """
    recipe = experiment.recipe
    # A job is called by its rate, and no one knows which will be chosen: the longest name is the most it can take.
    lr = max(recipe.optimizer.lr, key=lambda rate: len(lr_name(rate)))
    open_names = len({len(lr_name(rate)) for rate in recipe.optimizer.lr}) > 1
    algorithm = algorithm_of(experiment.server, lr, recipe.federation.rounds)
    shared, downlink = initial_shared(experiment.server, lr), algorithm.downlink
    state = downlink.init(shared, len(experiment.server.roster), first=True)

    def down(work: str, clients: Sequence[int], **settings: float) -> int:
        """Bytes of a job that all of these clients answer."""
        nonlocal state
        base = experiment.model.base
        sent = shared if settings else shared.for_model
        job = Job(work=work, shared=sent, version=0, clients=tuple(clients), seed=0, base=base, settings=settings)
        jobs = downlink.jobs(job, state, whole=not settings)
        for one in jobs:
            state = downlink.acknowledge(one, one.clients, state)
        return sum(map(sizes, jobs))

    def whole(work: str, clients: Sequence[int]) -> int:
        """Bytes of a job that brings every tensor of a coalition's model."""
        base = experiment.model.base
        return sizes(Job(work=work, shared=shared.for_model, version=0, clients=tuple(clients), seed=0, base=base))

    grown = recipe.aggregation.patch
    adapters = max(map(len, invited)) + (grown or 0)
    _, seen = marks(experiment, recipe.federation.rounds)
    seen = seen if algorithm.valid is not None else [0] * len(seen)
    up = total = patch = plain = valid_up = valid_down = 0
    judges = validators_of(experiment.server) if any(seen) else ()
    settings = {"lr_scale": 1.0, **({BEST: -1.0} if algorithm.personal else {})}
    for r, (who, validated) in enumerate(zip(invited, seen, strict=True), start=1):
        sent = down(algorithm.work, who, **settings)
        up, total, plain = up + len(who) * train_up, total + sent + len(who) * patch, plain + sent
        patch = _patch_bytes(experiment.start.trainable, r, adapters) if grown is not None else 0
        if state:
            view = downlink.snapshot(shared, state)
            moved = {name: x + 1 if x.is_floating_point() else x for name, x in view.flat().items()}
            state = downlink.advance(Shared.of_flat(moved), state, 0)
        if validated:
            valid_up += len(judges) * score_up
            valid_down += down(str(algorithm.valid), judges) + len(judges) * patch
    value, judged = recipe.value, evaluations(recipe, invited, [1] * len(invited))
    if value is not None and value.rows == "valid":
        clients = validators_of(experiment.server)
        valid_up += judged * len(clients) * score_up
        valid_down += judged * (whole("valid", clients) + len(clients) * patch)
        if value.kind == "first":
            more_up, more_down = first_order(experiment.server, shared, 0)
            valid_up += judged * more_up
            valid_down += judged * (more_down + len(clients) * patch)
    rounds, up, total = recipe.federation.rounds, up + valid_up, total + valid_down
    return TrafficEstimate(
        client_up=train_up,
        client_down=round(plain / max(1, sum(map(len, invited)))),
        round_up=round(up / rounds),
        round_down=round(total / rounds),
        up=up,
        down=total,
        valid_up=valid_up,
        valid_down=valid_down,
        validators=len(judges),
        bound=grown is not None or open_names or (value is not None and value.kind == "gtg"),
    )
