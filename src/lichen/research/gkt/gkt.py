"""FedGKT: clients train small networks, the server a large one on their features, and each distils the other.

Research: no recipe and no public name reaches this module.

A round, for every invited client: it trains its small network on its own rows, with the server's opinion
of each row beside the label once there is one (``train`` at first, then ``learn``); then it uploads its
rows' features, its own opinion and the labels (``offer``). The server trains the large network on all
rows offered, against labels and the clients' opinions alike, and keeps its opinion of every row for the
client it came from. The model that is judged is the client's small network under the server's large one.

No weights of the large network go down in training, and no gradients cross at all; but see
:mod:`lichen.research.gkt.features` for what does leave: labels and features. To judge, the large network's
tensors go down, which is counted like all else.

Labels and opinions weigh the same, at temperature 1; the paper's schedule of both is not followed.

References:
    Chaoyang He, Murali Annavaram and Salman Avestimehr. "Group Knowledge Transfer: Federated Learning of
    Large CNNs at the Edge." NeurIPS 2020. https://arxiv.org/abs/2007.14513

Legend: N clients of the roster, M rows offered, F features, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from lichen.algorithms.scores import SUMMED, is_validated, mean_loss, score, summed, with_best
from lichen.clients.distillation.private_models import LocalInit
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import ClientTask, Source
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Sampler
from lichen.core.errors import LichenError
from lichen.core.fold import fold
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, Shard, TrainSource
from lichen.research.gkt.features import FeatureUpload
from lichen.research.gkt.gather import GatherFeatures
from lichen.research.gkt.stitched import Stitched
from lichen.server.knowledge.ensemble import as_answers

__all__ = ["GKT", "gkt_client_tasks"]


def gkt_client_tasks(
    train: Train, stitched: Stitched, *, start: Shared, own: TrainSource, valid: Source
) -> dict[str, ClientTask]:
    """What clients can be asked: ``train``, ``learn``, ``offer``, and ``valid``, which judges both parts together.

    Args:
        train: Training of the stem, ``personal``.
        stitched: The stem under the server's network.
        start: Where the stems begin.
        own: The clients' labelled rows.
        valid: Rows to judge by.

    Raises:
        LichenError: if the training is not personal, or not the stem's.
    """
    if not train.personal or train.model is not stitched.stem:
        raise LichenError("clients train their own stems", where="gkt.train", fix="train the stem with personal=True")
    shards = own.shards
    numbered_shards: dict[int, Shard] = dict(shards) if isinstance(shards, Mapping) else dict(enumerate(shards))
    numbered = {c: replace(shard, answer=np.arange(shard.size, dtype=np.int64)) for c, shard in numbered_shards.items()}
    every = EvalSource(numbered_shards, batch_size=max(64, own.batch_size))
    stem = LocalInit(train, start=start)
    return {
        "train": ClientTask(work=stem, source=own),
        "learn": ClientTask(work=stem, source=replace(own, shards=numbered)),
        "offer": ClientTask(work=LocalInit(FeatureUpload(stitched.stem), start=start), source=every),
        "valid": ClientTask(work=LocalInit(Evaluate(stitched, personal=True), start=start), source=valid),
    }


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GKT:
    """Group knowledge transfer. The state's ``shared`` holds ``top/...``, and ``answers/<client>/...`` of each row.

    Attributes:
        top: Training of the server's large network on features.
        batch: Rows of one of its batches.
        steps: Its steps in a round.
        sampler: Invites from the roster.
        weight_N: Examples of every client, for the sampler.
        rounds: Rounds in all; the last is always validated.
        valid: The validating work; None for none.
        valid_every: Rounds between validations.
        lr_scale: Factor on the clients' learning rate in round r (from 0).
        admission: What counts of what clients send.

    Raises:
        LichenError: if the server's training is personal, or a number is not positive.
    """

    top: Train
    batch: int
    steps: int
    sampler: Sampler
    weight_N: Tensor
    rounds: int
    valid: str | None = "valid"
    valid_every: int = 1
    lr_scale: Callable[[int], float] = lambda _: 1.0
    admission: Admission = OPEN

    def __post_init__(self) -> None:
        if self.top.personal:
            raise LichenError("the server has nobody to keep a model for", where="gkt.top", fix="personal=False")
        if self.batch < 1 or self.steps < 1:
            raise LichenError(
                f"{self.steps} steps of {self.batch} rows at the server", where="gkt", fix="use numbers above 0"
            )

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round, from the large network's tensors under their own names."""
        return ServerState(round=0, shared=Shared(trees.join("top/", shared.trainable, {})))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round. A round in which nobody uploads rows leaves the server's network as it is."""
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        clients = self.sampler.invite(self.weight_N, derive(seed, "invite"))
        settings, jobs = {"lr_scale": self.lr_scale(state.round)}, []
        for client in clients:
            mine, _ = trees.split(state.shared.trainable, f"answers/{client}/")
            jobs.append(
                Job(
                    work="learn" if mine else "train",
                    shared=Shared(frozen=trees.join("answers.", mine, {})),
                    version=2 * state.round,
                    clients=(client,),
                    seed=seed,
                    settings=settings,
                )
            )
        trained = collect(engine, jobs, admission=self.admission, keep=SUMMED)
        uploads = [
            Job(work="offer", shared=Shared(), version=2 * state.round + 1, clients=(client,), seed=seed)
            for client in clients
        ]
        gather = GatherFeatures()
        came = collect(engine, uploads, gather, admission=self.admission, keep=())
        sums, metrics = summed(trained.metrics)
        if came.total:
            rows = gather.close(came.total, Shared())[0].trainable
            shared, metrics["top_loss"] = self._teach(state, rows, derive(seed, "top"))
            state = replace(state, shared=shared)
        state = replace(state, round=state.round + 1)
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if self.valid and is_validated(state.round, self.valid_every, self.rounds):
            everyone = tuple(range(self.weight_N.shape[0]))
            top = Shared(trees.join("top/", trees.split(state.shared.trainable, "top/")[0], {}))
            judging = Job(work=self.valid, shared=top, version=2 * state.round - 1, clients=everyone, seed=0)
            metrics["valid"] = mean_loss(score(engine, judging, self.admission)[1])
            state = with_best(state, metrics["valid"], top)
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
            attendance=trained.attendance + came.attendance,
        )

    def _teach(self, state: ServerState, rows: Tree, seed: int) -> tuple[Shared, float]:
        """``(shared, mean loss)`` after the server's training and its opinions of the rows."""
        top, others = trees.split(state.shared.trainable, "top/")
        x_MF = rows["features"].float()
        numbers_M = np.arange(len(x_MF), dtype=np.int64)
        shard = ArrayShard(x_MF.numpy(), labels=rows["labels"].long().numpy(), answer=numbers_M)
        opinions = as_answers(rows["logits"].double().softmax(-1))
        source = TrainSource((shard,), batch_size=self.batch, steps=self.steps)
        job = Job(work="top", shared=Shared(top, frozen=opinions), version=state.round, clients=(0,), seed=seed)
        message, _ = fold(self.top, source.batches(job.clients, job.seed), job, job.clients)
        top = trees.add(top, trees.take(message.tensors, 0))
        logits_MK = self._logits(top, x_MF)
        shared = trees.join("top/", top, others)
        for client in sorted(set(rows["client"].tolist())):
            answers = as_answers(logits_MK[rows["client"] == client].double().softmax(-1))
            shared |= {f"answers/{client}/{name.removeprefix('answers.')}": x for name, x in answers.items()}
        return Shared(shared), float(message.metrics["loss_sum"] / message.metrics["count"].clamp(min=1))

    def _logits(self, top: Tree, x_MF: Tensor) -> Tensor:
        top_C, parts = trees.broadcast(top, 1), []
        with torch.no_grad():
            for x_BF in torch.split(x_MF, 1024):
                batch = {"active_C": torch.ones(1, dtype=torch.bool), "x_CBF": x_BF[None]}
                parts.append(self.top.model.logits(top_C, {}, batch)[0])
        return torch.cat(parts)
