"""The chain of gradient steps, and its first members: clip, proximal pull, weight decay.

A chain's order is what it says: ``(Clip(1.0), Proximal(0.1))`` cuts the loss's gradient and then adds a pull of any
size; the other way round, their sum is cut.

References:
    Razvan Pascanu, Tomas Mikolov and Yoshua Bengio. "On the difficulty of training Recurrent Neural
    Networks." ICML 2013. https://arxiv.org/abs/1211.5063 (norm clipping).
    Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar and Virginia Smith.
    "Federated Optimization in Heterogeneous Networks." MLSys 2020. https://arxiv.org/abs/1812.06127 (the pull).
    Ilya Loshchilov and Frank Hutter. "Decoupled Weight Decay Regularization." ICLR 2019.
    https://arxiv.org/abs/1711.05101 (why L2 and weight decay differ under Adam).

Legend: C clients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lichen.clients.training.gradient_step import GradientStep
from lichen.clients.training.optimize import clip_C
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.expected import TensorSpec
from lichen.core.message import Job
from lichen.core.tree import Tree

__all__ = ["Clip", "GradientChain", "Proximal", "Stateless", "WeightDecay"]


class Stateless(ABC):
    """A :class:`lichen.clients.training.gradient_step.GradientStep` that keeps nothing and sends nothing."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called."""

    @abstractmethod
    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients after this link, and the state as it was."""

    @final
    def own(self, trainable_C: Tree) -> Tree:
        """Nothing."""
        return {}

    @final
    def sends(self, trained: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
        """Nothing."""
        return {}

    @final
    def init(self, job: Job, clients: Sequence[int], params_C: Tree, own_C: Tree) -> Tree:
        """Nothing."""
        return {}

    @final
    def final(self, state: Tree, delta_C: Tree, steps_C: Tensor) -> tuple[Tree, Tree]:
        """Nothing."""
        return {}, {}


@final
@dataclass(frozen=True, slots=True)
class Clip(Stateless):
    """Cuts each client's gradient to a Euclidean norm; smaller ones keep their bits.

    Args:
        max_norm: The norm at most.

    Raises:
        LichenError: if it is not positive.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise LichenError(f"{self.max_norm} is not positive", where="train.clip", fix="use a number > 0, or none")

    @property
    def name(self) -> str:
        """``clip``."""
        return "clip"

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients, cut."""
        return clip_C(grads_C, self.max_norm, exact=exact), state


@final
@dataclass(frozen=True, slots=True)
class WeightDecay(Stateless):
    """Adds ``rate * w`` to the gradient: the L2 penalty ``rate / 2 * |w|^2``.

    At the end of a chain it gives the bits of ``ClientOptimizer("sgd", weight_decay=rate)``, which stays for recipes.
    The link is for other places in a chain, such as before a clip. It is not AdamW's decay, which does not pass
    through the moments: that is ``ClientOptimizer("adamw", weight_decay=...)``.

    Args:
        rate: Of the decay.

    Raises:
        LichenError: if it is negative or no number.
    """

    rate: float

    def __post_init__(self) -> None:
        _check_rate(self.rate, "train.weight_decay")

    @property
    def name(self) -> str:
        """``weight_decay``."""
        return "weight_decay"

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients with the parameters' share added."""
        return trees.add(grads_C, trees.scale(params_C, self.rate)), state


@final
@dataclass(frozen=True, slots=True)
class Proximal:
    """Adds ``mu * (w - w_shared)``: FedProx's pull to the shared tensors, and in personal training Ditto's.

    Args:
        mu: How strong it is.

    Raises:
        LichenError: if it is negative or no number.
    """

    mu: float

    def __post_init__(self) -> None:
        _check_rate(self.mu, "train.prox")

    @property
    def name(self) -> str:
        """``proximal``."""
        return "proximal"

    def own(self, trainable_C: Tree) -> Tree:
        """Nothing."""
        return {}

    def sends(self, trained: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
        """Nothing."""
        return {}

    def init(self, job: Job, clients: Sequence[int], params_C: Tree, own_C: Tree) -> Tree:
        """The shared tensors as the job brought them, without client axis."""
        return {name: job.shared.trainable[name] for name in params_C}

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients with the pull added."""
        return trees.add(grads_C, trees.scale(trees.sub(params_C, state), self.mu)), state

    def final(self, state: Tree, delta_C: Tree, steps_C: Tensor) -> tuple[Tree, Tree]:
        """Nothing."""
        return {}, {}


def _check_rate(rate: float, where: str) -> None:
    if not (math.isfinite(rate) and rate >= 0):
        raise LichenError(f"{rate} is out of range", where=where, fix="use a number >= 0")


@final
@dataclass(frozen=True, slots=True)
class GradientChain:
    """Gradient steps one after the other; itself a :class:`lichen.clients.training.gradient_step.GradientStep`.

    Its state and its private state hold those of its links, under their places and their names.

    Args:
        steps: The links, first to last.

    >>> import torch
    >>> grads, ones, active_C = {"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.ones(1, 2)}, torch.tensor([True])
    >>> def after(*steps):
    ...     return GradientChain(steps).update(grads, {}, ones, active_C=active_C, exact=True)[0]["w"]
    >>> after(Clip(1.0), WeightDecay(0.5)), after(WeightDecay(0.5), Clip(1.0))
    (tensor([[1.1000, 1.3000]]), tensor([[0.6139, 0.7894]]))
    """

    steps: tuple[GradientStep, ...]

    @property
    def name(self) -> str:
        """``chain``."""
        return "chain"

    def own(self, trainable_C: Tree) -> Tree:
        """What its links keep.

        Raises:
            LichenError: if two links keep something under one name.
        """
        every: Tree = {}
        for step in self.steps:
            mine = trees.join(f"{step.name}/", step.own(trainable_C), {})
            if every.keys() & mine.keys():
                raise LichenError(f"two gradient steps keep {step.name!r}", where="train", fix="name them apart")
            every |= mine
        return every

    def sends(self, trained: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
        """What its links send."""
        return {name: spec for step in self.steps for name, spec in step.sends(trained).items()}

    def init(self, job: Job, clients: Sequence[int], params_C: Tree, own_C: Tree) -> Tree:
        """The states of its links."""
        state: Tree = {}
        for k, step in enumerate(self.steps):
            mine, _ = trees.split(own_C, f"{step.name}/")
            state = trees.join(f"{k}/", step.init(job, clients, params_C, mine), state)
        return state

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients after its last link."""
        after: Tree = {}
        for k, step in enumerate(self.steps):
            mine, _ = trees.split(state, f"{k}/")
            grads_C, mine = step.update(grads_C, mine, params_C, active_C=active_C, exact=exact)
            after = trees.join(f"{k}/", mine, after)
        return grads_C, after

    def final(self, state: Tree, delta_C: Tree, steps_C: Tensor) -> tuple[Tree, Tree]:
        """What its links send and keep.

        Raises:
            LichenError: if two of them send a tensor of one name.
        """
        sent_C: Tree = {}
        own_C: Tree = {}
        for k, step in enumerate(self.steps):
            mine, _ = trees.split(state, f"{k}/")
            more_C, own_after = step.final(mine, delta_C, steps_C)
            if both := sent_C.keys() & more_C.keys():
                raise LichenError(f"two gradient steps send {min(both)!r}", where="train", fix="name them apart")
            sent_C, own_C = {**sent_C, **more_C}, trees.join(f"{step.name}/", own_after, own_C)
        return sent_C, own_C
