"""How far a client's steps reach: what FedNova's clients say and its server evens out.

If every gradient of a round were 1 and the rate 1, a client would have moved by ‖a‖₁: K after K plain steps of SGD, and
with momentum ρ and FedProx's pull μ at rate η what

    v <- ρ v + 1 - η μ x,    x <- x + v

comes to.

References:
    Jianyu Wang, Qinghua Liu, Hao Liang, Gauri Joshi and H. Vincent Poor. "Tackling the Objective Inconsistency Problem
    in Heterogeneous Federated Optimization." NeurIPS 2020. https://arxiv.org/abs/2007.07481 (section 4)
"""

from __future__ import annotations

__all__ = ["REACH", "reach"]

REACH = "fednova.reach"
"""The name under which a client's ‖a‖₁ is sent, ``(1,)``."""


def reach(steps: int, *, momentum: float = 0.0, pull: float = 0.0) -> list[float]:
    """‖a‖₁ after 0, 1, … steps.

    Args:
        steps: The most.
        momentum: ρ.
        pull: η μ.

    >>> reach(3), reach(2, momentum=0.5)
    ([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.5])
    """
    x = v = 0.0
    found = [x]
    for _ in range(steps):
        v = momentum * v + 1.0 - pull * x
        x += v
        found.append(x)
    return found
