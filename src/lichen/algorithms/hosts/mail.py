"""What walks between the hosts of a pipeline: outputs on their way to the neighbour that waits for them.

References: those of :mod:`lichen.clients.pipeline.schedule`.

Legend: B rows, T tokens, H width, P trained tensors of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.algorithms.hosts.micro_batches import Rows, labelled
from lichen.clients.pipeline.host import MOMENTS, PipelineHost, job_turns
from lichen.clients.pipeline.schedule import Op, Turn
from lichen.clients.training.optimize import factor_of_squares
from lichen.core.contracts.algorithm import ServerState
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["PIPELINE", "Mail", "Stage", "stages_of", "work_metrics"]

PIPELINE = "pipeline"
"""The name of the hosts' work in a job."""

WORKED = {"gone": torch.ones(1)}
"""The answer to a host that waits for nothing but that its output has come."""


@final
@dataclass(slots=True)
class Stage:
    """How far one host has come.

    Attributes:
        job: What it does.
        turns: Its questions.
        expected: What each must be.
        questions: How many have come.
        want: What it waits for now; None: it works, or nothing was wanted.
        waits: It waits for an answer.
        then: Virtual seconds at which it is free.
        busy: Seconds that it worked.
        end: Its message, once it has come.
    """

    job: Job
    turns: list[Turn]
    expected: list[Expected]
    questions: int = 0
    want: tuple[int, Op] | None = None
    waits: bool = False
    then: float = 0.0
    busy: float = 0.0
    end: Message | None = None


@final
class Mail:
    """Outputs on their way to the neighbour that waits for them, with the virtual second at which they were there.

    Args:
        steps: Each step's micro-batches.
        clip: The norm of a step's mean gradient at most; None: any.
        names: Of each host the tensors that it trains, sorted.

    Attributes:
        losses: Of rows that are scored what the last host said, by micro-batch.
    """

    def __init__(self, steps: Sequence[Sequence[Rows]], clip: float | None, names: Sequence[Sequence[str]]) -> None:
        self.steps, self.clip, self.names, self.stages = steps, clip, names, len(names)
        self.losses: dict[int, Tree] = {}
        self._inputs: dict[tuple[int, int, Op], tuple[Tensor, float]] = {}
        self._squares: dict[int, dict[int, tuple[Tensor, float]]] = {}

    def put(self, place: int, step: int, turn: Turn, message: Message, now: float) -> None:
        """Take the output of a host's question."""
        tensors, given = message.tensors, turn.gives
        if given is not None and "loss_B" in tensors:
            self.losses[given.micro] = tensors
        elif given is not None:
            forward = given.kind == "forward"
            there = place + 1 if forward else place - 1
            self._inputs[there, step, given] = tensors["hidden_BTH" if forward else "grad_BTH"], now
        if "squares_P" in tensors:
            self._squares.setdefault(step, {})[place] = tensors["squares_P"][0], now

    def answer(self, place: int, stage: Stage) -> Tree | None:
        """What a host that waits can be answered now; None: nothing yet."""
        if stage.want is None:
            return WORKED
        step, op = stage.want
        if op.kind == "step":
            return self._factor(stage, step)
        found: Tree = {}
        if op.kind == "backward" or place > 0:
            came = self._inputs.pop((place, step, op), None)
            if came is None:
                return None
            stage.then = max(stage.then, came[1])
            found["hidden_BTH" if op.kind == "forward" else "grad_BTH"] = came[0]
        if op.kind == "backward":
            return found
        micro = self.steps[step][op.micro]
        found["length_B"] = micro["length_B"][None]
        found["count"] = torch.tensor([sum(labelled(one) for one in self.steps[step])])
        if place == 0:
            found["ids_BT"] = micro["ids_BT"][None]
        if place == self.stages - 1:
            found["labels_BT"] = micro["labels_BT"][None]
        return found

    def _factor(self, stage: Stage, step: int) -> Tree | None:
        """What every host multiplies its mean gradient by; None until all squares are there, where they are needed."""
        if self.clip is None:
            return {"factor": torch.ones(1, dtype=torch.float64)}
        squares = self._squares.get(step, {})
        if len(squares) < self.stages:
            return None
        stage.then = max(stage.then, *(now for _, now in squares.values()))
        each = {name: x for place, (x_P, _) in squares.items() for name, x in zip(self.names[place], x_P, strict=True)}
        return {"factor": torch.tensor([factor_of_squares(each, self.clip)], dtype=torch.float64)}


def stages_of(
    host: PipelineHost, names: Sequence[frozenset[str]], state: ServerState, settings: Mapping[str, float], seed: int
) -> list[Stage]:
    """All hosts before their first question, each with the job of its piece.

    Args:
        host: What the hosts do.
        names: Of each host the tensors that it trains.
        state: The adapter and the optimizer's state of the whole.
        settings: Of the jobs: ``steps``, ``micro``, ``train``, ``lr_scale``.
        seed: Of the jobs.
    """
    stages = []
    for place, mine in enumerate(names):
        trainable = {name: x for name, x in state.shared.trainable.items() if name in mine}
        moments = {
            f"{MOMENTS}.{name}": x
            for name, x in state.optimizer.items()
            if name == "step" or name.partition("/")[2] in mine
        }
        frozen = moments if trainable and settings["train"] else {}
        job = Job(
            work=PIPELINE,
            shared=Shared(trainable, frozen=frozen),
            version=state.round,
            clients=(place,),
            seed=seed,
            settings=settings,
        )
        turns = list(job_turns(job, host.stages, host.order)) * int(settings["steps"])
        stages.append(Stage(job=job, turns=turns, expected=list(host.questions(job))))
    return stages


def work_metrics(stages: Sequence[Stage]) -> dict[str, float]:
    """The loss of a round, and how long hosts worked and waited."""
    last, pace, busy = stages[-1].end, max(stage.then for stage in stages), sum(stage.busy for stage in stages)
    assert last is not None
    loss_sum, count = (float(last.metrics[name][0]) for name in ("loss_sum", "count"))
    idle = 1 - busy / (len(stages) * pace) if pace else 0.0
    return {"loss": loss_sum / max(count, 1.0), "busy": busy, "pace": pace, "idle": idle}
