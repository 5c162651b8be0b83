"""What a client's private state makes of the shared model: its own model, as files can hold it.

Where what is shared and what is own make one adapter, that is the model. Of two adapters whose weight differs by row or
by token there are two, and the numbers that weigh them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from lichen.clients.personal.apfl import Apfl
from lichen.clients.personal.pair import OTHER, is_factor, pair_of
from lichen.clients.personal.training import MINE
from lichen.core import tree as trees
from lichen.core.tree import Tree

__all__ = ["OwnModel", "made_of"]

_WEIGHTS = "weights/"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OwnModel:
    """A client's own model, without client axis.

    Attributes:
        trainable: Its tensors, by the names of those that all share; a pair of constant weight has twice the rank.
        other: The other adapter of a pair whose weight differs; none: ``trainable`` is the whole of it.
        weights: What weighs the two: ``center`` of rows, or gates by layer.
    """

    trainable: Tree
    other: Tree
    weights: Tree


def made_of(kind: str | None, shared: Tree, own_C: Tree, *, cap: float, anchors: int) -> OwnModel:
    """The model that private state makes of the shared one.

    Args:
        kind: The method; None: a rule that leaves a part of the model with its client.
        shared: The tensors that all share, without client axis.
        own_C: One client's private state, ``(1, ...)``.
        cap: Of FedDPA.
        anchors: Of FedDPA.
    """
    made = {name: x[0] for name, x in _model(kind, shared, own_C, cap, anchors).items()}
    other, trainable = trees.split(made, OTHER)
    weights, trainable = trees.split(trainable, _WEIGHTS)
    return OwnModel(trainable={**shared, **trainable}, other=other, weights=weights)


def _model(kind: str | None, shared: Tree, own_C: Tree, cap: float, anchors: int) -> Tree:
    """The client's tensors, ``(1, ...)``; of two adapters the other's and what weighs them under prefixes."""
    mine_C, rest = trees.split(own_C, MINE)
    inside_C = trees.split(mine_C, "params/")[0]
    params_C, best_C = trees.split(rest, "params/")[0], trees.split(rest, "best/")[0]
    making: dict[str | None, Callable[[], Tree]] = {
        "apfl": lambda: Apfl(alpha=0.5, rate=0.0).model(shared, mine_C),
        "feddpa": lambda: _dual(shared, best_C or inside_C, mine_C, cap, anchors),
        "fedalt": lambda: _rest_of_world(mine_C),
    }
    return making.get(kind, lambda: best_C or params_C or inside_C)()


def _dual(shared: Tree, own_C: Tree, mine_C: Tree, cap: float, anchors: int) -> Tree:
    first_C = trees.expand({name: x for name, x in shared.items() if is_factor(name)}, 1)
    if not anchors:
        return pair_of(first_C, own_C, second=cap)
    seen_C = mine_C["anchors_seen"].clamp(min=1)
    center_C = cap * mine_C["anchors"] / seen_C[:, None]
    return {**trees.join(OTHER, first_C, own_C), f"{_WEIGHTS}center": center_C}


def _rest_of_world(mine_C: Tree) -> Tree:
    trained_C = trees.split(mine_C, "params/")[0]
    gates_C = {name: x for name, x in trained_C.items() if name.endswith("lora_gate")}
    own_C = {name: x for name, x in trained_C.items() if name not in gates_C}
    return trees.join(OTHER, trees.split(mine_C, OTHER)[0], trees.join(_WEIGHTS, gates_C, own_C))
