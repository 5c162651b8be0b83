"""SGD and AdamW over many clients at once, as pure functions on stacked parameters.

A cohort's parameters carry a leading client axis, so one call steps every client. Each client keeps
its own step count, because Adam's bias correction depends on it, and clients without a batch in this
step stay bit-unchanged. The arithmetic is that of ``torch.optim`` for each client alone.

*Exact* steps give a client the same bits in any company: fused kernels such as ``lerp`` and
``addcdiv`` are avoided, for their vector body and their scalar tail round differently, so a client's
bits would depend on its position in the stack. The others use them, touch memory half as often,
and never wait for an accelerator.

References:
    Boris T. Polyak. "Some methods of speeding up the convergence of iteration methods." USSR
    Computational Mathematics and Mathematical Physics 4(5), 1964 (momentum).
    Ilya Loshchilov and Frank Hutter. "Decoupled Weight Decay Regularization." ICLR 2019.
    https://arxiv.org/abs/1711.05101 (AdamW).
    Razvan Pascanu, Tomas Mikolov and Yoshua Bengio. "On the difficulty of training Recurrent Neural
    Networks." ICML 2013. https://arxiv.org/abs/1211.5063 (norm clipping).

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["ClientOptimizer", "Schedule", "clip_C", "lr_factor"]

Schedule = Literal["constant", "linear", "cosine"]


@final
@dataclass(frozen=True, slots=True)
class ClientOptimizer:
    """How a client steps, as a value.

    Args:
        name: ``"sgd"`` or ``"adamw"``.
        lr: Learning rate.
        momentum: SGD's momentum in [0, 1).
        weight_decay: L2 pull added to SGD's gradient; decoupled decay in AdamW.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's floor under the root of the second moment.

    Raises:
        LichenError: if a value is out of range.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    _: KW_ONLY
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise LichenError(f"unknown optimizer {self.name!r}", where="optimizer.name", fix="use sgd or adamw")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise LichenError(f"{self.lr} is not a learning rate", where="optimizer.lr", fix="use a number >= 0")
        if not 0 <= self.momentum < 1:
            raise LichenError(f"{self.momentum} is out of range", where="optimizer.momentum", fix="use 0 <= m < 1")
        if self.name == "adamw" and self.momentum:
            raise LichenError("adamw takes no momentum", where="optimizer.momentum", fix="set betas instead")
        if not self.weight_decay >= 0:
            raise LichenError("is negative", where="optimizer.weight_decay", fix="use a number >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise LichenError(
                f"{self.betas} is out of range", where="ClientOptimizer.betas", fix="use two numbers in [0, 1)"
            )
        if not self.eps > 0:
            raise LichenError(f"{self.eps} is not positive", where="optimizer.eps", fix="use a small number > 0")

    def init(self, params_C: Tree) -> Tree:
        """State before the first step: ``step`` of shape ``(C,)`` int64 and the moments, zeros like the params."""
        first = next(iter(params_C.values()), torch.zeros(0))
        state = {"step": torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)}
        if self.name == "adamw":
            state = trees.join("m/", trees.zeros_like(params_C), state)
            state = trees.join("v/", trees.zeros_like(params_C), state)
        elif self.momentum:
            state = trees.join("m/", trees.zeros_like(params_C), state)
        return state

    def update(
        self,
        grads_C: Tree,
        state: Tree,
        params_C: Tree,
        *,
        active_C: Tensor,
        lr_scale: float | Tensor = 1.0,
        exact: bool = True,
    ) -> tuple[Tree, Tree]:
        """One step of every active client.

        Args:
            grads_C: Gradients, ``(C, ...)``.
            state: From :meth:`init` or the last update.
            params_C: Parameters, ``(C, ...)``.
            active_C: bool ``(C,)``; the others keep params, moments and step count bit for bit.
            lr_scale: Factor on the learning rate, for all or ``(C,)`` for each client.
            exact: The same bits in any company, or fast.

        Returns:
            ``(params_C, state)`` after the step.
        """
        if not exact:
            return self._fast(grads_C, state, params_C, active_C=active_C, lr_scale=lr_scale)
        clients = active_C.shape[0]
        scale_C = [lr_scale] * clients if isinstance(lr_scale, int | float) else lr_scale.tolist()
        lr_C = [self.lr * factor for factor in scale_C]
        step_C = state["step"] + active_C.to(state["step"])
        new: Tree = {"step": step_C}
        params: Tree = {}
        # Powers as Python floats, client by client: a vectorised pow may round by position.
        counts = [max(int(step), 1) for step in step_C.tolist()]
        for name, w_C in params_C.items():
            if self.name == "sgd":
                moved, moments = self._sgd(w_C, grads_C[name], state.get(f"m/{name}"), lr_C)
            else:
                moved, moments = self._adamw(w_C, grads_C[name], state[f"m/{name}"], state[f"v/{name}"], lr_C, counts)
            params[name] = _choose(active_C, moved, w_C)
            for kind, moment in moments.items():
                new[f"{kind}/{name}"] = _choose(active_C, moment, state[f"{kind}/{name}"])
        return params, new

    def _fast(
        self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, lr_scale: float | Tensor
    ) -> tuple[Tree, Tree]:
        everyone, device = active_C.device.type == "cpu" and bool(active_C.all()), state["step"].device
        active_C = active_C.to(device, non_blocking=True)
        step_C = state["step"] + active_C
        count_C = step_C.clamp(min=1).double()
        lr_C = torch.full_like(count_C, self.lr) * (lr_scale.to(count_C) if isinstance(lr_scale, Tensor) else lr_scale)
        beta1, beta2 = self.betas
        stride_C = lr_C / (1 - beta1**count_C) if self.name == "adamw" else lr_C
        root_C = (1 - beta2**count_C).sqrt()
        params: Tree = {}
        new: Tree = {"step": step_C}
        for name, w_C in params_C.items():
            g_C, moved_C, moments = grads_C[name], w_C, {}
            if self.name == "adamw":
                moments["m"] = torch.lerp(state[f"m/{name}"], g_C, 1 - beta1)
                moments["v"] = torch.mul(state[f"v/{name}"], beta2).addcmul_(g_C, g_C, value=1 - beta2)
                floor_C = moments["v"].sqrt().div_(_column(root_C, w_C)).add_(self.eps)
                if self.weight_decay:
                    moved_C = w_C * _column(1 - lr_C * self.weight_decay, w_C)
                pull_C = torch.div(moments["m"], floor_C, out=floor_C)
            else:
                pull_C = g_C + w_C * self.weight_decay if self.weight_decay else g_C
                if self.momentum:
                    pull_C = moments["m"] = torch.add(pull_C, state[f"m/{name}"], alpha=self.momentum)
            moved_C = torch.addcmul(moved_C, pull_C, _column(stride_C, w_C), value=-1)
            params[name] = moved_C if everyone else _choose(active_C, moved_C, w_C)
            for kind, moment in moments.items():
                before = state[f"{kind}/{name}"]
                new[f"{kind}/{name}"] = moment if everyone else _choose(active_C, moment, before)
        return params, new

    def _sgd(self, w_C: Tensor, g_C: Tensor, m_C: Tensor | None, lr_C: Sequence[float]) -> tuple[Tensor, Tree]:
        if self.weight_decay:
            g_C = g_C + w_C * self.weight_decay
        if m_C is None:
            return w_C - g_C * _per_client(lr_C, w_C), {}
        m_C = m_C * self.momentum + g_C
        return w_C - m_C * _per_client(lr_C, w_C), {"m": m_C}

    def _adamw(
        self, w_C: Tensor, g_C: Tensor, m_C: Tensor, v_C: Tensor, lr_C: Sequence[float], counts: Sequence[int]
    ) -> tuple[Tensor, Tree]:
        beta1, beta2 = self.betas
        w_C = w_C * _per_client([1 - lr * self.weight_decay for lr in lr_C], w_C)
        m_C = m_C + (g_C - m_C) * (1 - beta1)
        v_C = v_C * beta2 + g_C * g_C * (1 - beta2)
        root_C = v_C.sqrt() / _per_client([math.sqrt(1 - beta2**n) for n in counts], w_C) + self.eps
        stride = _per_client([lr / (1 - beta1**n) for lr, n in zip(lr_C, counts, strict=True)], w_C)
        return w_C - m_C / root_C * stride, {"m": m_C, "v": v_C}


