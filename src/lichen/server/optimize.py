"""Server optimizers on the mean change (FedOpt): SGD, which is plain averaging at rate 1, Adam and Yogi.

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
from functools import partial
from typing import Literal, final

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
            raise LichenError(
                f"{self.momentum} is out of range", where="federation.server.momentum", fix="use 0 <= m < 1"
            )
        if self.nesterov and not self.momentum:
            raise LichenError(
                "looks ahead along no momentum", where="federation.server.nesterov", fix="set server.momentum"
            )

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
            x = x.to(state[f"m/{name}"])
            state[f"m/{name}"] = m = self.momentum * state[f"m/{name}"] + x
            return self.lr * (x + self.momentum * m if self.nesterov else m)

        return _apply(change, shared, stride), state


@final
@dataclass(frozen=True, slots=True)
class ServerAdaptive:
    """FedAdam and FedYogi: ``shared + lr * m / (sqrt(v) + tau)``.

    Args:
        rule: How ``v`` follows the squares x²: ``"adam"`` by decay, ``"yogi"`` by at most
            ``(1 - beta2) x²`` a round.
        lr: Rate.
        betas: Decay rates of ``m`` and ``v``.
        tau: Floor; smaller is more adaptive.

    Raises:
        LichenError: if a value is out of range.
    """

    rule: Literal["adam", "yogi"]
    lr: float = 0.01
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.rule not in ("adam", "yogi"):
            raise LichenError(f"unknown rule {self.rule!r}", where="federation.server.name", fix="use adam or yogi")
        _check_lr(self.lr)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise LichenError(
                f"{self.betas} is out of range", where="ServerAdam.betas", fix="use two numbers in [0, 1)"
            )
        if not self.tau > 0:
            raise LichenError(
                f"{self.tau} is not positive", where="ServerAdam.tau", fix="use a number > 0, such as 0.001"
            )

    def init(self, shared: Tree) -> Tree:
        """``m`` zero, ``v`` at tau²."""
        steps = _steps(shared)
        second = trees.map_tree(lambda x: torch.full_like(x, self.tau**2), steps)
        return trees.join("m/", trees.zeros_like(steps), trees.join("v/", second, {}))

    def update(self, change: Tree, state: Tree, shared: Tree) -> tuple[Tree, Tree]:
        """``(shared, state)`` after one step; raises as :meth:`ServerSGD.update`."""
        beta1, beta2 = self.betas
        state = dict(state)

        def stride(name: str, x: Tensor) -> Tensor:
            x = x.to(state[f"m/{name}"])
            state[f"m/{name}"] = m = beta1 * state[f"m/{name}"] + (1 - beta1) * x
            v, square = state[f"v/{name}"], x.square()
            if self.rule == "adam":
                v = beta2 * v + (1 - beta2) * square
            else:
                v = v - (1 - beta2) * square * torch.sign(v - square)
            state[f"v/{name}"] = v
            return self.lr * m / (v.sqrt() + self.tau)

        return _apply(change, shared, stride), state


ServerAdam = partial(ServerAdaptive, "adam")
"""FedAdam."""

ServerYogi = partial(ServerAdaptive, "yogi")
"""FedYogi."""


def _steps(shared: Tree) -> Tree:
    return {name: x for name, x in shared.items() if not name.startswith(_REPLACED)}


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
        # A change in float64 is added there: it may name the new value to its last bit, far from the old one.
        new[name] = (shared[name] + stride(name, x.to(shared[name].device))).to(shared[name])
    return new


def _check_lr(lr: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise LichenError(f"{lr} is not a positive rate", where="federation.server.lr", fix="use a number > 0")
