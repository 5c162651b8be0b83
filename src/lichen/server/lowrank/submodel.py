"""Extracts a weaker client's part of an adapter: fewer ranks, fewer blocks.

A client of rank r_k takes the first r_k rows of every A and columns of every B; it trains, and its model
has, those alone. Rules that order directions by strength (:mod:`lichen.server.lowrank.redistribute`) make that
the best adapter of its rank. Of the blocks of the stack, a client may train only the last few: the
adapters of the others leave its trainable tensors and join the layers' patches, so that its model stays
the same function, without gradients, activations or optimizer below the first block it trains.

A block is known by the first number in a layer's name, as 7 in ``model.layers.7.self_attn.q_proj``; the
highest numbers are the last blocks. Layers without a number belong to no block and are always trained.

References:
    Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao and Yaliang Li. "Federated Fine-tuning of Large
    Language Models under Heterogeneous Tasks and Client Resources." NeurIPS 2024.
    https://arxiv.org/abs/2402.11505 (each client takes the leading directions that it can carry)

Legend: N clients of the roster, m rows of a layer's weight (out), n columns (in), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.conventions.factor_pairs import factor_names, layers_with_factors
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, block_of
from lichen.core.wire.shared import Shared

__all__ = ["Capacity"]


@final
@dataclass(frozen=True, slots=True)
class Capacity:
    """Each client's rank and number of trained blocks.

    Args:
        rank_N: Directions; at least 1, and all where it is the shared rank or more.
        last_N: Blocks, counted from the last; None: all.
        scaling: alpha / r, the factor the model puts on ``B A``.

    Raises:
        LichenError: if a number is out of range, or there are not as many ranks as blocks.
    """

    rank_N: tuple[int, ...]
    _: KW_ONLY
    last_N: tuple[int | None, ...]
    scaling: float

    def __post_init__(self) -> None:
        if len(self.rank_N) != len(self.last_N):
            raise LichenError(
                f"{len(self.rank_N)} ranks and {len(self.last_N)} numbers of blocks",
                where="capacity",
                fix="give one of each for every client",
            )
        for client, (rank, last) in enumerate(zip(self.rank_N, self.last_N, strict=True)):
            if rank < 1 or (last is not None and last < 1):
                raise LichenError(
                    f"client {client} has rank {rank} and {last} blocks", where="capacity", fix="use 1 or more"
                )
        if not 0 < self.scaling < math.inf:
            raise LichenError(f"{self.scaling} is no scaling", where="capacity.scaling", fix="use alpha / rank")

    def key(self, client: int) -> Hashable:
        """Clients of equal key get equal jobs.

        Raises:
            LichenError: for a client that is not on the roster.
        """
        if not 0 <= client < len(self.rank_N):
            raise LichenError(
                f"client {client} is not among {len(self.rank_N)}", where="capacity", fix="give every client's rank"
            )
        return self.rank_N[client], self.last_N[client]

    def extract(self, shared: Shared, key: Hashable) -> Shared:
        """``shared`` as clients of this key get it.

        Args:
            shared: The shared tensors.
            key: From :meth:`key`.

        Raises:
            LichenError: if the key is none of this, or a layer to be left out trains more than A and B.
        """
        if not (isinstance(key, tuple) and len(key) == 2):
            raise LichenError(f"{key!r} is no capacity", where="capacity", fix="take it from key")
        rank, last = key
        layers = layers_with_factors(shared.trainable)
        blocks = sorted({block for block in map(block_of, layers) if block is not None})
        trained_blocks = set(blocks if last is None else blocks[-last:])
        out, patch = dict(shared.trainable), dict(shared.patch)
        for layer in layers:
            name_A, name_B = factor_names(layer)
            block = block_of(layer)
            if block is None or block in trained_blocks:
                out[name_A] = out[name_A][:rank].contiguous()
                out[name_B] = out[name_B][:, :rank].contiguous()
                continue
            A_rn, B_mr = out.pop(name_A), out.pop(name_B)
            more = next((name for name in out if name.rpartition(".")[0] == layer), None)
            if more is not None:
                raise LichenError(
                    f"layer {layer!r} also trains {more!r}, which no patch can hold",
                    where="capacity",
                    fix="let every client train all blocks, or use plain LoRA",
                )
            patch |= _as_patch(layer, self.scaling * B_mr, A_rn, shared.patch)
        return replace(shared, trainable=out, patch=patch)


def _as_patch(layer: str, left_mr: Tensor, right_rn: Tensor, patch: Tree) -> Tree:
    """The layer's patch with an adapter in it; nothing new where the adapter does nothing."""
    if not (left_mr.any() and right_rn.any()):
        return {}
    names = {kind: f"{layer}.{kind}" for kind in ("dense", "left", "right")}
    if names["dense"] in patch:
        dense_mn = patch[names["dense"]]
        return {names["dense"]: dense_mn + (left_mr @ right_rn).to(dense_mn)}
    if names["left"] in patch:
        left_mr = torch.cat([patch[names["left"]], left_mr.to(patch[names["left"]])], 1)
        right_rn = torch.cat([patch[names["right"]], right_rn.to(patch[names["right"]])], 0)
    # Names of one job lie apart in memory, so that they can be written to bytes.
    return {names["left"]: left_mr.contiguous(), names["right"]: right_rn.clone()}
