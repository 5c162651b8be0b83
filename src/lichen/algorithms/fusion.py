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

from lichen.algorithms.average import is_validated, joined, summed, with_best
from lichen.algorithms.exchange import Kinds, check_kinds, means, parted, score_kinds
from lichen.core import tree as trees
from lichen.core.contracts import Aggregator, ClientTask, Engine, Report, Sampler, ServerOptimizer, ServerState
from lichen.core.errors import LichenError
from lichen.core.fold import fold
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree

__all__ = ["Fusion", "of_kind", "together"]

SUMMED = ("loss_sum", "count", "tokens", "failed")


def together(by_kind: Mapping[str, Tree]) -> Tree:
    """One flat tree of all kinds' tensors.

    >>> sorted(together({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}))
    ['a/w', 'b/w']
    """
    return {f"{kind}/{name}": x for kind, tree in by_kind.items() for name, x in tree.items()}


def of_kind(shared: Tree, kind: str) -> Tree:
    """One kind's tensors out of :func:`together`'s."""
    return trees.split(shared, f"{kind}/")[0]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """Train, average within a kind, agree across kinds, distil.

    Attributes:
        kinds: The clients of each architecture; their stations are ``<work>/<kind>``.
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
        lr_scale: Factor on the clients' learning rate in round r (from 0).

    Raises:
        LichenError: if a client has no architecture, or two, or the server lacks a kind's station.
    """

    kinds: Kinds
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
    lr_scale: Callable[[int], float] = lambda _: 1.0

    def __post_init__(self) -> None:
        check_kinds(self.kinds, self.weight_N.shape[0])
        for name, there in (("predict", self.predict), ("distil", self.distil)):
            missing = sorted(self.kinds.keys() - there.keys())
            if missing:
                raise LichenError(
                    f"the server cannot {name} with {missing[0]!r}", where="fusion", fix="give a station for every kind"
                )

    def init(self, shared: Tree) -> ServerState:
        """The state before the first round, from :func:`together`'s tensors."""
        return ServerState(round=0, shared=shared, optimizer=self.optimizer.init(shared))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round. A round nobody comes to changes nothing but its number."""
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        clients = self.sampler.invite(self.weight_N, derive(seed, "invite"))
        change, agreed, metrics, told = self._train(state, engine, clients, seed)
        sums, learned = summed(told)
        metrics.update(learned)
        if change:
            shared, optimizer = self.optimizer.update(change, state.optimizer, state.shared)
            state = replace(state, shared=shared, optimizer=optimizer)
            answers, said = self.ensemble.close(agreed, {})
            metrics.update(said)
            state = replace(state, shared=self._distil(state, answers, derive(seed, "distil")))
        state = replace(state, round=state.round + 1)
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if self.valid and is_validated(state.round, self.valid_every, self.rounds):
            judges = tuple(range(self.weight_N.shape[0])) if self.validators is None else self.validators
            judging = Job(work=self.valid, shared={}, version=state.round, clients=judges, seed=0)
            shared = state.shared
            found = score_kinds(engine, judging, self.kinds, lambda kind: of_kind(shared, kind))
            metrics.update(means(self.kinds, *found))
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
        )

    def _train(
        self, state: ServerState, engine: Engine, clients: tuple[int, ...], seed: int
    ) -> tuple[Tree, Any, dict[str, float], Tree]:
        """``(change of all kinds, the ensemble's total, metrics, sums by client)``; no change where nobody came."""
        settings = {"lr_scale": self.lr_scale(state.round)}
        change, said, told = dict[str, Tree](), dict[str, float](), []
        agreed = self.ensemble.zero()
        for kind, some in parted(self.kinds, clients):
            shared = of_kind(state.shared, kind)
            job = Job(
                work=f"{self.work}/{kind}",
                shared=shared,
                version=state.round,
                clients=some,
                seed=seed,
                settings=settings,
            )
            total, of = self.aggregator.zero(), []
            for message in engine.run(job):
                total = self.aggregator.add(total, message)
                agreed = self.ensemble.add(agreed, self._opinion(kind, message, job))
                of.append((message.client_C, {name: x for name, x in message.metrics.items() if name in SUMMED}))
            total = engine.merge(self.aggregator, total)
            _, seen = joined(engine, of)
            told.append(seen)
            if seen and float(seen["failed"].sum()) < len(some):
                change[kind], heard = self.aggregator.close(total, shared)
                said = {name: said.get(name, 0.0) + value for name, value in heard.items()}
        agreed = engine.merge(self.ensemble, agreed)
        return together(change), agreed, said, trees.concatenate(told) if told else {}

    def _opinion(self, kind: str, message: Message, job: Job) -> Message:
        """What the models that came say of the server's rows; one that failed, or has no rows, weighs nothing."""
        came = trees.join("params/", trees.add(trees.broadcast(job.shared, len(message.client_C)), message.tensors), {})
        asked = replace(job, clients=tuple(message.client_C.tolist()))
        predict = self.predict[kind]
        rows = predict.source.batches(asked.clients, asked.seed)
        told, _ = fold(predict.work, rows, asked, asked.clients, came)
        weight_C = torch.where(message.weight_C > 0, told.weight_C, torch.zeros_like(told.weight_C))
        return replace(told, weight_C=weight_C)

    def _distil(self, state: ServerState, answers: Tree, seed: int) -> Tree:
        """Every kind's tensors after some steps on the ensemble's answers."""
        shared = dict(state.shared)
        for kind in self.kinds:
            mine = of_kind(shared, kind)
            job = Job(
                work="distil", shared={**mine, **answers}, version=state.round, clients=(0,), seed=derive(seed, kind)
            )
            distil = self.distil[kind]
            message, _ = fold(distil.work, distil.source.batches(job.clients, job.seed), job, job.clients)
            shared |= together({kind: trees.add(mine, trees.take(message.tensors, 0))})
        return shared
