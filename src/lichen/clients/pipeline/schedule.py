"""In what order the host of a piece does its micro-batches, and what it waits for before each.

A batch is cut into M micro-batches, which follow one another through the S hosts of a pipeline. GPipe sends all of
them forward before the first comes back, and a host holds M of them; 1F1B lets a host go back as soon as it can, and it
holds S at most. Both add gradients up in the order of the micro-batches, and so give the same bits. While the pipeline
fills and empties hosts wait, a share of ``(S - 1) / (M + S - 1)`` of the time if all micro-batches take equally long.

References:
    Yanping Huang, Youlong Cheng, Ankur Bapna, Orhan Firat, Mia Xu Chen, Dehao Chen, HyoukJoong Lee, Jiquan Ngiam, Quoc
    V. Le, Yonghui Wu and Zhifeng Chen. "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism."
    NeurIPS 2019. https://arxiv.org/abs/1811.06965
    Deepak Narayanan, Aaron Harlap, Amar Phanishayee, Vivek Seshadri, Nikhil R. Devanur, Gregory R. Ganger, Phillip B.
    Gibbons and Matei Zaharia. "PipeDream: Generalized Pipeline Parallelism for DNN Training." SOSP 2019.
    https://doi.org/10.1145/3341301.3359646 (1F1B)

Legend: S hosts, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

__all__ = ["Op", "Order", "Turn", "bubble", "most_in_flight", "turns_of"]

Order = Literal["gpipe", "1f1b"]


@final
class Op(NamedTuple):
    """One thing that a host does.

    Attributes:
        kind: ``forward`` and ``backward`` of a micro-batch, or the optimizer's ``step``.
        micro: Which micro-batch; -1 for a step.
    """

    kind: Literal["forward", "backward", "step"]
    micro: int = -1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question of a host, and what it does once it is answered.

    Attributes:
        gives: Whose output the question carries; None: nothing.
        wants: For what the answer brings the input; None: only that the output has come.
        runs: What is then done.
    """

    gives: Op | None
    wants: Op | None
    runs: tuple[Op, ...] = ()


def _ops(stage: int, stages: int, micro: int, order: Order) -> list[Op]:
    """All that a host does in one step."""
    forward, backward = ([Op(kind, m) for m in range(micro)] for kind in ("forward", "backward"))
    if order == "gpipe":
        return [*forward, *backward, Op("step")]
    ahead = min(stages - stage - 1, micro)
    pairs = [op for pair in zip(forward[ahead:], backward, strict=False) for op in pair]
    return [*forward[:ahead], *pairs, *backward[micro - ahead :], Op("step")]


def turns_of(stage: int, stages: int, micro: int, order: Order, *, train: bool = True) -> tuple[Turn, ...]:
    """The questions of a host in one step, in their order.

    Args:
        stage: Which host, from 0.
        stages: S.
        micro: M.
        order: The schedule.
        train: Forward, backward and a step; else forward alone.

    >>> [turn.wants for turn in turns_of(1, 2, 2, "1f1b")]  # doctest: +ELLIPSIS
    [Op(kind='forward', micro=0), Op(kind='forward', micro=1), Op(kind='step', micro=-1)]
    """
    last, first = stage == stages - 1, stage == 0
    ops = _ops(stage, stages, micro, order) if train else [Op("forward", m) for m in range(micro)]
    turns: list[Turn] = []
    given: Op | None = None
    for op in ops:
        waits = op.kind != "backward" or not last
        if waits or given is not None:
            turns.append(Turn(gives=given, wants=op if waits else None))
            given = None
        turns[-1] = Turn(gives=turns[-1].gives, wants=turns[-1].wants, runs=(*turns[-1].runs, op))
        gives = (not last or not train) if op.kind == "forward" else op.kind == "backward" and not first
        given = op if gives else None
    return (*turns, Turn(gives=given, wants=None)) if given is not None else tuple(turns)


def most_in_flight(turns: Sequence[Turn]) -> int:
    """The micro-batches that a host holds at once, at most.

    >>> [most_in_flight(turns_of(0, 3, 8, order)) for order in ("gpipe", "1f1b")]
    [8, 3]
    """
    there = most = 0
    for op in (op for turn in turns for op in turn.runs):
        there += {"forward": 1, "backward": -1, "step": 0}[op.kind]
        most = max(most, there)
    return most


def bubble(stages: int, micro: int) -> float:
    """The share of the hosts' time in which they wait, if all micro-batches take equally long.

    >>> [round(bubble(3, micro), 3) for micro in (1, 4, 8)]
    [0.667, 0.333, 0.2]
    """
    return (stages - 1) / (micro + stages - 1)
