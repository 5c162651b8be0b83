"""The labelled token positions of a batch, and distillation losses on them.

What a model answers there (its likeliest tokens) and what it can learn there from somebody else's answers
both come from the output layer, some places at a time: logits are never held whole.

:class:`DistilledLM` is a language model that hears a teacher. At each place with an answer it takes the cross
entropy against the teacher's kept tokens, and at every labelled place ``lm`` times the ordinary loss. The kept
probabilities are scaled to sum to one, as FedMKT does; or what the teacher did not tell stays one class more,
"any other token" (``rest``): where much is left over, scaling claims a certainty that the teacher does not have.

References:
    Geoffrey Hinton, Oriol Vinyals and Jeff Dean. "Distilling the Knowledge in a Neural Network." NIPS
    Deep Learning Workshop 2014. https://arxiv.org/abs/1503.02531
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224

Legend: C clients, B rows, T tokens, R places with a label, k answers kept of a place, H width, V tokens of
the vocabulary, N texts, S places of all texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, split
from lichen.models.client_axis import row_by_row
from lichen.models.objectives import NextToken

__all__ = ["DistilledLM", "LogitsProvider", "TokenPositions", "top_answers"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class TokenPositions:
    """One client's labelled places of a batch, row by row.

    Args:
        hidden_RH: What the output layer is given.
        label_R: The next tokens.
        head: The output layer: ``(R, H)`` to logits ``(R, V)``.
    """

    hidden_RH: Tensor
    label_R: Tensor
    head: Callable[[Tensor], Tensor]


class LogitsProvider(CohortModel, Protocol):
    """A cohort of causal language models that shows its labelled places."""

    def positions(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> list[TokenPositions]:
        """The labelled places of each client; of one that is not active, none."""
        ...


def top_answers(positions: TokenPositions, k: int, *, size: int, chunk: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """``(index_Rk int64, prob_Rk float32, loss_R float32)``: the likeliest next tokens, and the label's loss.

    Args:
        positions: Where.
        k: Tokens kept; -1 with probability 0 where the vocabulary has fewer.
        size: Tokens of the tokenizer; a model may have rows for more, which are never answered.
        chunk: Places at once.
    """
    count, device = positions.label_R.shape[0], positions.label_R.device
    index_Rk = torch.full((count, k), -1, dtype=torch.int64, device=device)
    prob_Rk = torch.zeros(count, k, device=device)
    loss_R = torch.zeros(count, device=device)
    with torch.no_grad():
        for at in range(0, count, chunk):
            part = slice(at, at + chunk)
            log_rV = nn.functional.log_softmax(positions.head(positions.hidden_RH[part]).float(), dim=-1)
            loss_R[part] = -log_rV.gather(1, positions.label_R[part, None])[:, 0]
            known_rV = log_rV[:, :size]
            best_rk, number_rk = known_rV.topk(min(k, known_rV.shape[1]), dim=-1)
            index_Rk[part, : number_rk.shape[1]] = number_rk
            prob_Rk[part, : number_rk.shape[1]] = best_rk.exp()
    return index_Rk, prob_Rk, loss_R


@final
class DistilledLM:
    """A cohort of language models that also learns from answers; a :class:`lichen.core.contracts.model.CohortModel`.

    The answers come down as ``answers.index`` and ``answers.prob`` ``(S, k)``, with ``answers.at`` ``(N + 1,)``,
    the place where each text begins; a batch names a row's text in ``answer_CB``, -1 for none.

    Args:
        model: Who learns.
        lm: Weight of the ordinary loss, FedMKT's λ.
        rest: Keep the probability of all other tokens together as a class of its own.
        chunk: Places the output layer sees at once; more are computed twice, to save memory.

    Raises:
        LichenError: if the weight is negative or no number.
    """

    __slots__ = ("_chunk", "base", "classes", "group", "inner", "lm", "name", "objective", "reference", "rest")

    def __init__(self, model: LogitsProvider, *, lm: float = 1.0, rest: bool = False, chunk: int = 1024) -> None:
        if not (math.isfinite(lm) and lm >= 0):
            raise LichenError(f"{lm} is out of range", where="listen.lm", fix="use a number >= 0")
        self.inner, self.lm, self.rest, self._chunk = model, lm, rest, chunk
        self.name, self.base, self.group = model.name, model.base, model.group
        self.classes: int | None = None
        self.objective = NextToken()
        self.reference = model.reference

    def init(self, seed: int) -> Tree:
        """As the model it wraps."""
        return self.inner.init(seed)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: both parts summed, and the labelled places, or with ``lm`` 0 the answered ones.

        Raises:
            LichenError: if no answers came down, or a text lies outside them.
        """
        answers, plain = split(fixed, "answers.")
        if answers.keys() != {"index", "prob", "at"}:
            raise LichenError("the texts' answers did not come down", where="job", fix="run it through DistillLogits")
        losses, counts = [], []
        for c, positions in enumerate(self.inner.positions(trainable_C, plain, batch)):
            place_R = _answered(batch, c, answers).to(positions.label_R.device)
            index_Rk, prob_Rk = _known_pairs(answers, place_R, scaled=not self.rest)
            losses.append(self._loss(positions, index_Rk, prob_Rk))
            has_target = prob_Rk.sum(1) > 0
            counts.append(has_target.sum() if self.lm == 0 else torch.full_like(has_target.sum(), len(has_target)))
        return torch.stack(losses), torch.stack(counts)

    def _loss(self, positions: TokenPositions, index_Rk: Tensor, prob_Rk: Tensor) -> Tensor:
        def part(hidden_rH: Tensor, label_r: Tensor, index_rk: Tensor, prob_rk: Tensor) -> Tensor:
            logits_rV = positions.head(hidden_rH)
            log_rV = nn.functional.log_softmax(_wide(logits_rV), dim=-1)
            log_rk, prob_rk = log_rV.gather(1, index_rk), prob_rk.to(log_rV)
            cross = -(prob_rk * log_rk).sum()
            if self.rest:
                cross = cross - _rest(log_rk, prob_rk)
            return cross + self.lm * nn.functional.nll_loss(log_rV, label_r, reduction="sum") if self.lm else cross

        rows = (positions.hidden_RH, positions.label_R, index_Rk, prob_Rk)
        count = positions.label_R.shape[0]
        if 0 < count <= self._chunk:
            return part(*rows)
        # An empty sum: zero, yet part of the graph, for a client with nothing to learn from.
        total = _wide(positions.hidden_RH[:0]).sum()
        for some in zip(*(torch.split(x, self._chunk) for x in rows), strict=True) if count else ():
            grown = torch.is_grad_enabled()
            total = total + (checkpoint(part, *some, use_reentrant=False) if grown else part(*some))
        return total

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``, one row at a time."""
        return row_by_row(self.loss, trainable_C, fixed, batch)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """Never: a language model's logits are too large to hold.

        Raises:
            LichenError: always.
        """
        raise LichenError("a language model's logits are never held whole", where=self.name, fix="ask for its places")


def _rest(log_rk: Tensor, prob_rk: Tensor) -> Tensor:
    """What the learner says of all tokens that were not told, weighted by what the teacher left for them."""
    own_mass_r, teacher_mass_r = log_rk.exp().where(prob_rk > 0, 0.0).sum(1), prob_rk.sum(1)
    left_r = (1 - teacher_mass_r).clamp(min=0) * (teacher_mass_r > 0)
    return (left_r * torch.log1p(-own_mass_r.clamp(max=1 - 1e-6))).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _answered(batch: Batch, client: int, answers: Tree) -> Tensor:
    """``(R,)``: for each labelled place of one client its place among the answers, -1 for none; on the host."""
    chosen_BT = (batch["labels_CBT"][client].cpu()[:, 1:] != -100) & batch["active_C"][client].cpu()
    text_B = batch["answer_CB"][client].cpu() if "answer_CB" in batch else torch.full((len(chosen_BT),), -1)
    at = answers["at"].cpu()
    if bool((text_B >= len(at) - 1).any()):
        raise LichenError(f"a row names text {int(text_B.max())} of {len(at) - 1}", where="batch")
    count_B, known_B = chosen_BT.sum(1), text_B >= 0
    begin_B, end_B = at[text_B.clamp(min=0)], at[text_B.clamp(min=0) + 1]
    if bool((known_B & (count_B != end_B - begin_B) & (count_B > 0)).any()):
        raise LichenError(
            "a text has not as many labelled tokens as answers",
            where="batch",
            fix="let teller and hearer hold the same texts, cut nowhere",
        )
    place_BT = begin_B[:, None] + chosen_BT.cumsum(1) - 1
    return torch.where(known_B[:, None], place_BT, -1)[chosen_BT]


def _known_pairs(answers: Tree, place_R: Tensor, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """The answers at these places, scaled to sum to one where asked; zeros where there are none."""
    device = place_R.device
    index_Sk, prob_Sk = answers["index"].to(device), answers["prob"].to(device)
    if not len(index_Sk):
        empty = torch.zeros(len(place_R), 1, device=device)
        return empty.long(), empty
    from_R = place_R.clamp(min=0)
    index_Rk = index_Sk[from_R].long()
    none_Rk = (index_Rk < 0) | (place_R < 0)[:, None]
    prob_Rk = prob_Sk[from_R].float().masked_fill(none_Rk, 0)
    sum_R1 = prob_Rk.sum(1, keepdim=True).clamp(min=1e-12)
    return index_Rk.clamp(min=0), prob_Rk / (sum_R1 if scaled else sum_R1.clamp(min=1))
