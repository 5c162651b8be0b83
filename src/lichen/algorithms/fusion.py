"""FedDF: averages each architecture, then distils all of them from the ensemble of the clients' models.

A round: every kind's clients train from their kind's model and send the difference; the server averages
within the kind, and lets each model that came answer unlabelled rows of its own. The mean of all answers
teaches every kind's average for some steps, so that what one architecture's clients learnt reaches the
others. Up and down go weights, as in averaging; the unlabelled rows, and the answers, stay at the server.

The server does a client's work here: it answers and is taught by the same folds as clients are
(:class:`lichen.clients.distillation.predict.Predict`, :class:`lichen.clients.training.train.Train`), over stations of
its own. It needs the single models, if only to look at each once, so this does not run under masks.

The state is flat: tensor ``w`` of kind ``a`` is ``a/w``.

References:
    Tao Lin, Lingjing Kong, Sebastian U. Stich and Martin Jaggi. "Ensemble Distillation for Robust Model
    Fusion in Federated Learning." NeurIPS 2020. https://arxiv.org/abs/2006.07242

Legend: C clients, N clients of the roster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.algorithms.exchange import Architectures, by_architecture, check_architectures, means, score_architectures
from lichen.algorithms.plan import transforms_of
from lichen.algorithms.scores import SUMMED, Center, is_validated, summed, with_best
from lichen.core import tree as trees
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator, Sampler, ServerOptimizer
from lichen.core.errors import LichenError
from lichen.core.fold import fold
from lichen.core.message import Job, Message
from lichen.core.replies import Attendance
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["Fusion", "join_architectures", "of_architecture"]


def join_architectures(by_arch: Mapping[str, Tree]) -> Shared:
    """All kinds' trainable tensors together.

    >>> sorted(join_architectures({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}).trainable)
    ['a/w', 'b/w']
    """
    return Shared({f"{arch}/{name}": x for arch, tree in by_arch.items() for name, x in tree.items()})


def of_architecture(shared: Shared, arch: str) -> Shared:
    """One kind's tensors out of :func:`join_architectures`'s."""
    return Shared(trees.split(shared.trainable, f"{arch}/")[0])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """Train, average within a kind, agree across kinds, distil.

    Attributes:
        architectures: The clients of each architecture; their client tasks are ``<work>/<arch>``.
        predict: The server's own, by kind: a personal ``Predict`` over the unlabelled rows, which any
            client number may be asked.
        distil: The server's own, by kind: a ``Train`` over those rows with answers, as client 0.
        aggregator: Folds one kind's messages into one change.
        optimizer: Steps with it, over all kinds' tensors.
        ensemble: Makes one opinion of the models'.
        sampler: Invites from the roster.
        weight_N: Examples of every client, for the sampler.
        rounds: Rounds in all; the last is always validated.
        work: The clients' training work.
        valid: Their validating work; None for none.
        valid_every: Rounds between validations; the best validated ``shared`` is kept.
        validators: Clients that validate; None: all of them.
        valid_average: How their losses become one.
        admission: What counts of what clients send.
        lr_scale: Factor on the clients' learning rate in round r (from 0).

    Raises:
        LichenError: if a client has no architecture, or two, the server lacks a task of a kind, or clients'
            messages are transformed on their way.
    """

    architectures: Architectures
    predict: Mapping[str, ClientTask]
    distil: Mapping[str, ClientTask]
    aggregator: Aggregator
    optimizer: ServerOptimizer
    ensemble: Aggregator
    sampler: Sampler
    weight_N: Tensor
    rounds: int
    work: str = "train"
    valid: str | None = "valid"
    valid_every: int = 1
    validators: tuple[int, ...] | None = None
    valid_average: Center = "mean"
    admission: Admission = OPEN
    lr_scale: Callable[[int], float] = lambda _: 1.0

    def __post_init__(self) -> None:
        check_architectures(self.architectures, self.weight_N.shape[0])
        for name, there in (("predict", self.predict), ("distil", self.distil)):
            missing = sorted(self.architectures.keys() - there.keys())
            if missing:
                raise LichenError(
                    f"the server cannot {name} with {missing[0]!r}",
                    where="fusion",
                    fix="give a client task for every kind",
                )
        for arch in self.architectures:
            for transform in transforms_of(self.admission.works.get(f"{self.work}/{arch}")):
                raise LichenError(
                    "a fusion looks at every model by itself, and has no total of all for a transform's last half",
                    where=transform.key,
                    fix=f"leave out {transform.key}, or average one architecture",
                )

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round, from :func:`join_architectures`'s tensors."""
        return ServerState(round=0, shared=shared, optimizer=self.optimizer.init(shared))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round. A round nobody comes to changes nothing but its number."""
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        clients = self.sampler.invite(self.weight_N, derive(seed, "invite"))
        change, agreed, metrics, client_metrics, attendance = self._train(state, engine, clients, seed)
        sums, learned = summed(client_metrics)
        metrics.update(learned)
        if change:
            shared, optimizer = self.optimizer.update(change, state.optimizer, state.shared)
            state = replace(state, shared=shared, optimizer=optimizer)
            answers, aggregated = self.ensemble.close(agreed, Shared())
            metrics.update(aggregated)
            state = replace(state, shared=self._distil(state, answers, derive(seed, "distil")))
        state = replace(state, round=state.round + 1)
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if self.valid and is_validated(state.round, self.valid_every, self.rounds):
            judges = tuple(range(self.weight_N.shape[0])) if self.validators is None else self.validators
            judging = Job(work=self.valid, shared=Shared(), version=state.round, clients=judges, seed=0)
            shared = state.shared
            found = score_architectures(
                engine,
                judging,
                self.architectures,
                lambda arch: of_architecture(shared, arch),
                admission=self.admission,
            )
            metrics.update(means(self.architectures, *found, self.valid_average))
            state = with_best(state, metrics["valid"], shared)
        return state, Report(
            round=state.round,
            clients=clients,
            metrics=metrics,
            tokens=int(sums["tokens"]),
            bytes_up=engine.bytes_up - up,
            bytes_down=engine.bytes_down - down,
            seconds=time.perf_counter() - start,
            valid_up=engine.bytes_up - trained_up,
            valid_down=engine.bytes_down - trained_down,
            attendance=attendance,
        )

    def _train(
        self, state: ServerState, engine: Engine, clients: tuple[int, ...], seed: int
    ) -> tuple[Shared, Any, dict[str, float], Tree, Attendance]:
        """``(change of all, the ensemble's total, metrics, sums by client, who came)``; no change where nobody did."""
        settings = {"lr_scale": self.lr_scale(state.round)}
        change, aggregated, client_metrics = dict[str, Tree](), dict[str, float](), []
        agreed, attendance = self.ensemble.zero(), Attendance()

        def ask(message: Message, job: Job) -> None:
            nonlocal agreed
            agreed = self.ensemble.add(agreed, self._opinion(job.work.removeprefix(f"{self.work}/"), message, job))

        for arch, some in by_architecture(self.architectures, clients):
            shared = of_architecture(state.shared, arch)
            job = Job(
                work=f"{self.work}/{arch}",
                shared=shared,
                version=state.round,
                clients=some,
                seed=seed,
                settings=settings,
            )
            came = collect(engine, [job], self.aggregator, admission=self.admission, keep=SUMMED, seen=ask)
            attendance += came.attendance
            seen = came.metrics
            client_metrics.append(seen)
            if seen and float(seen["failed"].sum()) < came.attendance.arrived:
                step, closed = self.aggregator.close(came.total, shared)
                change[arch] = step.trainable
                aggregated = {name: aggregated.get(name, 0.0) + value for name, value in closed.items()}
        agreed = engine.merge(self.ensemble, agreed)
        return (
            join_architectures(change),
            agreed,
            aggregated,
            trees.concatenate(sums) if (sums := [one for one in client_metrics if one]) else {},
            attendance,
        )

    def _opinion(self, arch: str, message: Message, job: Job) -> Message:
        """What the models that came say of the server's rows; one that failed, or has no rows, weighs nothing."""
        params_C = trees.join(
            "params/", trees.add(trees.broadcast(job.shared.trainable, len(message.client_C)), message.tensors), {}
        )
        query = replace(job, clients=tuple(message.client_C.tolist()))
        predict = self.predict[arch]
        rows = predict.source.batches(query.clients, query.seed)
        opinion, _ = fold(predict.work, rows, query, query.clients, params_C)
        weight_C = torch.where(message.weight_C > 0, opinion.weight_C, torch.zeros_like(opinion.weight_C))
        return replace(opinion, weight_C=weight_C)

    def _distil(self, state: ServerState, answers: Shared, seed: int) -> Shared:
        """Every kind's tensors after some steps on the ensemble's answers."""
        shared = state.shared
        for arch in self.architectures:
            mine = of_architecture(shared, arch)
            job = Job(work="distil", shared=mine | answers, version=state.round, clients=(0,), seed=derive(seed, arch))
            distil = self.distil[arch]
            message, _ = fold(distil.work, distil.source.batches(job.clients, job.seed), job, job.clients)
            shared |= join_architectures({arch: trees.add(mine.trainable, trees.take(message.tensors, 0))})
        return shared
