"""The host of one piece of a model: a dialogue whose questions carry outputs and whose answers bring inputs.

The host of stage s is client s of the engine. It keeps nothing between rounds: its part of the adapter and of the
optimizer's state comes with the job and leaves with the message, so that any other host that loads the piece can take
its place, and gives the same bytes. Hidden states leave it forward, their gradients backward; tokens come to the first
host alone, and labels to the last.

Of a step the gradients of all micro-batches are added up, divided by the number of labelled tokens and, where they are
clipped, by a factor that follows from the squares of all hosts.

Legend: B rows, T tokens, H width, P trained tensors of the piece.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from lichen.clients.pipeline.coded_link import CodedLink
from lichen.clients.pipeline.schedule import Op, Order, Turn, turns_of
from lichen.clients.training.optimize import ClientOptimizer
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import ANY, COUNT, Expected, TensorSpec, specs_of
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree

__all__ = ["MOMENTS", "PipelineHost", "job_turns"]

MOMENTS = "moments"
"""The group of frozen tensors that a job's optimizer state is."""

WALKING = ("hidden_BTH", "grad_BTH")
"""What crosses from one host to its neighbour."""


def job_turns(job: Job, stages: int, order: Order) -> tuple[Turn, ...]:
    """The questions of one step of a job's one host."""
    stage, micro = job.clients[0], int(job.settings["micro"])
    return turns_of(stage, stages, micro, order, train=bool(job.settings["train"]))


