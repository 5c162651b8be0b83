"""PATE: a noisy majority of the clients' votes labels public texts.

Research: no recipe and no public name reaches this module.

The clients are the ensemble of teachers: each has its own model of its own rows and casts one vote, a
class, for every public text (:class:`lichen.research.pate.label_vote.LabelVote`). The votes are counted exactly,
Gaussian noise is added to the counts once, and the class with the most is the answer (GNMax). With a threshold
(Confident-GNMax) a text is answered only where, with other noise, the largest count passes it. The answers
come in the form of any teacher's, ``answers.prob`` and ``answers.index``, and students learn from them.

**What is protected.** Adjacent are two federations that differ in everything ONE CLIENT holds: it may change
one vote in every query, which moves two counts by one each, an L2 sensitivity of √2 a query (1 for the
largest count alone). All releases of a run together are one Gaussian mechanism of the sensitivity that
:func:`joint_sensitivity` gives at noise of deviation 1, whatever was answered; (ε, δ) follow from it by any
accountant for Gaussians. The data-dependent bounds of the paper are smaller where clients agree, but cannot
be told without noise of their own, and are not used.

**What is told besides** the winner is its noisy share of the votes, as a confidence: it is made of numbers
that are already paid for. Who took part, and how many, is not hidden.

**In earnest** the seed of the noise must be secret and used for one closing only, and noise must not be
drawn by somebody who wants to know the votes: let clients add shares of it under secure aggregation. A
64-bit seed stands in for a cryptographic source here so that runs repeat.

References:
    Nicolas Papernot, Martín Abadi, Úlfar Erlingsson, Ian Goodfellow and Kunal Talwar. "Semi-supervised
    Knowledge Transfer for Deep Learning from Private Training Data." ICLR 2017.
    https://arxiv.org/abs/1610.05755
    Nicolas Papernot, Shuang Song, Ilya Mironov, Ananth Raghunathan, Kunal Talwar and Úlfar Erlingsson.
    "Scalable Private Learning with PATE." ICLR 2018. https://arxiv.org/abs/1802.08908

Legend: C clients, Q queries, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.seeds import torch_generator
from lichen.core.wire.shared import Shared
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, weigh_C

__all__ = ["NoisyMax", "joint_sensitivity"]


def joint_sensitivity(queries: int, *, sigma: float, threshold_sigma: float | None = None) -> float:
    """L2 sensitivity of all releases of a run, in units of their noise; infinite without noise.

    Gaussian releases add in squares: Q (2 / σ² + 1 / σ_t²) is the square of what is returned. Every query is
    paid for, answered or not, so that the number of answers is no secret either.

    Args:
        queries: Q, all that were asked.
        sigma: σ, deviation of the noise on every count, in votes.
        threshold_sigma: σ_t, that of the noise on the largest count before it is held against the
            threshold; None without one.

    >>> round(joint_sensitivity(100, sigma=40.0), 6)  # √2 · √100 / 40
    0.353553
    """
    if not sigma or threshold_sigma == 0:
        return math.inf
    check = 0.0 if threshold_sigma is None else 1 / threshold_sigma**2
    return math.sqrt(queries * (2 / sigma**2 + check))


@final
@dataclass(frozen=True, slots=True)
class NoisyMax(Summed):
    """GNMax over the clients' votes, and Confident-GNMax with a threshold.

    A message's tensor is ``votes`` ``(C, Q)``: a class, -1 to abstain. A client of weight 0 does not vote.

    Args:
        classes: K.
        sigma: Deviation of the noise on every count, in votes; 0 for none, and no privacy.
        seed: Of the noise.
        threshold: Votes that the largest count, with noise, must reach; None: every text is answered.
        threshold_sigma: Deviation of that noise, in votes.

    Raises:
        LichenError: if a number is out of range, or one of the last two is given alone.
    """

    classes: int
    _: KW_ONLY
    sigma: float
    seed: int
    threshold: float | None = None
    threshold_sigma: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= 32767:
            raise LichenError(f"{self.classes} classes", where="pate.classes", fix="use 2 to 32767")
        for name in ("sigma", "threshold_sigma"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise LichenError(f"{value} is out of range", where=f"pate.{name}", fix="use a number >= 0")
        if (self.threshold is None) != (self.threshold_sigma is None):
            raise LichenError(
                "a threshold and its noise come together", where="pate.threshold", fix="give both, or neither"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=30)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """The votes of every client, as counts.

        Raises:
            LichenError: if the message holds no votes, or votes for no class.
        """
        if message.tensors.keys() != {"votes"} or message.tensors["votes"].dim() != 2:
            raise LichenError(
                f"expected votes (C, Q), got {sorted(message.tensors)}",
                where="pate",
                fix="pair it with the work LabelVote",
            )
        weight_C = weigh_C(message, "uniform", discount_C)
        votes_CQ = message.tensors["votes"].long()
        votes_CQ = torch.where((weight_C > 0).to(votes_CQ.device)[:, None], votes_CQ, -1)
        if votes_CQ.numel() and not -1 <= int(votes_CQ.min()) <= int(votes_CQ.max()) < self.classes:
            raise LichenError(
                f"a vote lies outside -1..{self.classes - 1}", where="pate", fix="let clients know the same classes"
            )
        count_CQK = torch.nn.functional.one_hot(votes_CQ.clamp(min=0), self.classes) * (votes_CQ >= 0)[..., None]
        yield Terms(replace(message, tensors={"votes": count_CQK.double()}), weight_C)

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(answers, metrics)``: ``answers.index`` int16 and ``answers.prob`` float16, ``(Q, 1)`` each.

        A text without answer has index -1 and probability 0. Metrics are ``clients``, ``queries``,
        ``answered`` and ``sensitivity`` (:func:`joint_sensitivity`).

        Raises:
            LichenError: if nobody voted.
        """
        if not total.count:
            raise LichenError("nobody voted", where="pate", fix="invite clients that have trained a model")
        count_QK = fixed_point.read_sums(total)["votes"]
        queries = count_QK.shape[0]

        def noise(sigma: float, purpose: str, *shape: int) -> torch.Tensor:
            generator = torch_generator(self.seed, "pate", purpose)
            return sigma * torch.randn(shape, generator=generator, dtype=torch.float64)

        winner_Q, class_Q = (count_QK + noise(self.sigma, "answer", queries, self.classes)).max(1)
        answered_Q = torch.ones(queries, dtype=torch.bool)
        if self.threshold is not None and self.threshold_sigma is not None:
            answered_Q = count_QK.max(1).values + noise(self.threshold_sigma, "threshold", queries) >= self.threshold
        share_Q = torch.where(answered_Q, (winner_Q / total.count).clamp(0, 1), 0.0)
        answers = {
            "answers.index": torch.where(answered_Q, class_Q, -1)[:, None].to(torch.int16),
            "answers.prob": share_Q[:, None].to(torch.float16),
        }
        return Shared(frozen=answers), {
            "clients": float(total.count),
            "queries": float(queries),
            "answered": float(answered_Q.sum()),
            "sensitivity": joint_sensitivity(queries, sigma=self.sigma, threshold_sigma=self.threshold_sigma),
        }
