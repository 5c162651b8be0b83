"""Server optimizers: the round's mean change is taken for a negative gradient.

Plain averaging is SGD at rate 1. Adam and Yogi adapt the rate per coordinate with a floor ``tau``; as
in the paper they have no bias correction and start from ``v = tau²``.

Only names in the change are touched. Names under ``patch.`` and ``answers.`` are no steps but new
values: they replace those in ``shared``, and a layer's ``patch.<layer>.dense`` also removes its
``left`` and ``right``.

References:
    Sashank J. Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett, Keith Rush, Jakub Konečný, Sanjiv
    Kumar and H. Brendan McMahan. "Adaptive Federated Optimization." ICLR 2021.
    https://arxiv.org/abs/2003.00295
    Tzu-Ming Harry Hsu, Hang Qi and Matthew Brown. "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification." 2019. https://arxiv.org/abs/1909.06335 (FedAvgM)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["ServerAdam", "ServerSGD", "ServerYogi"]

_REPLACED = ("patch.", "answers.")


@final
@dataclass(frozen=True, slots=True)
class ServerSGD:
    """``shared + lr * change``, with momentum if asked; at rate 1 without momentum it is FedAvg bit for bit.

    Args:
        lr: Rate.
        momentum: In [0, 1).
        nesterov: Look ahead along the momentum.

    Raises:
        LichenError: if a value is out of range.
    """

    lr: float = 1.0
    _: KW_ONLY
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        if not 0 <= self.momentum < 1:
            raise LichenError(f"{self.momentum} is out of range", where="server.momentum", fix="use 0 <= m < 1")
        if self.nesterov and not self.momentum:
            raise LichenError("looks ahead along no momentum", where="server.nesterov", fix="set server.momentum")

    def init(self, shared: Tree) -> Tree:
        """Momentum at zero; nothing where there is none."""
        return trees.join("m/", trees.zeros_like(_steps(shared)), {}) if self.momentum else {}

    def update(self, change: Tree, state: Tree, shared: Tree) -> tuple[Tree, Tree]:
        """``(shared, state)`` after one step.

        Raises:
            LichenError: if the change does not fit ``shared``.
        """
        state = dict(state)

        def stride(name: str, x: Tensor) -> Tensor:
            if not self.momentum:
                return self.lr * x
            state[f"m/{name}"] = m = self.momentum * state[f"m/{name}"] + x
            return self.lr * (x + self.momentum * m if self.nesterov else m)

        return _apply(change, shared, stride), state


@final
@dataclass(frozen=True, slots=True)
class ServerAdam:
    """FedAdam: ``shared + lr * m / (sqrt(v) + tau)``.

    Args:
        lr: Rate.
        betas: Decay rates of ``m`` and ``v``.
        tau: Floor; smaller is more adaptive.

    Raises:
        LichenError: if a value is out of range.
    """

    lr: float = 0.01
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_adaptive(self.lr, self.betas, self.tau)

    def init(self, shared: Tree) -> Tree:
        """``m`` zero, ``v`` at tau²."""
        return _moments(shared, self.tau)

    def update(self, change: Tree, state: Tree, shared: Tree) -> tuple[Tree, Tree]:
        """``(shared, state)`` after one step; raises as :meth:`ServerSGD.update`."""
        beta2 = self.betas[1]
        return _adaptive(
            change,
            state,
            shared,
            lr=self.lr,
            beta1=self.betas[0],
            tau=self.tau,
            second=lambda v, square: beta2 * v + (1 - beta2) * square,
        )


@final
@dataclass(frozen=True, slots=True)
class ServerYogi:
    """FedYogi: as :class:`ServerAdam`, with a ``v`` that moves by at most ``(1 - beta2) x²`` a round.

    Args:
        lr: Rate.
        betas: Decay rates of ``m`` and ``v``.
        tau: Floor; smaller is more adaptive.

    Raises:
        LichenError: if a value is out of range.
    """

    lr: float = 0.01
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_adaptive(self.lr, self.betas, self.tau)

    def init(self, shared: Tree) -> Tree:
        """``m`` zero, ``v`` at tau²."""
        return _moments(shared, self.tau)

    def update(self, change: Tree, state: Tree, shared: Tree) -> tuple[Tree, Tree]:
        """``(shared, state)`` after one step; raises as :meth:`ServerSGD.update`."""
        beta2 = self.betas[1]
        return _adaptive(
            change,
            state,
            shared,
            lr=self.lr,
            beta1=self.betas[0],
            tau=self.tau,
            second=lambda v, square: v - (1 - beta2) * square * torch.sign(v - square),
        )


def _steps(shared: Tree) -> Tree:
    return {name: x for name, x in shared.items() if not name.startswith(_REPLACED)}


def _moments(shared: Tree, tau: float) -> Tree:
    steps = _steps(shared)
    second = trees.map_tree(lambda x: torch.full_like(x, tau**2), steps)
    return trees.join("m/", trees.zeros_like(steps), trees.join("v/", second, {}))


def _adaptive(
    change: Tree,
    state: Tree,
    shared: Tree,
    *,
    lr: float,
    beta1: float,
    tau: float,
    second: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tree, Tree]:
    state = dict(state)

    def stride(name: str, x: Tensor) -> Tensor:
        state[f"m/{name}"] = m = beta1 * state[f"m/{name}"] + (1 - beta1) * x
        state[f"v/{name}"] = v = second(state[f"v/{name}"], x.square())
        return lr * m / (v.sqrt() + tau)

    return _apply(change, shared, stride), state


def _apply(change: Tree, shared: Tree, stride: Callable[[str, Tensor], Tensor]) -> Tree:
    new = dict(shared)
    for name, x in change.items():
        if name.startswith(_REPLACED):
            new[name] = x
            if name.startswith("patch.") and name.endswith(".dense"):
                for half in ("left", "right"):
                    new.pop(f"{name.removesuffix('dense')}{half}", None)
            continue
        if name not in shared or shared[name].shape != x.shape:
            raise LichenError(
                f"the change's tensor {name!r} of shape {tuple(x.shape)} does not fit the shared model",
                where="server optimizer",
                fix="let clients and server load the same recipe",
            )
        new[name] = shared[name] + stride(name, x.to(shared[name]))
    return new


def _check_lr(lr: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise LichenError(f"{lr} is not a positive rate", where="server.lr", fix="use a number > 0")


def _check_adaptive(lr: float, betas: tuple[float, float], tau: float) -> None:
    _check_lr(lr)
    if not all(0 <= beta < 1 for beta in betas):
        raise LichenError(f"{betas} is out of range", where="server.betas", fix="use two numbers in [0, 1)")
    if not tau > 0:
        raise LichenError(f"{tau} is not positive", where="server.tau", fix="use a number > 0, such as 0.001")
