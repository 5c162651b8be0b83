"""Splits a job's tensors into trainable and frozen ones, and puts a client's personal ones in place.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["CONTROL", "personal_C", "split_shared"]

CONTROL = "control."
"""Under it lies what gradient steps alone look at, such as SCAFFOLD's control variates: no model sees it."""


def split_shared(shared: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
    """``(trainable, fixed)``: everything under its own name, and what lies under ``patch.`` and ``answers.``.

    What lies under :data:`CONTROL` is neither.

    >>> import torch
    >>> split_shared({"w": torch.ones(1), "patch.w.dense": torch.zeros(1)})
    ({'w': tensor([1.])}, {'patch.w.dense': tensor([0.])})
    """
    fixed = {name: x for name, x in shared.items() if name.startswith(("patch.", "answers."))}
    return {name: x for name, x in shared.items() if name not in fixed and not name.startswith(CONTROL)}, fixed


def personal_C(trainable: Tree, own_C: Tree | None, clients: int, *, use_best: bool = False) -> Tree:
    """Each client's parameters: the shared ones for all, with its own over them where it has some.

    Args:
        trainable: Shared tensors without client axis.
        own_C: Stacked private state; ``params/`` holds the newest, ``best/`` the best so far.
        clients: C.
        use_best: Take ``best/`` where there is one.

    Returns:
        ``(C, ...)`` tensors with the names of ``trainable``.

    Raises:
        LichenError: if a private tensor is unknown to the shared ones, or of another shape.
    """
    params_C = trees.broadcast(trainable, clients)
    mine, rest = trees.split(own_C or {}, "params/")
    best, _ = trees.split(rest, "best/")
    for name, x_C in (best if use_best and best else mine).items():
        if name not in params_C or x_C.shape != params_C[name].shape:
            raise LichenError(
                f"tensor {name!r} of shape {tuple(x_C.shape[1:])} does not fit the model",
                where="private state",
                fix="start a new run folder: the adapter or the model has changed",
            )
        params_C[name] = x_C.to(params_C[name])
    return params_C
