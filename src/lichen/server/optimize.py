"""Server optimizers on the mean change (FedOpt): SGD, which is plain averaging at rate 1, Adam and Yogi.

Plain averaging is SGD at rate 1. Adam and Yogi adapt the rate per coordinate with a floor ``tau``; as
in the paper they have no bias correction and start from ``v = tau²``.

Only names in the change are touched. Its patches and frozen tensors are no steps but new values: they
replace those in ``shared``, and a layer's patch ``dense`` also removes its ``left`` and ``right``.

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
from lichen.core.wire.shared import Shared

__all__ = ["ServerAdam", "ServerSGD", "ServerYogi"]


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

    @property
    def stride(self) -> float:
        """How far this step goes for a unit of its change, whatever former ones still move.

        >>> ServerSGD(0.5).stride, ServerSGD(0.5, momentum=0.8, nesterov=True).stride
        (0.5, 0.9)
        """
        return self.lr * (1 + self.momentum) if self.nesterov else self.lr

    def init(self, shared: Shared) -> Tree:
        """Momentum at zero; nothing where there is none."""
        return trees.join("m/", trees.zeros_like(shared.trainable), {}) if self.momentum else {}

    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
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

    def init(self, shared: Shared) -> Tree:
        """``m`` zero, ``v`` at tau²."""
        steps = shared.trainable
        second = trees.map_tree(lambda x: torch.full_like(x, self.tau**2), steps)
        return trees.join("m/", trees.zeros_like(steps), trees.join("v/", second, {}))

    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
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


def _apply(change: Shared, shared: Shared, stride: Callable[[str, Tensor], Tensor]) -> Shared:
    before, new = shared.trainable, dict(shared.trainable)
    for name, x in change.trainable.items():
        if name not in before or before[name].shape != x.shape:
            raise LichenError(
                f"the change's tensor {name!r} of shape {tuple(x.shape)} does not fit the shared model",
                where="server optimizer",
                fix="let clients and server load the same recipe",
            )
        # A change in float64 is added there: it may name the new value to its last bit, far from the old one.
        new[name] = (before[name] + stride(name, x.to(before[name].device))).to(before[name])
    whole = [name.removesuffix("dense") for name in change.patch if name.endswith(".dense")]
    gone = {f"{layer}{half}" for layer in whole for half in ("left", "right")}
    patch = {name: x for name, x in shared.patch.items() if name not in gone}
    return Shared(new, patch=patch | change.patch, frozen=shared.frozen | change.frozen)


def _check_lr(lr: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise LichenError(f"{lr} is not a positive rate", where="federation.server.lr", fix="use a number > 0")
