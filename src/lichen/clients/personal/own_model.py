"""What a client's private state makes of the shared model: its own model, as files can hold it.

Where what is shared and what is own make one adapter, that is the model. Of two adapters whose weight differs by row or
by token there are two, and the numbers that weigh them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import final

from lichen.clients.personal.apfl import Apfl
from lichen.clients.personal.fedalt import adapters_and_gates
from lichen.clients.personal.feddpa import center_C
from lichen.clients.personal.pair import OTHER, factors_C, pair_of
from lichen.clients.personal.training import MINE
from lichen.core import tree as trees
from lichen.core.tree import Tree

__all__ = ["OwnModel", "folder_name", "made_of"]

_LONGEST = 80
"""Letters of a folder's name."""


def folder_name(client: str) -> str:
    """What the folder of a client's model is called: as the client where a file system takes that, and as no other.

    >>> folder_name("Süd"), folder_name("ward/3")
    ('Süd', 'ward_3-a05eef8a')
    """
    name = re.sub(r"[^\w@ .-]", "_", client).strip(" .")[:_LONGEST]
    return name if name == client else f"{name}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"


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
    mine_C, rest = trees.split(own_C, MINE)
    params_C = trees.split(rest, "best/")[0] or trees.split(rest, "params/")[0] or trees.split(mine_C, "params/")[0]
    other_C, weights_C = Tree(), Tree()
    if kind == "apfl":
        params_C = Apfl(alpha=0.5, rate=0.0).model(shared, mine_C)  # both are of training alone
    elif kind == "feddpa" and not anchors:
        params_C = pair_of(factors_C(shared, 1), params_C, second=cap)
    elif kind == "feddpa":
        other_C, weights_C = factors_C(shared, 1), {"center": center_C(mine_C, cap)}
    elif kind == "fedalt":
        params_C, weights_C = adapters_and_gates(mine_C)
        other_C, _ = trees.split(mine_C, OTHER)
    trainable, other, weights = ({name: x[0] for name, x in one.items()} for one in (params_C, other_C, weights_C))
    return OwnModel(trainable={**shared, **trainable}, other=other, weights=weights)
