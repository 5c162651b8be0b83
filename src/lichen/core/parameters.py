"""Puts a client's personal parameters in the place of the shared ones.

Legend: C clients.
"""

from __future__ import annotations

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["CENTER", "personal_C"]

CENTER = "rows/center"
"""Of a model with two adapters side by side: ``(C, H)``, whose product with what the frozen model makes of a row is
how much the second adapter counts in that row."""


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
