"""What periods say of a model that goes on: the matrix R, forgetting, and transfer backward and forward.

``R[i][j]`` is the score on the test rows of period j of the model that is in force after period i; row 0 is the model
that the first period begins from. The score of a period by the model before it is prequential: nothing of the period
was trained on, and what comes later does not change it. Differences are signed so that more is better, whatever the
metric: forgetting above 0 is a loss, transfer above 0 a gain.

References:
    Dawid, "Present Position and Potential Developments: Some Personal Views: Statistical Theory: The Prequential
    Approach", Journal of the Royal Statistical Society A 147(2), 1984, https://doi.org/10.2307/2981683.
    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NIPS 2017, arXiv:1706.08840 (R, and
    transfer backward and forward). Chaudhry, Dokania, Ajanthan and Torr, "Riemannian Walk for Incremental Learning:
    Understanding Forgetting and Intransigence", ECCV 2018, arXiv:1801.10112 (forgetting).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

__all__ = ["Transfer", "transfer_of"]

Cell = float | None
"""A score; None where no client has one."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What a matrix comes to.

    Attributes:
        prequential: By period, the score of the model before it.
        forgetting: By period but the last, how much better some earlier model was than the last one.
        backward: How much later periods helped earlier ones, on average: the last row against the diagonal.
        forward: How much earlier periods helped one that was not trained on yet, on average: against row 0.
    """

    prequential: tuple[Cell, ...]
    forgetting: tuple[Cell, ...]
    backward: Cell
    forward: Cell

    @property
    def forgotten(self) -> Cell:
        """Forgetting on average."""
        return _mean(self.forgetting)

    def as_dict(self) -> Mapping[str, Any]:
        """As JSON holds it."""
        return {
            "prequential": list(self.prequential),
            "forgetting": list(self.forgetting),
            "mean_forgetting": self.forgotten,
            "backward_transfer": self.backward,
            "forward_transfer": self.forward,
        }


def transfer_of(matrix: Sequence[Sequence[Cell]], *, higher_is_better: bool) -> Transfer:
    """Forgetting and transfer of a matrix R.

    Args:
        matrix: A row more than there are periods, the first of the model at the start.
        higher_is_better: What better means.

    >>> found = transfer_of([[0.1, 0.1], [0.9, 0.3], [0.7, 0.8]], higher_is_better=True)
    >>> [round(x, 3) for x in (found.forgetting[0], found.backward, found.forward, found.prequential[1])]
    [0.2, -0.2, 0.2, 0.3]
    """
    sign, last = (1.0 if higher_is_better else -1.0), len(matrix) - 2

    def better(one: Cell, other: Cell) -> Cell:
        return None if one is None or other is None else sign * (one - other)

    forgetting = []
    for j in range(last):
        losses = [better(matrix[i + 1][j], matrix[last + 1][j]) for i in range(last)]
        forgetting.append(max((x for x in losses if x is not None), default=None))
    return Transfer(
        prequential=tuple(matrix[j][j] for j in range(last + 1)),
        forgetting=tuple(forgetting),
        backward=_mean([better(matrix[last + 1][j], matrix[j + 1][j]) for j in range(last)]),
        forward=_mean([better(matrix[j][j], matrix[0][j]) for j in range(1, last + 1)]),
    )


def _mean(values: Sequence[Cell]) -> Cell:
    known = [x for x in values if x is not None]
    return math.fsum(known) / len(known) if known else None
