"""The tasks of each architecture in an exchange of predictions.

References:
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581
    Tao Lin, Lingjing Kong, Sebastian U. Stich and Martin Jaggi. "Ensemble Distillation for Robust Model
    Fusion in Federated Learning." NeurIPS 2020. https://arxiv.org/abs/2006.07242

Legend: C clients, N public rows, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from lichen.algorithms.exchange import Architectures, by_architecture
from lichen.clients.distillation.predict import Predict
from lichen.clients.distillation.private_models import ConcatSource, LocalInit, asking, private_client_tasks
from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.gradient_steps import Proximal
from lichen.core.collecting.admission import Admission
from lichen.core.contracts.client import ClientTask, ClientWork, Source
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.roster import declared_name
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import EvalSource, Shard
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.column import block_size_of
from lichen.recipes.assemble.heterogeneous import HeterogeneousClients, own_rows, public_rows
from lichen.recipes.assemble.parts import trainer
from lichen.recipes.assemble.sides.limits import exchange_limits

__all__ = [
    "ByArchitecture",
    "admission_of_architectures",
    "averaged_tasks",
    "engine_of",
    "prediction_tasks",
    "private_tasks",
    "server",
]


@final
class ByArchitecture:
    """An engine that asks every client for its own kind's work: ``<work>/<arch>``, with no tensors of the server's.

    Args:
        engine: Does the work.
        architectures: The clients of each architecture.
    """

    def __init__(self, engine: Engine, *, architectures: Architectures) -> None:
        self.engine, self.architectures = engine, architectures
        self.bytes_up, self.bytes_down = engine.bytes_up, engine.bytes_down
        self._numbers, self._out = 0, dict[int, tuple[int, ...]]()

    def submit(self, job: Job) -> int:
        """One job of every kind."""
        numbers = [
            self.engine.submit(replace(job, work=f"{job.work}/{arch}", clients=some, shared=Shared()))
            for arch, some in by_architecture(self.architectures, job.clients)
        ]
        self._numbers += 1
        self._out[self._numbers] = tuple(numbers)
        return self._numbers

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """The replies of all kinds."""
        whose = {inner: outer for outer in numbers for inner in self._out.get(outer, ())}
        for reply in self.engine.replies(whose, until):
            self.bytes_up, self.bytes_down = self.engine.bytes_up, self.engine.bytes_down
            yield replace(reply, job=whose[reply.job])

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """Answer clients of whatever kind."""
        for inner in self._out.get(number, ()):
            self.engine.answer(inner, clients, answer_C)

    def cancel(self, number: int) -> None:
        """Give up the jobs of all kinds."""
        for inner in self._out.pop(number, ()):
            self.engine.cancel(inner)

    def now(self) -> float:
        """The engine's."""
        return self.engine.now()

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The engine's."""
        return self.engine.merge(aggregator, total)

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """The engine's."""
        return self.engine.join(client_N, metrics, lines)


def engine_of(
    heterogeneous: HeterogeneousClients, client_tasks: Mapping[str, ClientTask], store: ClientStore
) -> LocalEngine:
    """This process, with these stations."""
    block_size = block_size_of(heterogeneous.recipe, store)

    device = heterogeneous.recipe.model.device
    if isinstance(block_size, int):
        return LocalEngine(client_tasks, store, block_size=block_size, device=device)

    def block(job: Job, client_task: ClientTask) -> tuple[int, ClientTask]:
        # What clients make themselves is in no job, and counts all the same.
        start = client_task.work.start if isinstance(client_task.work, LocalInit) else Shared()
        return block_size(replace(job, shared=start | job.shared), client_task)

    return LocalEngine(client_tasks, store, block_size=block, device=device)


def admission_of_architectures(heterogeneous: HeterogeneousClients, tasks: Mapping[str, ClientTask]) -> Admission:
    """What counts of the clients' messages: what their works declare, as far as the roster lets them."""
    limits = exchange_limits(heterogeneous.server, heterogeneous.exchange, fused=heterogeneous.fused)
    return Admission(works={name: task.work for name, task in tasks.items()}, limits=limits)


def alone_steps(heterogeneous: HeterogeneousClients) -> int:
    """Local steps that a client alone takes in a round, as many as it would take with public rows in all rounds."""
    fed, section = heterogeneous.recipe.federation, heterogeneous.exchange
    if heterogeneous.fused:
        return fed.fixed_steps
    digest = section.digest(fed.fixed_steps) * section.public_batch_size / fed.batch_size
    whole = section.first(fed.fixed_steps) + (fed.rounds - 1) * (digest + fed.fixed_steps)
    return math.ceil(whole / fed.rounds)


