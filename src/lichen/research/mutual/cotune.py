"""FedCoLLM: averages a small language model over the clients and distils it with a large one at the server.

Research: no recipe and no public name reaches this module.

A round: the clients train the small model's adapters, which are averaged as ever
(:class:`lichen.algorithms.average.Average`: any aggregator, secure sums among them, for nothing but the sum is
used). Then, at the server and on public texts alone, both models tell what they say and each learns from the
other: what the clients know goes into the large model, what the large one knows into the small, and with it
back to the clients. Of unequal tokenizers the answers are carried over
(:class:`lichen.research.mutual.alignment.Bridge`); the paper's are equal.

Each model learns from what the other said before this round's listening; the paper asks anew in every step,
which is the same for a single step and close to it for a few. Who judges sees the small model after it listened.

State: the small model is ``shared``; the large one lies under ``large/`` beside the server optimizer's
state, where no client is sent it.

References:
    Tao Fan, Yan Kang, Guoqiang Ma, Lixin Fan, Kai Chen and Qiang Yang. "FedCoLLM: A Parameter-Efficient
    Federated Co-tuning Framework for Large and Small Language Models." 2024.
    https://arxiv.org/abs/2411.11707
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import final

from lichen.algorithms.average import Average
from lichen.algorithms.scores import is_validated, mean_loss, score
from lichen.core import tree as trees
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.fold import fold
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.research.mutual.alignment import Bridge
from lichen.research.mutual.mutual import carried, distill_step, null_targets
from lichen.transforms.downlink import WHOLE

__all__ = ["CoTune", "CoTunedModel", "large_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoTunedModel:
    """One of the two models at the server.

    Attributes:
        report: Its telling of the public texts, not personal.
        distill: Its listening, not personal.
        bridge: Carries the other's answers to its vocabulary.
    """

    report: ClientTask
    distill: ClientTask
    bridge: Bridge


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoTune:
    """FedCoLLM's round.

    Attributes:
        average: The small model's rounds; it sends all tensors whole and validates nothing itself.
        small: The small model at the server.
        large: The large one.
        start: The large one's tensors before the first round.
        valid: The clients' validating work; None for none.
        valid_every: Rounds between validations. The best validated small model is kept.
        transfer: Whether answers are believed; without it both take the same steps on the same texts with nobody told
            anything, which is what knowledge is held against.

    Raises:
        LichenError: if ``average`` validates, or does not send everybody all tensors.
    """

    average: Average
    small: CoTunedModel
    large: CoTunedModel
    start: Tree
    valid: str | None = "valid"
    valid_every: int = 1
    transfer: bool = True

    def __post_init__(self) -> None:
        if self.average.valid is not None or self.average.downlink != WHOLE:
            raise LichenError(
                "the average would judge, cut or code a model that is yet to listen",
                where="federation",
                fix="give it valid=None and leave downlink out",
            )

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round: the small model, and the large one where no client is sent it."""
        state = self.average.init(shared)
        return replace(state, optimizer=trees.join("large/", self.start, state.optimizer))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """Average, tell, listen both ways, judge."""
        started, down = time.perf_counter(), engine.bytes_down
        up = engine.bytes_up
        large, optimizer = trees.split(state.optimizer, "large/")
        settings = {"lr_scale": self.average.lr_scale(state.round)}
        state, report = self.average.round(replace(state, optimizer=optimizer), engine, seed)
        small, metrics = state.shared, dict(report.metrics)
        reports = [_reported(tuned, shared) for tuned, shared in ((self.small, small), (self.large, Shared(large)))]
        metrics |= {"small_public": mean_loss(reports[0].metrics), "large_public": mean_loss(reports[1].metrics)}
        distilled: list[Shared] = []
        for name, tuned, shared, other in (
            ("small", self.small, small, reports[1]),
            ("large", self.large, Shared(large), reports[0]),
        ):
            message = carried(other, tuned.bridge)
            answers = {f"answers.{part}": message.tensors[part][0] for part in ("index", "prob")}
            answers = answers if self.transfer else null_targets(answers)
            after, metrics[f"{name}_loss"] = distill_step(
                tuned.distill, shared, answers, seed=derive(seed, name), settings=settings
            )
            distilled.append(after)
        state = replace(
            state, shared=distilled[0], optimizer=trees.join("large/", distilled[1].trainable, state.optimizer)
        )
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if self.valid and is_validated(state.round, self.valid_every, self.average.rounds):
            state, metrics["valid"] = self._validate(state, engine)
        return state, replace(
            report,
            metrics=metrics,
            bytes_up=engine.bytes_up - up,
            bytes_down=engine.bytes_down - down,
            seconds=time.perf_counter() - started,
            valid_up=engine.bytes_up - trained_up,
            valid_down=engine.bytes_down - trained_down,
        )

    def _validate(self, state: ServerState, engine: Engine) -> tuple[ServerState, float]:
        everyone = tuple(range(self.average.weight_N.shape[0]))
        job = Job(
            work=str(self.valid),
            shared=state.shared,
            version=state.round,
            clients=everyone,
            seed=0,
            base=self.average.base,
        )
        value = mean_loss(score(engine, job)[1])
        if math.isnan(state.best_value) or value < state.best_value:
            state = replace(state, best=state.shared, best_round=state.round, best_value=value)
        return state, value


def large_of(state: ServerState) -> Tree:
    """The large model's tensors out of a state of :class:`CoTune`."""
    return trees.split(state.optimizer, "large/")[0]


def _reported(tuned: CoTunedModel, shared: Shared) -> Message:
    """What a model says of the public texts."""
    job = Job(work="tell", shared=shared, version=0, clients=(0,), seed=0)
    return fold(tuned.report.work, tuned.report.source.batches((0,), 0), job, (0,))[0]
