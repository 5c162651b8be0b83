"""FedMKT: mutual distillation between small language models at clients and a large one at the server.

Research: no recipe and no public name reaches this module.

A round: the clients train their own models on their own rows and tell what they now say about public texts;
the server's model tells as well. Answers are carried into the other side's vocabulary
(:class:`lichen.research.mutual.alignment.Bridge`). Of each text the server believes the client that knew it best,
if it knew it better than the server's own model (:class:`lichen.research.mutual.select.Select`), and learns from these
answers; the clients are sent the server's answers and losses, and believe them where the server knew the
text better than they did. No parameter ever crosses, so the clients' models may be of any kind and number;
those of one kind are a :class:`Group`.

Both sides learn from what was told before either listened. A client's model is private state; the server's
is ``shared``. Versions run twice as fast as rounds: the visit makes an odd one, listening the next.

References:
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224

Legend: C clients, N texts, R places with a label, k answers kept of a place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from lichen.algorithms.scores import is_validated, mean_loss, score
from lichen.core import tree as trees
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.fold import fold
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import AroundAggregator
from lichen.research.mutual.alignment import Bridge
from lichen.research.mutual.select import Select
from lichen.transforms.delta import snapshot_name

__all__ = ["Group", "Mutual", "carried", "distill_step"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Clients whose models are of one kind.

    Attributes:
        clients: Roster indices.
        start: The tensors they all begin with, sent with their first job.
        up: Carries their answers to the server's vocabulary.
        down: Carries the server's answers to theirs.
        train_then_report: Their training and telling, a
            :class:`lichen.research.mutual.train_then_report.TrainThenReport`.
        distill: Their listening, ``DistillLogits(Train(personal=True))``.
        valid: Their validation on their own tensors; None for none.
        base: Digest of their frozen base model; empty where there is none.
    """

    clients: tuple[int, ...]
    start: Shared
    up: Bridge
    down: Bridge
    train_then_report: str = "visit"
    distill: str = "listen"
    valid: str | None = "valid"
    base: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mutual:
    """FedMKT's round.

    Attributes:
        groups: The clients, by kind of model.
        report: The server's telling, of the public texts as its tokenizer has them.
        distill: The server's listening, of the same texts; not personal.
        select: Chooses among the clients' answers.
        rounds: Rounds in all: the last is always validated.
        valid_every: Rounds between validations of the clients.
        lr_scale: Factor on all learning rates in round r (from 0).
        transfer: Whether answers are believed at all; without it everybody takes the same steps on the same
            texts and nobody is told anything: what the method is measured against.
        admission: What counts of what clients send.

    Raises:
        LichenError: if there is no client, or one is in two groups.
    """

    groups: tuple[Group, ...]
    report: ClientTask
    distill: ClientTask
    select: Select
    rounds: int
    valid_every: int = 1
    lr_scale: Callable[[int], float] = lambda _: 1.0
    transfer: bool = True
    admission: Admission = OPEN

    def __post_init__(self) -> None:
        everyone = [client for group in self.groups for client in group.clients]
        if not everyone or len(set(everyone)) < len(everyone):
            raise LichenError(
                "there is no client, or one is in two groups", where="federation", fix="give each client one group"
            )

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round: the server's model."""
        return ServerState(round=0, shared=shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """Train, tell, choose, listen on both sides, judge."""
        started, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        settings = {"lr_scale": self.lr_scale(state.round)}
        query = Job(work="tell", shared=state.shared, version=state.round, clients=(0,), seed=derive(seed, "tell"))
        mine = fold(self.report.work, self.report.source.batches((0,), query.seed), query, (0,))[0]
        answers, metrics, tokens = self._gather(state, engine, mine, seed=derive(seed, "visit"), settings=settings)
        metrics["server_public"] = mean_loss(mine.metrics)
        accepted, texts = 0.0, mine.tensors["loss"].shape[1]
        for group in self.groups:
            message = carried(mine, group.down)
            job = Job(
                work=group.distill,
                shared=Shared(frozen=self._answers(message)),
                version=2 * state.round + 1,
                clients=group.clients,
                seed=derive(seed, "listen"),
                base=group.base,
                settings=settings,
            )
            accepted += float(score(engine, job, self.admission)[1]["believed"].sum())
        everyone = sum(len(group.clients) for group in self.groups)
        metrics["client_believed"] = accepted / (everyone * texts)
        shared, loss = distill_step(self.distill, state.shared, answers, seed=derive(seed, "server"), settings=settings)
        metrics["server_loss"] = loss
        state = replace(state, shared=shared, round=state.round + 1)
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if is_validated(state.round, self.valid_every, self.rounds):
            metrics |= self._validate(state, engine)
        return state, Report(
            round=state.round,
            clients=tuple(sorted(client for group in self.groups for client in group.clients)),
            metrics=metrics,
            tokens=tokens,
            bytes_up=engine.bytes_up - up,
            bytes_down=engine.bytes_down - down,
            seconds=time.perf_counter() - started,
            valid_up=engine.bytes_up - trained_up,
            valid_down=engine.bytes_down - trained_down,
        )

    def _started(self, group: Group, work: str, version: int, seed: int, *, first: bool) -> Job:
        """A job that names the tensors everybody began with; they are sent once."""
        snapshot = snapshot_name(group.start)
        return Job(
            work=work,
            shared=group.start,
            version=version,
            clients=group.clients,
            seed=seed,
            base=group.base,
            snapshot=snapshot,
            acked={} if first else dict.fromkeys(group.clients, snapshot),
        )

    def _gather(
        self, state: ServerState, engine: Engine, mine: Message, *, seed: int, settings: dict[str, float]
    ) -> tuple[Tree, dict[str, float], int]:
        """``(answers that the server believes, metrics, tokens trained on)`` of the clients' visits."""
        by_group = []
        for group in self.groups:
            job = self._started(group, group.train_then_report, 2 * state.round, seed, first=state.round == 0)
            carry = Carried(self.select, group.up, mine.group)
            by_group.append(collect(engine, [replace(job, settings=settings)], carry, admission=self.admission))
        total = self.select.zero()
        for came in by_group:
            total = self.select.merge(total, came.total)
        seen = trees.concatenate([came.metrics for came in by_group if came.metrics])
        sums = {n: math.fsum(seen[n].tolist()) for n in ("loss_sum", "count", "tokens", "failed")}
        metrics = {"loss": sums["loss_sum"] / sums["count"]} if sums["count"] else {}
        if sums["failed"]:
            metrics["failed"] = sums["failed"]
        answers = {name: x for name, x in self._answers(mine).items() if name != "answers.loss"}
        if not total.count or not self.transfer:
            return null_targets(answers), {**metrics, "server_believed": 0.0}, int(sums["tokens"])
        chosen, selection = self.select.close(total, Shared(frozen={"answers.loss": mine.tensors["loss"][0]}))
        answers = {name: chosen.frozen[name] for name in answers}
        return answers, {**metrics, "server_believed": selection["believed"]}, int(sums["tokens"])

    def _answers(self, message: Message) -> Tree:
        """The server's answers as they go down; without ``transfer`` nobody believes them."""
        answers = {f"answers.{name}": message.tensors[name][0] for name in ("index", "prob", "loss")}
        return answers if self.transfer else null_targets(answers)

    def _validate(self, state: ServerState, engine: Engine) -> dict[str, float]:
        jobs = [
            self._started(group, group.valid, 2 * state.round, 0, first=False)
            for group in self.groups
            if group.valid is not None
        ]
        return {"valid": mean_loss(collect(engine, jobs, admission=self.admission).metrics)} if jobs else {}


@final
@dataclass(frozen=True, slots=True)
class Carried(AroundAggregator):
    """An aggregator for messages in another vocabulary: each is carried over before it is added.

    Args:
        inner: The aggregator.
        bridge: Carries.
        group: What messages are called then.
    """

    bridge: Bridge
    group: str

    def before(self, message: Message) -> Message:
        """The message, carried over."""
        return replace(carried(message, self.bridge), group=self.group)

    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)`` of the inner one."""
        return self.inner.close(total, shared)


def null_targets(answers: Tree) -> Tree:
    """Answers of the same shape that nobody believes."""
    null = {"answers.index": -1.0, "answers.prob": 0.0, "answers.loss": math.inf}
    return {name: torch.full_like(x, null[name]) for name, x in answers.items()}


def carried(message: Message, bridge: Bridge) -> Message:
    """A telling in the hearer's vocabulary and at its places; raises as :meth:`Bridge.carry`."""
    index_CRk, prob_CRk = bridge.carry(message.tensors["index"], message.tensors["prob"])
    return replace(message, tensors={**message.tensors, "index": index_CRk, "prob": prob_CRk})


def distill_step(
    client_task: ClientTask, shared: Shared, answers: Tree, *, seed: int, settings: dict[str, float]
) -> tuple[Shared, float]:
    """``(shared, mean loss)`` after the server has listened; a listening that did not stay finite changes nothing.

    Args:
        client_task: A :class:`lichen.research.mutual.token_distill.DistillLogits` that is not personal, and its public
            batches.
        shared: Who listens.
        answers: ``answers.index`` and ``answers.prob``.
        seed: Of the batches.
        settings: Of the job.
    """
    with_answers = shared | Shared(frozen=answers)
    job = Job(work="listen", shared=with_answers, version=0, clients=(0,), seed=seed, settings=settings)
    message, _ = fold(client_task.work, client_task.source.batches((0,), seed), job, (0,))
    change = {name: x[0] for name, x in message.tensors.items()}
    moved = {name: x + change[name].to(x) if name in change else x for name, x in shared.trainable.items()}
    return shared | Shared({name: x.detach() for name, x in moved.items()}), mean_loss(message.metrics)
