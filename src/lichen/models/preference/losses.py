"""Losses of preferences, each of one client's rows: DPO, KTO, ORPO, SimPO, and the likelihood of good answers alone.

With log π(y | x) the sum over an answer's tokens, r(y) = log π(y | x) - log π_ref(y | x), where π_ref is the model that
training begins from, and σ the logistic function:

=========  =============================================================================================
``dpo``    -log σ(β (r(y_w) - r(y_l)))
``kto``    good rows λ_g (1 - σ(β (r - z))), bad ones λ_b (1 - σ(β (z - r))); z = max(0, mean r of the batch's
           mismatched rows), without a gradient
``orpo``   -log p_w - β log σ(log odds_w - log odds_l), p the geometric mean of a token's probability
``simpo``  -log σ(β (log p_w - log p_l) - γ)
``spin``   that of ``dpo``, y_l being the reference's own answer
``sft``    -log p of good rows
=========  =============================================================================================

β of ``orpo`` is what its paper calls λ.

References:
    Rafael Rafailov, Archit Sharma, Eric Mitchell, Stefano Ermon, Christopher D. Manning and Chelsea Finn. "Direct
    Preference Optimization: Your Language Model is Secretly a Reward Model." NeurIPS 2023.
    https://arxiv.org/abs/2305.18290
    Kawin Ethayarajh, Winnie Xu, Niklas Muennighoff, Dan Jurafsky and Douwe Kiela. "KTO: Model Alignment as Prospect
    Theoretic Optimization." ICML 2024. https://arxiv.org/abs/2402.01306
    Jiwoo Hong, Noah Lee and James Thorne. "ORPO: Monolithic Preference Optimization without Reference Model." EMNLP
    2024. https://arxiv.org/abs/2403.07691
    Yu Meng, Mengzhou Xia and Danqi Chen. "SimPO: Simple Preference Optimization with a Reference-Free Reward." NeurIPS
    2024. https://arxiv.org/abs/2405.14734
    Zixiang Chen, Yihe Deng, Huizhuo Yuan, Kaixuan Ji and Quanquan Gu. "Self-Play Fine-Tuning Converts Weak Language
    Models to Strong Language Models." ICML 2024. https://arxiv.org/abs/2401.01335

Legend: R rows of one client.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lichen.core.errors import LichenError
from lichen.models.preference.kinds import PREFERENCES

__all__ = ["PreferenceLoss", "ScoredRows"]

_LEAST = 1e-7
"""How far below 1 a probability is taken to be at most, whose odds would have no end."""


@final
class ScoredRows(NamedTuple):
    """What a model says of one client's rows.

    Attributes:
        first_R: Log-probability of each row's answer.
        tokens_R: Its tokens.
        second_R: The same of its second answer; 0 where there is none.
        second_tokens_R: Its tokens; 0 where there is none.
        reference_R2: Both by the reference.
        good_R: Whether a row is good.
    """

    first_R: Tensor
    tokens_R: Tensor
    second_R: Tensor
    second_tokens_R: Tensor
    reference_R2: Tensor
    good_R: Tensor

    @property
    def reward_R(self) -> Tensor:
        """r of each row's answer."""
        return self.first_R - self.reference_R2[:, 0]

    @property
    def second_reward_R(self) -> Tensor:
        """r of its second answer."""
        return self.second_R - self.reference_R2[:, 1]

    @property
    def mean_R(self) -> Tensor:
        """Log-probability of a token of the answer, on average."""
        return self.first_R / self.tokens_R.clamp(min=1)

    @property
    def second_mean_R(self) -> Tensor:
        """The same of the second answer."""
        return self.second_R / self.second_tokens_R.clamp(min=1)


@final
@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """A loss of preferences, by its word.

    Args:
        kind: One of :data:`lichen.models.preference.kinds.PREFERENCES`.
        beta: β, or λ of ORPO.
        gamma: The margin of SimPO.
        good_weight: λ_g of KTO.
        bad_weight: λ_b of KTO.

    Raises:
        LichenError: if there is no such kind.
    """

    kind: str
    _: KW_ONLY
    beta: float = 0.1
    gamma: float = 1.0
    good_weight: float = 1.0
    bad_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in PREFERENCES:
            raise LichenError(
                f"there is no loss {self.kind!r}", where="prefer.kind", fix=f"use one of: {', '.join(PREFERENCES)}"
            )

    @property
    def second_learns(self) -> bool:
        """Second answers have a gradient, and rows without one say nothing."""
        return self.kind in ("dpo", "spin", "orpo", "simpo")

    def counted_R(self, rows: ScoredRows) -> Tensor:
        """Rows that say something, bool."""
        answered_R = rows.tokens_R > 0
        if self.kind == "kto":
            return answered_R
        counted_R = answered_R & rows.good_R
        return counted_R & (rows.second_tokens_R > 0) if self.second_learns else counted_R

    def losses_R(self, rows: ScoredRows) -> Tensor:
        """``(R,)``: each row's loss; what it is of rows that say nothing is no matter."""
        if self.kind in ("dpo", "spin"):
            return -logsigmoid(self.beta * (rows.reward_R - rows.second_reward_R))
        if self.kind == "kto":
            shift = self.shift(rows)
            signed_R = torch.where(rows.good_R, rows.reward_R - shift, shift - rows.reward_R)
            weight_R = torch.where(rows.good_R, self.good_weight, self.bad_weight)
            return weight_R.to(signed_R) * (1 - torch.sigmoid(self.beta * signed_R))
        if self.kind == "simpo":
            return -logsigmoid(self.beta * (rows.mean_R - rows.second_mean_R) - self.gamma)
        if self.kind == "orpo":
            ratio_R = _log_odds(rows.mean_R) - _log_odds(rows.second_mean_R)
            return -rows.mean_R - self.beta * logsigmoid(ratio_R)
        return -rows.mean_R

    @staticmethod
    def shift(rows: ScoredRows) -> Tensor:
        """z of KTO: the mean r of the mismatched rows, at least 0; 0 where there is none. It has no gradient."""
        there_R = rows.second_tokens_R > 0
        reward_R = torch.where(there_R, rows.second_reward_R, torch.zeros_like(rows.second_reward_R)).detach()
        return (reward_R.sum() / there_R.sum().clamp(min=1)).clamp(min=0)


def _log_odds(log_R: Tensor) -> Tensor:
    """log p / (1 - p)."""
    log_R = log_R.clamp(max=-_LEAST)
    return log_R - torch.log(-torch.expm1(log_R))
