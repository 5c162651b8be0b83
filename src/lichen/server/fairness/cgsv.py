"""CGSV: a client is paid in coordinates of the round's change, the more the more its own change points the same way.

    r_k ← max(.95 r_k + .05 cos(Δ_k, Δ), 1/1000),  then divided by their sum;  at first 0
    q_k = tanh(β r_k) / max_j tanh(β r_j)

Of each tensor of the round's change Δ client k gets the ⌊q_k n⌋ largest numbers; elsewhere it has what its own training
made of its model. So the best reputation has all of Δ; a small β pays in proportion to reputation, a large one pays all
alike. Nobody's rows are asked: the cosine stands for a Shapley value of how well a coalition's change is aligned with
everybody's.

The paper's code differs in two ways: changes are brought to one norm and weighed by reputation, where here the recipe's
mean counts; and a client's model does not move where it is paid nothing, where here its own training stays.

References:
    Xinyi Xu, Lingjuan Lyu, Xingjun Ma, Chenglin Miao, Chuan Sheng Foo and Bryan Kian Hsiang Low. "Gradient Driven
    Rewards to Guarantee Fairness in Collaborative Machine Learning." NeurIPS 2021.
    https://proceedings.neurips.cc/paper/2021/hash/8682cc30db9c025ecd3fee433f8ab54c-Abstract.html

Legend: N clients of the roster, n numbers of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["cosine", "largest", "reputations", "rewarded", "shares"]

_DECAY = 0.95
"""Of a reputation, from a round to the next."""

_LEAST = 1e-3
"""A reputation before all are divided by their sum."""


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of the angle between two changes, over the names that both have; 0 where one of them is zero.

    >>> round(cosine({"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}), 6)
    0.707107
    """
    names = sorted(one.keys() & other.keys())
    pairs = [(one[name].double().flatten(), other[name].double().flatten()) for name in names]
    dot = math.fsum(float(x @ y) for x, y in pairs)
    a, b = (math.fsum(float(pair[at] @ pair[at]) for pair in pairs) for at in (0, 1))
    return dot / math.sqrt(a * b) if a * b > 0 else 0.0


def reputations(before_N: Tensor, cosine_of: Mapping[int, float]) -> Tensor:
    """Reputations after a round, float64 ``(N,)``; who did not come keeps its own before they are divided.

    >>> reputation_N = reputations(torch.zeros(3, dtype=torch.float64), {0: 0.75, 1: 0.25, 2: -0.5})
    >>> [round(x, 6) for x in reputation_N.tolist()]
    [0.735294, 0.245098, 0.019608]
    """
    now_N = before_N.clone()
    for client, x in cosine_of.items():
        now_N[client] = max(_DECAY * float(before_N[client]) + (1 - _DECAY) * x, _LEAST)
    return now_N / now_N.sum() if bool(now_N.sum() > 0) else now_N


def shares(reputation_N: Tensor, beta: float) -> Tensor:
    """q, the share of the change that each client gets, from 0 to 1; float64 ``(N,)``.

    Args:
        reputation_N: At least 0 each.
        beta: β > 0.

    Raises:
        LichenError: if β is not a positive number.

    >>> [round(x, 6) for x in shares(torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64), 1.0).tolist()]
    [1.0, 0.529993, 0.0]
    """
    if not 0 < beta < math.inf:
        raise LichenError(f"{beta} is not positive", where="federation.reward_beta", fix="use a number > 0, such as 1")
    q_N = (beta * reputation_N).tanh()
    return q_N / q_N.max() if bool(q_N.max() > 0) else q_N


def largest(x: Tensor, share: float) -> Tensor:
    """Where the largest numbers of a tensor are, this share of them rounded down; of equal ones the first.

    >>> largest(torch.tensor([1.0, -3.0, 2.0, 2.0]), 0.5).tolist()
    [False, True, True, False]
    """
    flat = x.flatten()
    order = flat.abs().argsort(descending=True, stable=True)
    mask = torch.zeros(len(flat), dtype=torch.bool, device=x.device)
    mask[order[: math.floor(share * len(flat))]] = True
    return mask.view(x.shape)


def rewarded(change: Mapping[str, Tensor], full: Mapping[str, Tensor], own: Mapping[str, Tensor], share: float) -> Tree:
    """A client's next model: the server's step where it is paid, its own training elsewhere.

    Args:
        change: The round's.
        full: Its model after the server's step with all of it.
        own: Its model as its own training left it.
        share: q.
    """
    return {
        name: torch.where(largest(change[name], share), x, own[name]) if name in change else x
        for name, x in full.items()
    }
