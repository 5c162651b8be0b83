"""HetLoRA: averages adapters of different ranks, zero-padded, weighted by their norm.

    Ā = Σ q_k pad(A_k),    B̄ = Σ q_k pad(B_k),    q_k ∝ p_k ‖B_k A_k‖

with the Frobenius norm of a client's whole adapter, over all layers it trained. A baseline: zeros dilute
the directions that only strong clients have, and the mean of factors is not the factors of the mean.

The norms are known only when the round closes, so the pairs are kept: memory is theirs. Sums run in order
of the answers, in float64, so that arrival does not show in the bytes.

References:
    Yae Jee Cho, Luyang Liu, Zheng Xu, Aldi Fahrezi and Gauri Joshi. "Heterogeneous LoRA for Federated
    Fine-tuning of On-Device Foundation Models." EMNLP 2024. https://arxiv.org/abs/2401.06432 (its
    aggregation; neither its rank pruning nor its regularisation on the clients)

Legend: m rows of a layer's weight (out), n columns (in), r adapter rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch

from lichen.core.conventions.factor_pairs import factor_names
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.lowrank.adapters import AdapterMeansList
from lichen.server.lowrank.factors import gap_square, norm_square
from lichen.server.lowrank.lowrank import LowRank
from lichen.server.lowrank.products import Key
from lichen.server.sums.summed import Weighting

__all__ = ["HetLoRA"]


@final
@dataclass(frozen=True, slots=True)
class NormWeighted:
    """The rule that weighs each client's zero-padded halves by its share and its adapter's norm."""

    whole = False
    one_version = True

    def __call__(self, adapters: AdapterMeansList, change: Tree) -> tuple[Shared, dict[str, float]]:
        """``(halves, metrics)``: ``deviation`` is ``‖B̄ Ā − Σ p_k B_k A_k‖ / ‖Σ p_k B_k A_k‖``.

        Raises:
            LichenError: if only one half of a layer was sent.
        """
        norms = self._norms(adapters)
        written: Tree = {}
        lost = total_square = 0.0
        for adapter in adapters:
            raw = [p * norms[answer] for answer, p, _, _ in adapter.pairs]
            if not any(raw):
                raw = [p for _, p, _, _ in adapter.pairs]  # nobody moved: nothing to tell them apart by
            total = math.fsum(raw)
            A_rn, B_mr = torch.zeros_like(adapter.A_rn), torch.zeros_like(adapter.B_mr)
            for weight, (_, _, B, A) in zip(raw, adapter.pairs, strict=True):
                A_rn[: A.shape[0]] += weight / total * A
                B_mr[:, : B.shape[1]] += weight / total * B
            name_A, name_B = factor_names(adapter.name)
            written[name_A], written[name_B] = A_rn - adapter.A_rn, B_mr - adapter.B_mr
            stack = adapter.stack()
            square = norm_square(stack)
            lost, total_square = lost + gap_square(stack, square, (B_mr, A_rn)), total_square + square
        return Shared(written), {"deviation": math.sqrt(lost / total_square) if total_square else 0.0}

    def _norms(self, adapters: AdapterMeansList) -> dict[Key, float]:
        """Of each answer's whole adapter."""
        squares: dict[Key, list[float]] = {}
        for adapter in adapters:
            if not adapter.both:
                raise LichenError(
                    f"only one half of layer {adapter.name!r} was sent",
                    where="aggregator.hetlora",
                    fix="train both halves, or use fedit, which is exact where one is frozen",
                )
            for answer, _, B, A in adapter.pairs:
                squares.setdefault(answer, []).append(norm_square((B, A)))
        return {answer: math.sqrt(math.fsum(some)) for answer, some in squares.items()}


def HetLoRA(weighting: Weighting = "examples") -> LowRank:
    """The mean of zero-padded A and B, each client weighed by its share and its adapter's norm.

    All other tensors are averaged as :class:`lichen.server.mean.Mean` does.

    Args:
        weighting: As in :class:`lichen.server.mean.Mean`.
    """
    return LowRank(weighting, rule=NormWeighted())
