"""What a model of preferences is scored by: its loss, and how often it ranks the better of two answers above the worse.

A model ranks by r, its log-probability of an answer less that of the reference, and beside it by the mean
log-probability of a token. Of pairs the right ones are counted, a tie as half a one. Of rated rows the scores are
counted in bins, good rows and bad ones apart, so that the area under the ROC curve follows from sums: rows of one bin
are a tie, and the area is wrong by no more than half the share of such ties.

Legend: C clients, B rows, R rows of one client, K bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, LOSS, MetricSpec, sums_of
from lichen.core.tree import Tree
from lichen.models.preference.losses import PreferenceLoss, ScoredRows

__all__ = ["Preferences", "area", "loss_of_rows"]

BINS = 401
TIE = 1e-4
"""Log-probabilities, or scores, that differ by less are equal: rounding lies below."""

_STEPS = (BINS - 1) // 2 / 12
_LONGEST = 20.0


@runtime_checkable
class ScoresRows(Protocol):
    """A model that says what it thinks of single rows."""

    def scored(self, trainable_C: Tree, fixed: Tree, batch: Batch, *, learns: bool) -> list[ScoredRows]:
        """Each client's rows; with ``learns``, with the gradients that the loss asks for."""
        ...


def loss_of_rows(loss: PreferenceLoss, rows: ScoredRows, real_R: Tensor) -> tuple[Tensor, Tensor]:
    """``(loss, count)``: the sum over the rows of one client that are real and say something, and their number."""
    counted_R = loss.counted_R(rows) & real_R
    losses_R = loss.losses_R(rows)
    return torch.where(counted_R, losses_R, torch.zeros_like(losses_R)).sum(), counted_R.sum()


def area(good_K: Tensor, bad_K: Tensor) -> Tensor:
    """The area under the ROC curve from scores counted in rising bins, ``(..., K)``; not-a-number without good or bad.

    >>> area(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 1.0, 0.0])).item()
    0.9375
    """
    below_K = bad_K.cumsum(-1) - bad_K / 2
    return (good_K * below_K).sum(-1) / (good_K.sum(-1) * bad_K.sum(-1))


@final
@dataclass(frozen=True, slots=True)
class Preferences:
    """The sums of a model of preferences.

    ``right`` and ``likelier`` count pairs that r, and the mean log-probability, rank right; of rated rows there are
    ``good_K`` and ``bad_K`` in their place, and ``good_mean_K`` and ``bad_mean_K``. ``nll`` is what the good answers'
    ``tokens`` lose; ``preferred_tokens`` counts those of the answers of pairs that r ranks above.

    Attributes:
        loss: The loss.
        rated: Rows are rated one by one, and no pairs.
    """

    loss: PreferenceLoss
    rated: bool

    @property
    def classes(self) -> int | None:
        """None: tokens are no classes."""
        return None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By what rows are."""
        both: dict[str, tuple[int, ...]] = {"loss_sum": (), "count": (), "nll": (), "tokens": ()}
        if self.rated:
            return both | dict.fromkeys(("good_K", "bad_K", "good_mean_K", "bad_mean_K"), (BINS,))
        return both | dict.fromkeys(("right", "likelier", "pairs", "pair_tokens", "preferred_tokens"), ())

    def specs(self) -> Mapping[str, MetricSpec]:
        """Nothing is negative."""
        return sums_of(self.shapes(), {**dict.fromkeys(self.shapes(), COUNT), "loss_sum": LOSS})

    def sums(self, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """Those of the real rows of active clients.

        Raises:
            LichenError: if the model scores no rows.
        """
        if not isinstance(model, ScoresRows):
            raise LichenError("scores no rows", where=model.name, fix="put it around no model of preferences")
        each = model.scored(params_C, fixed, batch, learns=False)
        real_CB = (batch["index_CB"] >= 0) & batch["active_C"][:, None]
        found = [self._of(rows, real_B.to(rows.first_R.device)) for rows, real_B in zip(each, real_CB, strict=True)]
        return {name: torch.stack([one[name] for one in found]) for name in self.shapes()}

    def _of(self, rows: ScoredRows, real_R: Tensor) -> Tree:
        loss, count = loss_of_rows(self.loss, rows, real_R)
        there_R = real_R & (rows.tokens_R > 0)
        good_R = there_R & rows.good_R
        sums = {
            "loss_sum": loss,
            "count": count,
            "nll": torch.where(good_R, -rows.first_R, 0).sum(),
            "tokens": torch.where(good_R, rows.tokens_R, 0).sum(),
        }
        if self.rated:
            bad_R, scale = there_R & ~rows.good_R, _signed_bins(rows.reward_R)
            mean = _mean_bins(rows.mean_R)
            for name, chosen_R, place_R in (
                ("good_K", good_R, scale),
                ("bad_K", bad_R, scale),
                ("good_mean_K", good_R, mean),
                ("bad_mean_K", bad_R, mean),
            ):
                sums[name] = torch.bincount(place_R[chosen_R], minlength=BINS)
            return sums
        pairs_R = there_R & (rows.second_tokens_R > 0)
        won_R = _won(rows.reward_R - rows.second_reward_R)
        tokens_R = won_R * rows.tokens_R + (1 - won_R) * rows.second_tokens_R
        likelier_R = _won(rows.mean_R - rows.second_mean_R)
        numbers: Sequence[tuple[str, Tensor]] = (
            ("right", won_R),
            ("likelier", likelier_R),
            ("pairs", torch.ones_like(won_R)),
            ("pair_tokens", rows.tokens_R),
            ("preferred_tokens", tokens_R),
        )
        return sums | {name: torch.where(pairs_R, x_R, torch.zeros_like(x_R)).sum() for name, x_R in numbers}

    def made_up(self, ids_CBT: Tensor, mask_CBT: Tensor) -> Tree:
        """Labels of made-up rows: their own tokens."""
        return {"labels_CBT": torch.where(mask_CBT == 1, ids_CBT, -100)}


def _won(margin_R: Tensor) -> Tensor:
    """1 where the first answer is above, 0 where it is below, half a one where neither is."""
    return torch.where(margin_R.abs() < TIE, 0.5, (margin_R > 0).to(margin_R))


def _signed_bins(score_R: Tensor) -> Tensor:
    """Bins that are narrow about 0, and each some 6 per cent wide far from it; the middle one holds ties."""
    place_R = torch.asinh(score_R.double().nan_to_num() / 1e-3) * _STEPS
    return place_R.round().clamp(-(BINS // 2), BINS // 2).long() + BINS // 2


def _mean_bins(mean_R: Tensor) -> Tensor:
    """Bins of equal width from -20 to 0."""
    place_R = (mean_R.double().nan_to_num() / _LONGEST + 1) * (BINS - 1)
    return place_R.round().clamp(0, BINS - 1).long()
