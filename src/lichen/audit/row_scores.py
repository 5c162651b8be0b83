"""What a model's losses say of each row: its mean loss, and the mean of its least likely tokens (Min-K %).

A row that was trained on tends to have a lower loss, and fewer tokens that surprise. Rows differ in how hard they are
for any model, so the same score under the bare model is taken off: that is the reference.

References:
    Samuel Yeom, Irene Giacomelli, Matt Fredrikson and Somesh Jha. "Privacy Risk in Machine Learning: Analyzing the
    Connection to Overfitting." CSF 2018. https://arxiv.org/abs/1709.01604 (the loss)
    Weijia Shi, Anirudh Ajith, Mengzhou Xia, Yangsibo Huang, Daogao Liu, Terra Blevins, Danqi Chen and Luke
    Zettlemoyer. "Detecting Pretraining Data from Large Language Models." ICLR 2024.
    https://arxiv.org/abs/2310.16789 (Min-K %)
    Alexandre Sablayrolles, Matthijs Douze, Cordelia Schmid, Yann Ollivier and Hervé Jégou. "White-box vs Black-box:
    Bayes Optimal Strategies for Membership Inference." ICML 2019. https://arxiv.org/abs/1908.11229 (the reference)

Legend: C clients, B rows, T tokens, R labelled places, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.tree import Tree
from lichen.models.causal_cohort import CausalCohort
from lichen.models.full import FullCausal

__all__ = ["min_k", "row_scores"]

SHARE = 0.2
"""K %: of a row's tokens, as the paper recommends."""


def min_k(log_prob_R: NDArray[np.float64], share: float = SHARE) -> float:
    """The mean log probability of a row's least likely tokens, at least of one.

    >>> min_k(np.log(np.array([0.9, 0.5, 0.01, 0.8, 0.7])))
    -4.605170185988091
    """
    count = max(1, math.ceil(share * len(log_prob_R)))
    return float(np.sort(log_prob_R)[:count].mean())


def row_scores(
    model: CohortModel, trainable: Tree, fixed: Tree, batches: Iterable[Batch]
) -> dict[str, NDArray[np.float64]]:
    """By name, the score of every row with a label, in the order of the batches; higher is more like a member.

    ``loss`` is minus the mean loss of a row's tokens, or of the row; ``min_k`` only of a language model.

    Args:
        model: Scores one client's rows.
        trainable: Its tensors, without client axis.
        fixed: Patches of the base, and other shared tensors.
        batches: Rows of one client at a time, each once.
    """
    params_C, found = trees.broadcast(trainable, 1), dict[str, list[float]](loss=[])
    with torch.no_grad():
        for batch in batches:
            if isinstance(model, CausalCohort | FullCausal):
                _tokens(model, params_C, fixed, batch, found)
                continue
            loss_CB, count_CB = model.losses(params_C, fixed, batch)
            seen_CB = (count_CB.cpu() > 0) & (batch["index_CB"] >= 0)
            found["loss"] += (-loss_CB.cpu()[seen_CB] / count_CB.cpu()[seen_CB]).double().tolist()
    return {name: np.array(values) for name, values in found.items()}


def _tokens(
    model: CausalCohort | FullCausal, params_C: Tree, fixed: Tree, batch: Batch, found: dict[str, list[float]]
) -> None:
    (labelled,) = model.positions(params_C, fixed, batch)
    chunks = [
        _log_probs(labelled.head(hidden), label)
        for hidden, label in zip(torch.split(labelled.hidden_RH, 256), torch.split(labelled.label_R, 256), strict=True)
    ]
    log_prob_R = torch.cat([*chunks, torch.zeros(0)]).numpy().astype(np.float64)
    counts = (batch["labels_CBT"][0, :, 1:] != -100).sum(-1).tolist()
    at = 0
    for count in counts:
        if count:
            row = log_prob_R[at : at + count]
            found["loss"].append(float(row.mean()))
            found.setdefault("min_k", []).append(min_k(row))
        at += count


def _log_probs(logits_RV: Tensor, label_R: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits_RV.float(), label_R, reduction="none").cpu()
