"""Bytes between the hosts of a pipeline and whoever runs it, counted without a model.

A round is gone through as it will be, by its own turns and its own mail; in the place of each output stands one number
of the output's shape. What is counted is what an engine counts: jobs, questions, answers and the messages at the end.

Legend: C = 1, B rows, T tokens, H width, K bytes of a coded token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.algorithms.hosts.mail import Mail, Stage, stages_of
from lichen.algorithms.hosts.micro_batches import Rows, one_by_one, scoring
from lichen.algorithms.hosts.pipeline import Pipeline
from lichen.algorithms.scores import is_validated
from lichen.core.contracts.algorithm import ServerState
from lichen.core.expected import ANY, Expected
from lichen.core.message import Job, Message, size, sizes
from lichen.core.tree import Tree
from lichen.core.wire.answer import answer_size
from lichen.core.wire.shared import Shared
from lichen.recipes.plan.traffic import TrafficEstimate

__all__ = ["host_traffic"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a run will draw.

    Attributes:
        seeds: Of its rounds.
        invited: Who is invited to each, whose rows are trained on.
        tokens: That are trained on, in all.
        validations: How often all clients validate.
    """

    seeds: Sequence[int]
    invited: tuple[tuple[int, ...], ...]
    tokens: int
    validations: int


def host_traffic(pipeline: Pipeline, start: Shared, seeds: Sequence[int]) -> tuple[TrafficEstimate, Sampled]:
    """Bytes of the federated column to the byte of the run, and what it draws.

    Args:
        pipeline: The recipe's.
        start: What training begins from.
        seeds: Of its rounds.
    """
    state, up, down, tokens = pipeline.init(start), 0, 0, 0
    invited = list[tuple[int, ...]]()
    for r, seed in enumerate(seeds):
        clients, steps = pipeline.sampled(seed)
        sent = _walked(pipeline, replace(state, round=r), pipeline.training(r), seed, steps)
        up, down = up + sent[0], down + sent[1]
        invited.append(clients)
        tokens += sum(int(micro["length_B"].sum()) for step in steps for micro in step)
    everyone, valid_up, valid_down = range(len(pipeline.weight_N)), 0, 0
    times = sum(is_validated(r, pipeline.valid_every, pipeline.rounds) for r in range(1, len(seeds) + 1))
    micros, _ = one_by_one(pipeline.valid, everyone)
    if micros:
        unmoved = ServerState(round=1, shared=start)
        valid_up, valid_down = (times * one for one in _walked(pipeline, unmoved, scoring(len(micros)), 0, [micros]))
    trainings, rounds = max(1, sum(map(len, invited))), max(1, len(seeds))
    found = TrafficEstimate(
        client_up=round(up / trainings),
        client_down=round(down / trainings),
        round_up=round((up + valid_up) / rounds),
        round_down=round((down + valid_down) / rounds),
        up=up + valid_up,
        down=down + valid_down,
        valid_up=valid_up,
        valid_down=valid_down,
        validators=len(everyone) if micros else 0,
    )
    return found, Sampled(seeds=seeds, invited=tuple(invited), tokens=tokens, validations=times)


def _walked(
    pipeline: Pipeline,
    state: ServerState,
    settings: Mapping[str, float],
    seed: int,
    steps: Sequence[Sequence[Rows]],
) -> tuple[int, int]:
    """``(bytes up, bytes down)`` of all hosts' jobs."""
    host = pipeline.host
    stages = stages_of(host, pipeline.names, state, settings, seed)
    mail = Mail(steps, pipeline.clip, [sorted(stage.job.shared.trainable) for stage in stages])
    up, down, moved = 0, sum(sizes(stage.job) for stage in stages), True
    while moved:
        moved = False
        for place, stage in enumerate(stages):
            while stage.waits or stage.questions < len(stage.turns):
                if not stage.waits:
                    up += _put_question(place, stage, mail)
                answer = mail.answer(place, stage)
                if answer is None:
                    break
                stage.waits, moved = False, True
                down += answer_size(answer)
    assert not any(stage.waits for stage in stages)
    return up + sum(size(_message(stage.job, host.expected(stage.job), {})) for stage in stages), down


def _put_question(place: int, stage: Stage, mail: Mail) -> int:
    """Put a host's next question into the mail; its bytes."""
    turn, step = stage.turns[stage.questions], stage.questions // (len(stage.turns) // len(mail.steps))
    expected = stage.expected[stage.questions]
    rows = {} if turn.gives is None else mail.steps[step][turn.gives.micro]
    message = _message(stage.job, expected, rows)
    stage.questions += 1
    mail.put(place, step, turn, message, 0.0)
    stage.want, stage.waits = None if turn.wants is None else (step, turn.wants), True
    return size(message)


def _message(job: Job, expected: Expected, rows: Rows) -> Message:
    """A message as it is declared, about these rows; each tensor is one number in memory."""
    shape = tuple(rows["ids_BT"].shape) if rows else ()

    def one(open_: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numbers = [shape[at] if n == ANY else n for at, n in enumerate(open_)]
        return torch.zeros((), dtype=dtype).expand(1, *numbers)

    tensors: Tree = {name: one(spec.shape, spec.dtype) for name, spec in expected.tensors.items()}
    return Message(
        group=expected.group,
        client_C=torch.tensor(job.clients),
        version_C=torch.tensor([job.version]),
        tensors=tensors,
        weight_C=torch.ones(1, dtype=torch.float64),
        metrics={name: torch.zeros(1, dtype=torch.float64) for name in expected.metrics},
    )
