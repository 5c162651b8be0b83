"""Layer-wise training: groups of blocks are trained in turn, one group a round.

Only what is trained needs gradients, moments of an optimizer and bytes to the server; and where the upper
blocks are at work, the way back ends below them, so that the activations of the lower ones are not kept.
The turns are cyclic, as in block coordinate descent (BAdam); LISA draws the layers instead, and ProFL grows
the model from below, for clients whose memory holds no more than a few blocks.

References:
    Qijun Luo, Hengxu Yu and Xiao Li. "BAdam: A Memory Efficient Full Parameter Optimization Method for Large
    Language Models." NeurIPS 2024. https://arxiv.org/abs/2404.02827
    Rui Pan, Xiang Liu, Shizhe Diao, Renjie Pi, Jipeng Zhang, Chi Han and Tong Zhang. "LISA: Layerwise
    Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning." NeurIPS 2024.
    https://arxiv.org/abs/2403.17919
    Yebo Wu, Li Li, Chunlin Tian and Chengzhong Xu. "Breaking the Memory Wall for Heterogeneous Federated
    Learning with Progressive Training." 2024. https://arxiv.org/abs/2404.13349 (ProFL)
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

from lichen.core.errors import LichenError
from lichen.core.tree import block_of

__all__ = ["layerwise_schedule"]


def layerwise_schedule(
    names: Iterable[str], groups: int, order: Literal["up", "down"] = "up"
) -> tuple[tuple[str, ...], ...]:
    """What stands still in each phase, for a client work's ``phases``: the tensors of all blocks but one group's.

    The blocks that have tensors among ``names`` are parted into stretches that differ by one block at most.
    What lies outside the stack, such as a classification head, is trained in every phase.

    Args:
        names: All trainable tensors.
        groups: How many stretches take turns.
        order: ``"up"`` begins at the model's input, ``"down"`` at its output.

    Returns:
        Whole names, ``groups`` times.

    Raises:
        LichenError: if there are fewer blocks than groups.

    >>> layerwise_schedule(["h.0.a", "h.1.a", "h.2.a", "head.w"], 2)
    (('h.1.a', 'h.2.a'), ('h.0.a',))
    """
    names = tuple(names)
    blocks = sorted({block for name in names if (block := block_of(name)) is not None})
    if not 1 <= groups <= len(blocks):
        raise LichenError(
            f"{len(blocks)} blocks with trained tensors cannot take turns in {groups} groups",
            where="federation.layer_groups",
            fix=f"use 1 to {len(blocks)}" if blocks else "use 1: what is trained lies in no block",
        )
    edges = [i * len(blocks) // groups for i in range(groups + 1)]
    active = [set(blocks[a:b]) for a, b in pairwise(edges)]
    stages = active if order == "up" else active[::-1]
    return tuple(tuple(name for name in names if block_of(name) not in (None, *stage)) for stage in stages)
