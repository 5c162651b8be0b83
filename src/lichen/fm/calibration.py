"""Calibrates a teacher's class probabilities, and measures the calibration error.

A model asked without examples prefers some words whatever the text. Dividing its probabilities by those it
gives to a text without content (contextual calibration), or by their mean over the unlabelled texts at hand
(batch calibration), takes that preference out. What is left may still be too sure: one temperature, fitted on
labelled public rows, puts it right and changes no decision. The expected calibration error measures it.

References:
    Tony Z. Zhao, Eric Wallace, Shi Feng, Dan Klein and Sameer Singh. "Calibrate Before Use: Improving
    Few-Shot Performance of Language Models." ICML 2021. https://arxiv.org/abs/2102.09690
    Han Zhou, Xingchen Wan, Lev Proleev, Diana Mincu, Jilin Chen, Katherine Heller and Subhrajit Roy. "Batch
    Calibration: Rethinking Calibration for In-Context Learning and Prompt Engineering." ICLR 2024.
    https://arxiv.org/abs/2309.17249
    Chuan Guo, Geoff Pleiss, Yu Sun and Kilian Q. Weinberger. "On Calibration of Modern Neural Networks."
    ICML 2017. https://arxiv.org/abs/1706.04599

Legend: N rows, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["at_temperature", "calibration_error", "divided", "fit_temperature"]

_LEAST = 1e-12  # a probability of 0 is one that was too small to be told


def divided(chance_NK: Tensor, prior_K: Tensor) -> Tensor:
    """``(N, K)`` float64: probabilities divided by what each class gets anyway, made to sum to one.

    >>> divided(torch.tensor([[0.6, 0.4]]), torch.tensor([0.75, 0.25])).tolist()[0][0] < 0.5
    True
    """
    ratio_NK = chance_NK.double().clamp(min=_LEAST) / prior_K.double().clamp(min=_LEAST)
    return ratio_NK / ratio_NK.sum(-1, keepdim=True)


def at_temperature(chance_NK: Tensor, temperature: float) -> Tensor:
    """``(N, K)`` float64: softmax of log-probabilities over a temperature; above 1 less sure.

    Raises:
        LichenError: if the temperature is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise LichenError(f"a temperature of {temperature}", where="temperature", fix="use a number above 0")
    return (chance_NK.double().clamp(min=_LEAST).log() / temperature).softmax(-1)


def fit_temperature(chance_NK: Tensor, label_N: Tensor) -> float:
    """The temperature whose :func:`at_temperature` probabilities make these labels likeliest, in [0.01, 100].

    The loss is convex in 1 / temperature, so that its slope is bisected.

    Args:
        chance_NK: Probabilities of labelled rows.
        label_N: int64, their classes.

    Raises:
        LichenError: if there are no rows, or they do not pair up.
    """
    _check(chance_NK, label_N)
    logp_NK = chance_NK.double().clamp(min=_LEAST).log()
    true_N = logp_NK.gather(1, label_N[:, None])[:, 0]

    def slope(cold: float) -> float:
        return float(((logp_NK * cold).softmax(-1) * logp_NK).sum(-1).sub(true_N).mean())

    low, high = 0.01, 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def calibration_error(chance_NK: Tensor, label_N: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: how far confidence lies from accuracy, over bins of equal width.

    Confidence is the top probability; each bin ``(lower, upper]`` counts by its share of the rows.

    Args:
        chance_NK: Probabilities of labelled rows.
        label_N: int64, their classes.
        bins: How many.

    Raises:
        LichenError: if there are no rows or bins, or rows and labels do not pair up.

    >>> round(calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 3)
    0.4
    """
    _check(chance_NK, label_N)
    if bins < 1:
        raise LichenError(f"{bins} bins", where="bins", fix="use 1 or more")
    sure_N, predicted_N = chance_NK.double().max(-1)
    bin_N = (sure_N * bins).ceil().long().clamp(1, bins) - 1
    gap_N = (predicted_N == label_N).double() - sure_N
    gap_per_bin = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_N, gap_N)
    return float(gap_per_bin.abs().sum() / len(label_N))


def _check(chance_NK: Tensor, label_N: Tensor) -> None:
    if chance_NK.dim() != 2 or len(chance_NK) != len(label_N) or not len(label_N):
        raise LichenError(
            f"{tuple(chance_NK.shape)} probabilities and {tuple(label_N.shape)} labels",
            where="labelled",
            fix="give one label a row, and at least one row",
        )
    if int(label_N.min()) < 0 or int(label_N.max()) >= chance_NK.shape[1]:
        raise LichenError("a label is no class", where="labelled", fix=f"use 0 to {chance_NK.shape[1] - 1}")