def private_tasks(heterogeneous: HeterogeneousClients, lr: float) -> dict[str, ClientTask]:
    """Stations of clients whose models stay with them: in fedmd and dsfl, and of all that are alone."""
    out: dict[str, ClientTask] = {}
    steps, section = heterogeneous.recipe.federation.fixed_steps, heterogeneous.exchange
    for arch, some in heterogeneous.architectures.items():
        experiment, mine = heterogeneous.experiments[arch], own_rows(heterogeneous, arch, steps)
        start = experiment.start | heterogeneous.settings()
        out |= private_client_tasks(
            arch,
            trainer(experiment.server, lr, personal=True),
            start=start,
            own=mine,
            public=heterogeneous.public,
            clients=some,
            digest_steps=section.digest(steps),
            examples=_examples(heterogeneous, some) if section.weighting == "examples" else None,
            counts=_counts(heterogeneous, some) if section.weighting == "classes" else None,
        )
        work = out[f"train/{arch}"].work
        turns = ConcatSource((public_rows(heterogeneous, mine, some), mine))
        out[f"train/{arch}"] = ClientTask(work=work, source=own_rows(heterogeneous, arch, section.first(steps)))
        out[f"learn/{arch}"] = ClientTask(work=work, source=turns)
        out[f"alone/{arch}"] = ClientTask(work=work, source=own_rows(heterogeneous, arch, alone_steps(heterogeneous)))
        judging: dict[str, tuple[ClientWork, Source]] = {
            "valid": (Evaluate(experiment.model, personal=True), experiment.evaluating(experiment.clients.valid)),
            "test": (Evaluate(experiment.model, personal=True), experiment.evaluating(experiment.clients.test)),
            "alone.valid": (KeepBest(experiment.model), experiment.evaluating(experiment.clients.valid)),
            "alone.chosen": (
                Evaluate(experiment.model, personal=True, use_best=True),
                experiment.evaluating(experiment.clients.valid),
            ),
            "alone.test": (
                Evaluate(experiment.model, personal=True, use_best=True),
                experiment.evaluating(experiment.clients.test),
            ),
        }
        for name, (judge, source) in judging.items():
            out[f"{name}/{arch}"] = ClientTask(work=LocalInit(judge, start=start), source=source)
    return out


def averaged_tasks(heterogeneous: HeterogeneousClients, lr: float) -> dict[str, ClientTask]:
    """Stations of clients that train their architecture's average: feddf."""
    out, steps = dict[str, ClientTask](), heterogeneous.recipe.federation.fixed_steps
    for arch, experiment in heterogeneous.experiments.items():
        out[f"train/{arch}"] = ClientTask(
            work=trainer(experiment.server, lr), source=own_rows(heterogeneous, arch, steps)
        )
        for name, shards in (("valid", experiment.clients.valid), ("test", experiment.clients.test)):
            out[f"{name}/{arch}"] = ClientTask(work=Evaluate(experiment.model), source=experiment.evaluating(shards))
    return out


def server(heterogeneous: HeterogeneousClients, lr: float) -> tuple[dict[str, ClientTask], dict[str, ClientTask]]:
    """What feddf's server does itself: the stations where models answer, and those where they are taught."""
    predict, distil = dict[str, ClientTask](), dict[str, ClientTask]()
    everyone = tuple(range(heterogeneous.count))
    examples = _examples(heterogeneous, everyone) if heterogeneous.exchange.weighting == "examples" else None
    for arch, experiment in heterogeneous.experiments.items():
        mine = own_rows(heterogeneous, arch, heterogeneous.recipe.federation.fixed_steps)
        answers = Predict(experiment.model, rows=heterogeneous.public.size, personal=True, examples=examples)
        predict[arch] = ClientTask(work=answers, source=asking(mine, heterogeneous.public, everyone))
        learns = trainer(experiment.server, heterogeneous.exchange.server_lr or lr)
        # The server has no shared model to be pulled to.
        unpulled = tuple(step for step in learns.gradient_steps if not isinstance(step, Proximal))
        learns = replace(learns, gradient_steps=unpulled)
        distil[arch] = ClientTask(
            work=LocalInit(learns, start=heterogeneous.settings()), source=public_rows(heterogeneous, mine, (0,))
        )
    return predict, distil


def prediction_tasks(heterogeneous: HeterogeneousClients, rows: Shard) -> dict[str, ClientTask]:
    """Stations ``said/<arch>``, where clients' models answer these rows."""
    private, out = not heterogeneous.fused, dict[str, ClientTask]()
    for arch, some in heterogeneous.architectures.items():
        experiment = heterogeneous.experiments[arch]
        # One model answers for all the clients that share it.
        examples = None if private else dict.fromkeys(some, float(len(some)))
        work: ClientWork = Predict(experiment.model, rows=rows.size, personal=private, examples=examples)
        source = EvalSource(
            dict.fromkeys(some, rows),
            batch_size=32,
            pad=experiment.server.pad,
            max_length=heterogeneous.recipe.data.max_length,
        )
        out[f"said/{arch}"] = ClientTask(
            work=LocalInit(work, start=experiment.start) if private else work, source=source
        )
    return out


def _examples(heterogeneous: HeterogeneousClients, clients: Sequence[int]) -> dict[int, float]:
    rows_N = heterogeneous.server.roster.rows("train")
    return {c: float(rows_N[c]) for c in clients}


def _counts(heterogeneous: HeterogeneousClients, clients: Sequence[int]) -> dict[int, list[int]]:
    server = heterogeneous.server
    labels = {c: server.roster[c].labels for c in clients}
    return {c: [int(mine.get(declared_name(name), 0)) for name in server.classes] for c, mine in labels.items()}