def mean_and_squares(grads: Tree, count: int) -> tuple[Tree, Tensor]:
    """``(mean gradients, squares)``: sums divided by a count, and each one's sum of squares, ``(P,)`` by name."""
    mean = {name: x / max(count, 1) for name, x in grads.items()}
    squares = [mean[name][0].square().sum() for name in sorted(mean)]
    return mean, torch.stack(squares) if squares else torch.zeros(0)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One step of a host: what has gone forward and not come back, and the gradients so far."""

    leaves_C: Tree
    graphs: dict[int, tuple[Tensor, Tensor | None]]
    grads: Tree
    sums: dict[str, float]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PipelineHost:
    """The work of all hosts; a :class:`lichen.core.contracts.client.Dialogue`.

    Attributes:
        piece: Loads the piece of a stage: a :class:`lichen.models.pieces.piece_cohort.PieceCohort`, of the last stage a
            :class:`lichen.models.causal_cohort.CausalCohort`.
        stages: How many hosts.
        order: The schedule.
        optimizer: Steps the piece's adapter.
        link: How its outputs cross.
    """

    piece: Callable[[int], Any]
    stages: int
    order: Order
    optimizer: ClientOptimizer
    link: CodedLink

    def questions(self, job: Job) -> Sequence[Expected]:
        """Hidden states or their gradients, the squares of the step, or losses by row."""
        step = [self._expected(job, turn) for turn in job_turns(job, self.stages, self.order)]
        return step * int(job.settings["steps"])

    def _expected(self, job: Job, turn: Turn) -> Expected:
        tensors: dict[str, TensorSpec] = {}
        last = job.clients[0] == self.stages - 1
        if turn.gives is not None and turn.gives.kind == "forward" and last:
            tensors = {"loss_B": TensorSpec((ANY,)), "count_B": TensorSpec((ANY,), torch.int64)}
        elif turn.gives is not None:
            name = "hidden_BTH" if turn.gives.kind == "forward" else "grad_BTH"
            tensors = {name: self.link.spec}
        if turn.wants == Op("step"):
            tensors["squares_P"] = TensorSpec((len(job.shared.trainable),))
        return Expected(group=self._group(job), tensors=tensors, metrics={"seconds": COUNT})

    def _group(self, job: Job) -> str:
        return f"pipeline/{job.clients[0]}"

    def expected(self, job: Job) -> Expected:
        """The piece's adapter and optimizer state, as they came."""
        tensors = specs_of(job.shared.trainable | job.shared.group(MOMENTS)) if job.settings["train"] else {}
        return Expected(
            group=self._group(job), tensors=tensors, metrics={"seconds": COUNT, "loss_sum": COUNT, "count": COUNT}
        )

    def talk(
        self, job: Job, clients: Sequence[int], own_C: Tree | None, batches: Iterable[Batch]
    ) -> Generator[Message, Tree, tuple[Message, Tree | None]]:
        """All steps of a round, or the scores of some rows."""
        del own_C, batches
        (stage,) = clients
        piece, turns = self.piece(stage), job_turns(job, self.stages, self.order)
        params_C = {name: x[None] for name, x in job.shared.trainable.items()}
        moments_C = {name: x[None] for name, x in job.shared.group(MOMENTS).items()}
        train, total, seconds = bool(job.settings["train"]), {"loss_sum": 0.0, "count": 0.0}, 0.0
        message, count, number = partial(_message, job, self._group(job)), 0, 0
        for _ in range(int(job.settings["steps"])):
            step = _Step({n: x.detach().requires_grad_(train) for n, x in params_C.items()}, {}, {}, total)
            out: Tree = {}
            for turn in turns:
                if turn.wants == Op("step"):
                    mean_C, out["squares_P"] = mean_and_squares(step.grads, count)
                answer = yield message(out, {"seconds": seconds})
                begun, out, number = time.perf_counter(), {}, number + 1
                answer = {name: self.link.arrived(x) if name in WALKING else x for name, x in answer.items()}
                count = int(answer["count"][0]) if "count" in answer else count
                for op in turn.runs:
                    if op.kind == "forward":
                        out = self._forward(piece, stage, step, op.micro, answer, train=train)
                    elif op.kind == "backward":
                        out = self._backward(stage, step, op.micro, answer.get("grad_BTH"))
                    elif params_C:
                        factor = answer["factor"][0]
                        params_C, moments_C = self.optimizer.update(
                            {name: x * factor.to(x) for name, x in mean_C.items()},
                            moments_C,
                            params_C,
                            active_C=torch.ones(1, dtype=torch.bool),
                            lr_scale=job.settings["lr_scale"],
                        )
                seed = derive(job.seed, job.work, stage, "code", number)
                out = {name: self.link.departing(x, seed) if name in WALKING else x for name, x in out.items()}
                seconds = time.perf_counter() - begun
        tensors = {name: x[0] for name, x in (params_C | moments_C).items()} if train else {}
        return message(tensors, {"seconds": seconds, **total}), None

    def _forward(self, piece: Any, stage: int, step: _Step, micro: int, answer: Tree, *, train: bool) -> Tree:
        """What goes on to the next host; of the last one the losses of rows that are scored."""
        entry = answer["ids_BT"].long() if stage == 0 else answer["hidden_BTH"]
        batch = {"active_C": torch.ones(1, dtype=torch.bool), ("input_ids_CBT" if stage == 0 else "hidden_CBTH"): entry}
        across_T = torch.arange(entry.shape[2], device=entry.device)
        batch["attention_mask_CBT"] = (across_T < answer["length_B"][..., None]).long()
        if stage > 0 and train:
            batch["hidden_CBTH"] = entry = entry.detach().requires_grad_()
        with torch.set_grad_enabled(train):
            if stage < self.stages - 1:
                hidden_CBTH = piece.hidden(step.leaves_C, {}, batch)
                step.graphs[micro] = hidden_CBTH, entry if stage > 0 else None
                return {"hidden_BTH": hidden_CBTH.detach()[0]}
            batch["labels_CBT"] = answer["labels_BT"].long()
            if not train:
                loss_CB, count_CB = piece.losses(step.leaves_C, {}, batch)
                return {"loss_B": loss_CB[0].float(), "count_B": count_CB[0].long()}
            loss_C, count_C = piece.loss(step.leaves_C, {}, batch)
        step.sums["loss_sum"] += float(loss_C.detach()[0])
        step.sums["count"] += float(count_C[0])
        step.graphs[micro] = loss_C, entry if stage > 0 else None
        return {}

    def _backward(self, stage: int, step: _Step, micro: int, grad_BTH: Tensor | None) -> Tree:
        """What goes back to the host before; the gradients of the piece's own tensors are added up."""
        out, entry = step.graphs.pop(micro)
        inputs = [*step.leaves_C.values(), *([] if entry is None else [entry])]
        if not inputs:
            return {}
        seed = None if grad_BTH is None else grad_BTH.to(out)
        if out.requires_grad:
            found = torch.autograd.grad(out, inputs, seed, allow_unused=True, materialize_grads=True)
        else:
            found = tuple(torch.zeros_like(x) for x in inputs)
        for name, grad in zip(step.leaves_C, found, strict=False):
            step.grads[name] = step.grads[name] + grad if name in step.grads else grad
        return {} if entry is None else {"grad_BTH": found[-1][0]}


def _message(job: Job, group: str, tensors: Tree, metrics: dict[str, float]) -> Message:
    if not all(bool(x.isfinite().all()) for x in tensors.values() if x.is_floating_point()):
        raise LichenError(
            "came to numbers that are not finite", where=f"host {job.clients[0]}", fix="lower optimizer.lr"
        )
    return Message(
        group=group,
        client_C=torch.tensor(job.clients),
        version_C=torch.tensor([job.version]),
        tensors={name: x[None] for name, x in tensors.items()},
        weight_C=torch.ones(1, dtype=torch.float64),
        metrics={name: torch.tensor([x], dtype=torch.float64) for name, x in metrics.items()},
    )
