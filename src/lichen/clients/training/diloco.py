"""DiLoCo's client: many local AdamW steps, with moments kept between rounds.

DiLoCo's inner half. A worker begins each round at the shared parameters, but its optimizer goes on
where it stood, and many steps later the difference goes up; the server steps along the mean
difference by SGD with Nesterov momentum (``ServerSGD(0.7, momentum=0.9, nesterov=True)``). Photon
averages plainly instead (``ServerSGD(1.0)``). The work is :class:`lichen.clients.training.train.Train`, with
three things around it:

*Streaming.* Tensors are parted into F fragments, layer by layer. Round r sends fragment r mod F alone
and takes its new shared value at the next round; the others go on from the worker's own parameters.
With rounds of H/F steps each fragment crosses every H steps, as many bytes as before in all, and the
link must carry a fragment at a time instead of a whole model.

*Dropped syncs.* With some probability a worker's answer is lost: it counts for nothing, and the
worker, which heard nothing either, goes on from its own parameters.

*A schedule over steps.* Rounds are long, so the inner rate warms up and falls by inner steps. They are
counted on the federation's clock (rounds before this one, and steps in it), so a worker that comes
back after a pause trains at everybody's rate.

What a worker keeps is private state under a version: a run that is killed and resumed ends in the same bytes.

References:
    Arthur Douillard, Qixuan Feng, Andrei A. Rusu, Rachita Chhaparia, Yani Donchev, Adhiguna Kuncoro,
    Marc'Aurelio Ranzato, Arthur Szlam and Jiajun Shen. "DiLoCo: Distributed Low-Communication Training
    of Language Models." 2023. https://arxiv.org/abs/2311.08105
    Arthur Douillard, Yanislav Donchev, Keith Rush, Satyen Kale, Zachary Charles, Zachary Garrett,
    Gabriel Teston, Dave Lacey, Ross McIlroy, Jiajun Shen, Alexandre Ramé, Arthur Szlam, Marc'Aurelio
    Ranzato and Paul Barham. "Streaming DiLoCo with overlapping communication: Towards a Distributed
    Free Lunch." 2025. https://arxiv.org/abs/2501.18512
    Lorenzo Sani, Alex Iacob, Zeyu Cao, Royson Lee, Bill Marino, Yan Gao, Dongqi Cai, Zexi Li, Wanru
    Zhao, Xinchi Qiu and Nicholas D. Lane. "Photon: Federated LLM Pre-Training." 2024.
    https://arxiv.org/abs/2411.02908

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.training.gradient_steps import GradientChain
from lichen.clients.training.optimize import Schedule, lr_factor
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import FAILED, Expected
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree

__all__ = ["Pace", "Worker", "fragment_of"]

_SINCE = "sync/since"


@final
@dataclass(frozen=True, slots=True)
class Pace:
    """The inner learning rate's factor by inner steps.

    Args:
        schedule: What comes after the warmup.
        steps: H, steps of one round.
        rounds: Rounds in all.
        warmup: Inner steps of linear rise.

    Raises:
        LichenError: if a number is not positive, the schedule is unknown, or the warmup never ends.

    >>> pace = Pace("cosine", steps=2, rounds=2)
    >>> [round(pace.at(round_, step), 2) for round_ in (0, 1) for step in (0, 1)]
    [1.0, 0.85, 0.5, 0.15]
    """

    schedule: Schedule = "constant"
    _: KW_ONLY
    steps: int
    rounds: int
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rounds < 1:
            raise LichenError(
                f"{self.rounds} rounds of {self.steps} steps", where="train.pace", fix="use numbers above 0"
            )
        self.at(0, 0)

    def at(self, version: int, step: int) -> float:
        """The factor at ``step`` of the round that starts from ``version``."""
        return lr_factor(self.schedule, version * self.steps + step, self.steps * self.rounds, warmup=self.warmup)


def fragment_of(shapes: Mapping[str, Sequence[int]], fragments: int) -> dict[str, int]:
    """Which fragment each tensor belongs to, layers whole and fragments about equally large.

    A layer is the first number in a tensor's name; tensors without one (embeddings, the last norm)
    are a layer together. The largest layer goes first, each to the fragment that is lightest so far,
    so layers of equal size are dealt out in turn: the strided pattern of Streaming DiLoCo.

    Args:
        shapes: Shape of every tensor, without client axis.
        fragments: F.

    Raises:
        LichenError: if there are fewer layers than fragments.

    >>> fragment_of({"emb": (12,), "h.0.w": (4,), "h.1.w": (4,), "h.2.w": (4,)}, 2)
    {'emb': 0, 'h.0.w': 1, 'h.1.w': 1, 'h.2.w': 1}
    """
    size: dict[int, int] = {}
    layer: dict[str, int] = {}
    for name, shape in shapes.items():
        block = trees.block_of(name)
        layer[name] = -1 if block is None else block
        numbers = 1
        for axis in shape:
            numbers *= axis
        size[layer[name]] = size.get(layer[name], 0) + numbers
    if not 1 <= fragments <= len(size):
        raise LichenError(
            f"{len(size)} layers cannot be parted into {fragments} fragments",
            where="train.fragments",
            fix=f"use 1 to {len(size)}",
        )
    weight = [0] * fragments
    place: dict[int, int] = {}
    for depth in sorted(size, key=lambda depth: (-size[depth], depth)):
        place[depth] = weight.index(min(weight))
        weight[place[depth]] += size[depth]
    return {name: place[depth] for name, depth in layer.items()}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """A block of workers in the middle of a round: their training, and the steps behind it."""

    train: TrainState
    done: int = 0


@final
@dataclass(frozen=True, slots=True)
class Worker:
    """A DiLoCo worker as a client work.

    Private state: ``opt/`` the inner optimizer, ``step/`` what gradient steps keep; with fragments or drops also
    ``params/`` and, in ``sync/since``, the first round whose sync the worker has not seen. Messages have the tensors of
    one fragment; weigh them equally (``Mean("uniform")``) as the paper does.

    Args:
        inner: The inner training; not ``personal``.
        fragments: F; 1 sends everything in every round.
        drop: Probability in [0, 1) that a round's answer is lost, drawn from (round's seed, client).
            It then has weight 0 and zeros, and the metrics ``dropped`` and ``failed`` are 1, so that
            a round that loses all answers changes nothing.
        pace: Schedule of the inner rate, times the job's ``lr_scale``; None: that alone. The source
            gives each client its steps without a gap.

    Raises:
        LichenError: if a value is out of range, or the training is personal.
    """

    inner: Train
    _: KW_ONLY
    fragments: int = 1
    drop: float = 0.0
    pace: Pace | None = None

    def __post_init__(self) -> None:
        if self.inner.personal:
            raise LichenError("a worker's training is shared", where="train.personal", fix="set personal to false")
        if self.fragments < 1:
            raise LichenError(f"{self.fragments} fragments", where="train.fragments", fix="use 1 or more")
        if not 0 <= self.drop < 1:
            raise LichenError(f"{self.drop} is out of range", where="train.drop", fix="use 0 <= drop < 1")

    @property
    def _keeps_params(self) -> bool:
        return self.fragments > 1 or self.drop > 0

    def expected(self, job: Job) -> Expected:
        """The inner training's message with this round's fragment alone, and ``dropped`` where answers may be lost."""
        inner = self.inner.expected(job)
        fragment = fragment_of({name: x.shape for name, x in self.inner.trained(job).items()}, self.fragments)
        now = job.version % self.fragments
        tensors = {name: spec for name, spec in inner.tensors.items() if fragment.get(name, now) == now}
        dropped = {"dropped": FAILED} if self.drop else {}
        return replace(inner, tensors=tensors, metrics={**inner.metrics, **dropped})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> WorkerState:
        """Workers at the shared tensors, with the optimizer and the unsynchronised fragments they had.

        Raises:
            LichenError: if the private state does not fit, or there are fewer layers than fragments.
        """
        optimizer, rest = trees.split(own_C or {}, "opt/")
        mine_C, rest = trees.split(rest, "params/")
        since_C = rest.pop(_SINCE, None)
        state = self.inner.init(job, clients, rest)
        if optimizer:
            trees.check_same(optimizer, state.optimizer, where="private state")
        else:
            optimizer = state.optimizer
        fragment = self._fragment_of(state)
        initial_C = state.shared_C
        if self._keeps_params and mine_C and since_C is not None:
            trees.check_same(mine_C, initial_C, where="private state")
            goes_on = self._goes_on(since_C, job.version)
            initial_C = {name: _choose(goes_on[fragment[name]], mine_C[name], x_C) for name, x_C in initial_C.items()}
        chain = GradientChain(self.inner.gradient_steps).init(job, clients, initial_C, state.own)
        state = replace(
            state,
            initial_C=initial_C,
            params_C=initial_C,
            chain=chain,
            optimizer=optimizer,
            initial_optimizer=optimizer,
        )
        return WorkerState(train=state)

    def step(self, state: WorkerState, batch: Batch) -> WorkerState:
        """One inner step of every active worker."""
        inner = state.train
        if self.pace is None:
            return replace(state, train=self.inner.step(inner, batch), done=state.done + 1)
        settings = inner.job.settings
        factor = self.pace.at(inner.job.version, state.done) * settings.get("lr_scale", 1.0)
        paced = replace(inner, job=replace(inner.job, settings={**settings, "lr_scale": factor}))
        moved = self.inner.step(paced, batch)
        return WorkerState(train=replace(moved, job=inner.job), done=state.done + 1)

    def final(self, state: WorkerState) -> tuple[Message, Tree | None]:
        """This round's fragment of ``params - shared``, and what the worker keeps.

        A worker that did not stay finite sends zeros of weight 0, as in :class:`Train`, and keeps what it
        had at the round's beginning.
        """
        inner = state.train
        message, inner_own = self.inner.final(inner)
        device = message.weight_C.device
        finite_C = message.metrics["failed"] == 0
        lost_C = (
            torch.tensor([self._lost(inner.job.seed, client) for client in inner.clients], device=device) & finite_C
        )
        fragment, now = self._fragment_of(inner), inner.job.version % self.fragments
        tensors = {name: x for name, x in message.tensors.items() if fragment.get(name, now) == now}
        metrics = dict(message.metrics)
        if self.drop:
            tensors = {name: _choose(lost_C, torch.zeros_like(x), x) for name, x in tensors.items()}
            metrics["dropped"] = lost_C.to(torch.float64)
            metrics["failed"] = metrics["failed"] + metrics["dropped"]
        weight_C = torch.where(lost_C, torch.zeros_like(message.weight_C), message.weight_C)
        own_C = trees.join("opt/", _settled(finite_C, inner.optimizer, inner.initial_optimizer), inner.retained)
        if inner.own:  # a lost answer told the server nothing of what gradient steps have learned
            own_C = trees.join("step/", _settled(~lost_C, trees.split(inner_own or {}, "step/")[0], inner.own), own_C)
        if self._keeps_params:
            own_C = trees.join("params/", _settled(finite_C, inner.params_C, inner.initial_C), own_C)
            own_C[_SINCE] = torch.full_like(lost_C, inner.job.version, dtype=torch.int64) + lost_C
        return replace(message, tensors=tensors, metrics=metrics, weight_C=weight_C), own_C

    def _fragment_of(self, state: TrainState) -> dict[str, int]:
        return fragment_of({name: x_C.shape[1:] for name, x_C in state.shared_C.items()}, self.fragments)

    def _goes_on(self, since_C: Tensor, version: int) -> list[Tensor]:
        """For each fragment, which workers have seen its last sync, and so go on from their own; bool ``(C,)``."""
        # The newest round before this one that synchronised fragment f; below 0 there was none.
        newest = [version - 1 - (version - 1 - f) % self.fragments for f in range(self.fragments)]
        return [since_C > last for last in newest]

    def _lost(self, seed: int, client: int) -> bool:
        return derive(seed, client, "drop") < self.drop * 2.0**63


def _choose(chosen_C: Tensor, a_C: Tensor, b_C: Tensor) -> Tensor:
    return torch.where(chosen_C.view(-1, *[1] * (a_C.dim() - 1)), a_C, b_C)


def _settled(finite_C: Tensor, now_C: Tree, before_C: Tree) -> Tree:
    return trees.map_tree(lambda now, before: _choose(finite_C, now, before), now_C, before_C)
