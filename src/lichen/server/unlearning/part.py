"""What one client's messages have added to a model of plain averaging: the sum of its shares of all steps.

    η Σ_r p_{k,r} Δ_{k,r},  p_{k,r} = w_{k,r} / Σ_j w_{j,r}

η is the stride of the server's step. It is no more than the sum that was added: what the others sent after a round
followed from a model in which this client had its share already.

Legend: N clients of a round.
"""

from __future__ import annotations

import math

from lichen.core import tree as trees
from lichen.core.collecting.history import History
from lichen.core.tree import Tree
from lichen.server.sums.summed import Weighting

__all__ = ["added_by"]


def added_by(history: History, client: int, *, until: int, weighting: Weighting, stride: float = 1.0) -> Tree:
    """The sum of a client's shares, float64; empty where it has sent nothing.

    Args:
        history: What the clients sent.
        client: Its roster index.
        until: Rounds that count: those from 0 that ended before this one.
        weighting: How the server weighed messages.
        stride: How far the server's step goes along the mean change.

    Raises:
        LichenError: if a file is damaged.
    """
    added: Tree = {}
    for round_ in history.rounds():
        clients = history.clients(round_)
        if round_ >= until or client not in clients:
            continue
        weight, own, tensors = [], 0.0, Tree()
        for message, _ in history.messages(clients, (round_,)):
            brought = float(message.weight_C[0])
            counted = (1.0 if weighting == "uniform" else brought) if brought > 0 else 0.0
            weight.append(counted)
            if int(message.client_C[0]) == client:
                own, tensors = counted, trees.map_tree(lambda x: x[0].double(), message.tensors)
        total = math.fsum(weight)
        if own and total:
            share = trees.scale(tensors, stride * own / total)
            added = {**added, **{name: added[name] + x if name in added else x for name, x in share.items()}}
    return added
