"""Adds a client's share of the noise to what it sends under masks, so that the sum has all of it.

    Σ_k N(0, s²)  =  N(0, n s²)        s = σ C / √m

Each client adds a share for the m clients that are left at least. A sum of fewer is not opened, and one of more has
more noise than it needs. A sum of discrete Gaussians is nearly one, and closer the larger s is on the grid: here it has
2^24 units or more, where the difference is far below δ (theorem 1 of the paper).

References:
    Peter Kairouz, Ziyu Liu and Thomas Steinke. "The Distributed Discrete Gaussian Mechanism for Federated Learning with
    Secure Aggregation." ICML 2021. https://arxiv.org/abs/2102.06387

Legend: N numbers of one client's vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import final

from torch import Tensor

from lichen.core.message import LIFTED, Job
from lichen.core.secret.randomness import SecretRandomness, Stream
from lichen.server.sums.masked import MaskedForm

__all__ = ["NoiseShare"]


@final
@dataclass(frozen=True, slots=True)
class NoiseShare:
    """A client's part of a sum's noise.

    Args:
        deviation: s, of each number of a change.
        seed: Everybody's, for tests: noise that follows from it hides nobody. None: the client's secret of the job.
    """

    deviation: float
    seed: int | None = None

    def __call__(self, form: MaskedForm, units_N: Tensor, job: Job, client: int, secret: Stream) -> Tensor:
        """The vector with noise in all that is summed but weight and count; int64 ``(N,)``."""
        if self.seed is not None:
            secret = SecretRandomness.of_seed(self.seed).stream("share", job.version, job.seed, client)
        out, at = units_N.clone(), 0
        for name, spec in form.tensors.items():
            count = prod(spec.shape)
            if not name.startswith(LIFTED):
                out[at : at + count] += secret.units(count, self.deviation)
            at += count
        return out
