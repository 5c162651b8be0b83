"""What a method did to each client's score: the number that a mean hides.

Legend: N clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["PerClientGain", "per_client_gain"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PerClientGain:
    """What a method, such as a teacher, did to each client's score.

    Attributes:
        gain_N: Score with it less score without, NaN where either is unknown.
        mean: Of the gains.
        least: The smallest gain.
        worst_decile: Mean score, with it, of the tenth of clients (at least one) with the lowest scores.
        worst_decile_before: The same of the scores without it.
        worse: Share of clients whose score fell.
    """

    gain_N: Tensor
    mean: float
    least: float
    worst_decile: float
    worst_decile_before: float
    worse: float


def per_client_gain(with_N: Tensor, without_N: Tensor) -> PerClientGain:
    """Who gained, where higher scores are better; give losses with their sign turned.

    Args:
        with_N: Each client's score with the method; NaN where it has none.
        without_N: Without it.

    Raises:
        LichenError: if no client has both scores.

    >>> import torch
    >>> gain = per_client_gain(torch.tensor([0.5, 0.9, 0.4]), torch.tensor([0.6, 0.5, 0.4]))
    >>> round(gain.mean, 3), round(gain.worse, 3), round(gain.worst_decile, 3)
    (0.1, 0.333, 0.4)
    """
    with_N, without_N = with_N.double(), without_N.double()
    gain_N = with_N - without_N
    known_N = ~gain_N.isnan()
    if not bool(known_N.any()):
        raise LichenError("no client has a score both with and without", where="gain", fix="evaluate both columns")
    tenth = max(1, int(known_N.sum()) // 10)

    def lowest(score_N: Tensor) -> float:
        return float(score_N[known_N].sort().values[:tenth].mean())

    return PerClientGain(
        gain_N=gain_N,
        mean=float(gain_N[known_N].mean()),
        least=float(gain_N[known_N].min()),
        worst_decile=lowest(with_N),
        worst_decile_before=lowest(without_N),
        worse=float((gain_N[known_N] < 0).double().mean()),
    )
