"""Measures the diversity of texts: distinct-n, mean embedding distance, Vendi score.

Research: no recipe and no public name reaches this module.

Distinct-n counts words, the two others look at embeddings: the mean distance of two texts, and the Vendi
score, which is the number of different texts that would be as various as these.

References:
    Jiwei Li, Michel Galley, Chris Brockett, Jianfeng Gao and Bill Dolan. "A Diversity-Promoting Objective
    Function for Neural Conversation Models." NAACL 2016. https://arxiv.org/abs/1510.03055
    Dan Friedman and Adji Bousso Dieng. "The Vendi Score: A Diversity Evaluation Metric for Machine
    Learning." TMLR 2023. https://arxiv.org/abs/2210.02410

Legend: N texts, H width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lichen.core.errors import LichenError
from lichen.data.synthetic.near_duplicates import words

__all__ = ["distance", "distinct", "vendi"]


def distinct(texts: Sequence[str], size: int = 2) -> float:
    """Different runs of ``size`` words per run, over all texts together; 0 where there is no run.

    >>> distinct(["it fits well", "it fits badly"])
    0.75
    """
    every = [words(text) for text in texts]
    runs = [tuple(found[i : i + size]) for found in every for i in range(len(found) - size + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def distance(x_NH: Tensor) -> float:
    """Mean cosine distance of two different rows, from 0 (all alike) up.

    Raises:
        LichenError: if there are fewer than two rows.
    """
    rows = len(x_NH)
    if rows < 2:
        raise LichenError(f"{rows} rows have no distance", where="diversity", fix="give two rows or more")
    total_H = functional.normalize(x_NH.double(), dim=-1).sum(0)
    # The square of the sum holds every ordered pair, and every row with itself.
    return 1 - (float(total_H @ total_H) - rows) / (rows * (rows - 1))


def vendi(x_NH: Tensor) -> float:
    """The exponential of the entropy of the cosine kernel's eigenvalues: 1 (all alike) to N (all orthogonal).

    Raises:
        LichenError: if there is no row.
    """
    if not len(x_NH):
        raise LichenError("no rows have no diversity", where="diversity", fix="give one row or more")
    unit_NH = functional.normalize(x_NH.double(), dim=-1)
    # The Gram matrix and the covariance have the same eigenvalues but for zeros.
    small = unit_NH @ unit_NH.T if len(unit_NH) < unit_NH.shape[1] else unit_NH.T @ unit_NH
    share_N = torch.linalg.eigvalsh(small / len(unit_NH)).clamp(min=0)
    return float(torch.special.entr(share_N).sum().exp())