def _per_client(values: Sequence[float], like_C: Tensor) -> Tensor:
    column = torch.tensor(values, dtype=torch.float64).to(like_C)
    return column.view(-1, *[1] * (like_C.dim() - 1))


def _column(value_C: Tensor, like_C: Tensor) -> Tensor:
    return value_C.to(like_C.dtype).view(-1, *[1] * (like_C.dim() - 1))


def _choose(active_C: Tensor, new_C: Tensor, old_C: Tensor) -> Tensor:
    return torch.where(active_C.view(-1, *[1] * (new_C.dim() - 1)), new_C, old_C)


def clip_C(grads_C: Mapping[str, Tensor], max_norm: float, *, exact: bool = True) -> Tree:
    """Shrink each client's tree to Euclidean norm at most ``max_norm``; smaller ones keep their bits.

    The factor is ``max_norm / (norm + 1e-6)`` as in ``torch.nn.utils.clip_grad_norm_``.

    Args:
        grads_C: Gradients, ``(C, ...)``.
        max_norm: The most a client's norm may be.
        exact: The same bits in any company, or fast.

    Raises:
        LichenError: if ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise LichenError(f"{max_norm} is not a norm to clip to", where="clip", fix="use a number > 0, or none")
    if not grads_C:
        return {}
    if not exact:
        norms_TC = torch.stack([torch.linalg.vector_norm(x.flatten(1), dim=1) for x in grads_C.values()])
        cut_C = (max_norm / (torch.linalg.vector_norm(norms_TC, dim=0) + 1e-6)).clamp(max=1)
        return {name: x * _column(cut_C, x) for name, x in grads_C.items()}
    factor_C = [_factor(norm, max_norm) for norm in trees.norm_C(grads_C).tolist()]
    return {name: x * _per_client(factor_C, x) for name, x in grads_C.items()}


def factor_of_squares(squares: Mapping[str, Tensor], max_norm: float) -> float:
    """What :func:`clip_C` multiplies a tree by of which only each tensor's squared norm is known, bit for bit.

    Args:
        squares: Scalars by name, of all sides that hold a part of the tree.
        max_norm: The most its norm may be.
    """
    return _factor(float(sum((squares[name] for name in sorted(squares)), torch.zeros(())).sqrt()), max_norm)


def _factor(norm: float, max_norm: float) -> float:
    return min(1.0, max_norm / (norm + 1e-6))


def lr_factor(schedule: Schedule, step: int, total: int, *, warmup: int = 0) -> float:
    """Factor on the learning rate at ``step`` of ``total`` (rounds or steps, from 0), never zero before the end.

    Rises in equal strides over ``warmup`` steps, then stays, or falls to 0 at ``total`` along a line or
    a half cosine (Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR
    2017, https://arxiv.org/abs/1608.03983).

    >>> [lr_factor("linear", step, 4) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> [round(lr_factor("cosine", step, 6, warmup=2), 2) for step in range(6)]
    [0.33, 0.67, 1.0, 0.85, 0.5, 0.15]

    Raises:
        LichenError: if the schedule is unknown or the warmup does not end before ``total``.
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise LichenError(f"unknown schedule {schedule!r}", where="schedule", fix="use constant, linear or cosine")
    if not 0 <= warmup < max(total, 1):
        raise LichenError(f"{warmup} steps do not fit in {total}", where="warmup", fix="use 0 <= warmup < total")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(total - warmup, 1))
    if schedule == "linear":
        return 1.0 - done
    return 1.0 if schedule == "constant" else 0.5 * (1.0 + math.cos(math.pi * done))
