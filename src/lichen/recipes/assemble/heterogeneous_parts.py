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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
from torch import Tensor

from lichen.algorithms.exchange import Kinds, parted
from lichen.clients.distillation.predict import Predict
from lichen.clients.distillation.private_models import AtHome, InTurn, asking, private_stations
from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.train import Train
from lichen.core.contracts import Aggregator, ClientWork, Engine, Source, Station
from lichen.core.fold import BlockSize
from lichen.core.message import Job, Message
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.data.batches.shards import EvalSource, Shard
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.column import room_of
from lichen.recipes.assemble.heterogeneous import Unequal, own_rows, public_rows
from lichen.recipes.assemble.parts import trainer

__all__ = ["ByKind", "averaged", "engine_of", "private", "saying", "server"]


@final
class ByKind:
    """An engine that asks every client for its own kind's work: ``<work>/<kind>``, with no tensors of the server's.

    Args:
        engine: Does the work.
        kinds: The clients of each architecture.
    """

    def __init__(self, engine: Engine, *, kinds: Kinds) -> None:
        self.engine, self.kinds = engine, kinds
        self.bytes_up, self.bytes_down = engine.bytes_up, engine.bytes_down

    def run(self, job: Job) -> Iterator[Message]:
        """The messages of all kinds."""
        for kind, some in parted(self.kinds, job.clients):
            yield from self.engine.run(replace(job, work=f"{job.work}/{kind}", clients=some, shared={}))
            self.bytes_up, self.bytes_down = self.engine.bytes_up, self.engine.bytes_down

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The engine's."""
        return self.engine.merge(aggregator, total)

    def join(self, client_N: Tensor, metrics: Tree) -> tuple[Tensor, Tree]:
        """The engine's."""
        return self.engine.join(client_N, metrics)


def engine_of(unequal: Unequal, stations: Mapping[str, Station], store: ClientStore) -> LocalEngine:
    """This process, with these stations."""
    room = room_of(unequal.recipe, store)

    def block(job: Job, station: Station) -> int:
        # What clients make themselves is in no job, and counts all the same.
        start = getattr(station.work, "start", {})
        return room if isinstance(room, int) else room(replace(job, shared={**start, **job.shared}), station)

    size: int | BlockSize = room if isinstance(room, int) else block
    return LocalEngine(stations, store, block_size=size, device=unequal.recipe.model.device)


def alone_steps(unequal: Unequal) -> int:
    """Local steps that a client alone takes in a round, as many as it would take with public rows in all rounds."""
    fed, section = unequal.recipe.federation, unequal.exchange
    if unequal.fused:
        return fed.local_steps
    digest = section.digest(fed.local_steps) * section.public_batch / fed.batch
    whole = section.first(fed.local_steps) + (fed.rounds - 1) * (digest + fed.local_steps)
    return math.ceil(whole / fed.rounds)


def private(unequal: Unequal, lr: float) -> dict[str, Station]:
    """Stations of clients whose models stay with them: in fedmd and dsfl, and of all that are alone."""
    out: dict[str, Station] = {}
    steps, section = unequal.recipe.federation.local_steps, unequal.exchange
    for kind, some in unequal.kinds.items():
        bench, mine = unequal.benches[kind], own_rows(unequal, kind, steps)
        start = {**bench.start, **unequal.settings()}
        out |= private_stations(
            kind,
            trainer(bench, lr, personal=True),
            start=start,
            own=mine,
            public=unequal.public,
            clients=some,
            digest_steps=section.digest(steps),
            examples=_examples(unequal, some) if section.weigh == "examples" else None,
            counts=_counts(unequal, some) if section.weigh == "classes" else None,
        )
        work = out[f"train/{kind}"].work
        turns = InTurn((public_rows(unequal, mine, some), mine))
        out[f"train/{kind}"] = Station(work=work, source=own_rows(unequal, kind, section.first(steps)))
        out[f"learn/{kind}"] = Station(work=work, source=turns)
        out[f"alone/{kind}"] = Station(work=work, source=own_rows(unequal, kind, alone_steps(unequal)))
        judging: dict[str, tuple[ClientWork, Source]] = {
            "valid": (Evaluate(bench.model, personal=True), bench.evaluating(bench.valid)),
            "test": (Evaluate(bench.model, personal=True), bench.evaluating(bench.test)),
            "alone.valid": (KeepBest(bench.model), bench.evaluating(bench.valid)),
            "alone.chosen": (Evaluate(bench.model, personal=True, use_best=True), bench.evaluating(bench.valid)),
            "alone.test": (Evaluate(bench.model, personal=True, use_best=True), bench.evaluating(bench.test)),
        }
        for name, (judge, source) in judging.items():
            out[f"{name}/{kind}"] = Station(work=AtHome(judge, start=start), source=source)
    return out


def averaged(unequal: Unequal, lr: float) -> dict[str, Station]:
    """Stations of clients that train their architecture's average: feddf."""
    out, steps = dict[str, Station](), unequal.recipe.federation.local_steps
    for kind, bench in unequal.benches.items():
        out[f"train/{kind}"] = Station(work=trainer(bench, lr), source=own_rows(unequal, kind, steps))
        for name, shards in (("valid", bench.valid), ("test", bench.test)):
            out[f"{name}/{kind}"] = Station(work=Evaluate(bench.model), source=bench.evaluating(shards))
    return out


def server(unequal: Unequal, lr: float) -> tuple[dict[str, Station], dict[str, Station]]:
    """What feddf's server does itself: the stations where models answer, and those where they are taught."""
    predict, distil = dict[str, Station](), dict[str, Station]()
    everyone = tuple(range(unequal.count))
    examples = _examples(unequal, everyone) if unequal.exchange.weigh == "examples" else None
    for kind, bench in unequal.benches.items():
        mine = own_rows(unequal, kind, unequal.recipe.federation.local_steps)
        answers = Predict(bench.model, rows=unequal.public.size, personal=True, examples=examples)
        predict[kind] = Station(work=answers, source=asking(mine, unequal.public, everyone))
        learns: Train = replace(trainer(bench, unequal.exchange.server_lr or lr), prox=0.0)
        distil[kind] = Station(work=AtHome(learns, start=unequal.settings()), source=public_rows(unequal, mine, (0,)))
    return predict, distil


def saying(unequal: Unequal, rows: Shard) -> dict[str, Station]:
    """Stations ``said/<kind>``, where clients' models answer these rows."""
    private, out = not unequal.fused, dict[str, Station]()
    for kind, some in unequal.kinds.items():
        bench = unequal.benches[kind]
        # One model answers for all the clients that share it.
        examples = None if private else dict.fromkeys(some, float(len(some)))
        work: ClientWork = Predict(bench.model, rows=rows.size, personal=private, examples=examples)
        source = EvalSource(
            dict.fromkeys(some, rows), batch_size=32, pad=bench.pad, max_length=unequal.recipe.data.max_length
        )
        out[f"said/{kind}"] = Station(work=AtHome(work, start=bench.start) if private else work, source=source)
    return out


def _examples(unequal: Unequal, clients: Sequence[int]) -> dict[int, float]:
    return {c: float(unequal.train[c].size) for c in clients}


def _counts(unequal: Unequal, clients: Sequence[int]) -> dict[int, list[int]]:
    classes = next(iter(unequal.benches.values())).model.classes
    assert classes is not None
    labels = {c: np.asarray(unequal.train[c].labels) for c in clients}
    return {c: np.bincount(y[y >= 0], minlength=classes).tolist() for c, y in labels.items()}
