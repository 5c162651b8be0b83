"""Maximum mean discrepancy of two periods, and its p-value, from sums over the clients.

    MMD² = |Σφ_now / n_now - Σφ_then / n_then|²

The sums are those of all rows, whoever has them: :class:`lichen.clients.drift.embedding_sums.EmbeddingSums` sends them,
and :class:`lichen.server.mean.Mean` adds them up exactly, under masks if that is asked for. Each client also sends its
sum for P permutations of its own rows, in which as many of them count as now as before. If nothing has changed at any
client, the P + 1 values of MMD² are exchangeable, and

    p = (1 + #{b : MMD²_b ≥ MMD²}) / (P + 1)

is below α with a chance of at most α, whatever the clients' rows are like, how many each has, and how they differ
from client to client. Noise on the sums, of one law for each of them, changes nothing in that.

References:
    Arthur Gretton, Karsten Borgwardt, Malte J. Rasch, Bernhard Schölkopf and Alexander J. Smola. "A Kernel Method for
    the Two-Sample Problem." NeurIPS 2006; longer 2008. https://arxiv.org/abs/0805.2368
    Arthur Gretton, Karsten M. Borgwardt, Malte J. Rasch, Bernhard Schölkopf and Alexander Smola. "A Kernel Two-Sample
    Test." Journal of Machine Learning Research 13, 2012, 723-773. https://jmlr.org/papers/v13/gretton12a.html
    Belinda Phipson and Gordon K. Smyth. "Permutation P-values Should Never Be Zero." Statistical Applications in
    Genetics and Molecular Biology 9(1), 2010. https://doi.org/10.2202/1544-6115.1585 (the ones in p)

Legend: P permutations, Q = P + 1, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.server.drift.fourier import BITS
from lichen.server.mean import Mean

__all__ = ["SUMS", "Mmd", "mmd_of"]

SUMS = Mean("uniform", divisor=1.0, scale=BITS)
"""Adds up what the clients send: a mean whose divisor is 1, exact and in any order."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mmd:
    """What two periods differ by.

    Attributes:
        squared: MMD².
        p: From 1/(P + 1) to 1.
        rows_then: Rows of the earlier period.
        rows_now: Rows of the later one.
    """

    squared: float
    p: float
    rows_then: int
    rows_now: int


def mmd_of(sums: Tree) -> Mmd:
    """The discrepancy of two periods.

    Args:
        sums: Over the clients: ``now`` ``(Q, D)``, Σφ of the rows that count as now, first as it is and then permuted;
            ``all`` ``(D,)``, of both periods; ``rows`` ``(2,)``, how many are of then and of now.

    Raises:
        LichenError: if one of the periods has no row.
    """
    rows_then, rows_now = (round(count) for count in sums["rows"].tolist())
    if not rows_then or not rows_now:
        raise LichenError(
            f"{rows_then} rows then and {rows_now} now do not compare",
            where="drift.mmd",
            fix="compare periods in which somebody has rows",
        )
    mean_QD = sums["now"] / rows_now - (sums["all"] - sums["now"]) / rows_then
    squared_Q = mean_QD.square().sum(1)
    # A permutation that changes nothing counts, whatever the rounding.
    no_less = int((squared_Q[1:] >= squared_Q[0] * (1 - 1e-12)).sum())
    return Mmd(squared=float(squared_Q[0]), p=(1 + no_less) / len(squared_Q), rows_then=rows_then, rows_now=rows_now)
