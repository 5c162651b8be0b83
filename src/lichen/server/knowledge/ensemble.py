"""Ensembles predictions of public rows: exact means over clients.

    prob     p̄ = Σ w p / Σ w                                      (FedMD; before it is sharpened, DS-FL)
    logits   p̄ = softmax(Σ w log p / Σ w)                          (FedDF)

``sharpen`` is DS-FL's entropy reduction: the mean goes through a softmax at a temperature below one, so
that what clients with unlike rows agree on stands out from what they merely do not exclude. The mean of
logits favours what no model rules out, the mean of probabilities what any model is sure of.

Who is listened to: every client alike; by its examples; by its *confidence* in each row, which is one
minus the entropy of its answer over log K; or class by class, by how many rows of that class it has seen,
so that a client is not asked of what it never met.

Logits are taken up to a row's shift, as log-probabilities, for a softmax forgets it. All sums are of
integers (:mod:`lichen.server.sums.fixed_point`): the same bytes in any order, under masks too.

References:
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581
    Tao Lin, Lingjing Kong, Sebastian U. Stich and Martin Jaggi. "Ensemble Distillation for Robust Model
    Fusion in Federated Learning." NeurIPS 2020. https://arxiv.org/abs/2006.07242 (FedDF)
    Sohei Itahara, Takayuki Nishio, Yusuke Koda, Masahiro Morikura and Koji Yamamoto. "Distillation-Based
    Semi-Supervised Federated Learning for Communication-Efficient Collaborative Training with Non-IID
    Private Data." IEEE Transactions on Mobile Computing 22(1), 2023. https://arxiv.org/abs/2008.06180

Legend: C clients, N public rows, K classes, k answers kept of each row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message, take_client
from lichen.core.tree import Tree, zeros_like
from lichen.core.wire.shared import Shared
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, weigh_C

__all__ = ["Ensemble", "Listening", "as_answers"]

Listening = Literal["uniform", "examples", "confidence", "classes"]

_LEAST = -1000.0  # of a log-probability: nothing is left of it in any mean, and the sums stay in range
_SURE = 2.0**-20  # least confidence, so that rows nobody is sure of still have a mean


@final
@dataclass(frozen=True, slots=True)
class Ensemble(Summed):
    """The mean answer to public rows, as ``answers.prob`` and ``answers.index``.

    Takes the messages of :class:`lichen.clients.distillation.predict.Predict`, and of several teachers as
    :class:`lichen.clients.distillation.teacher_labels.AnswerWork` sends them.

    Args:
        mean: Of what.
        classes: K.
        weigh: Who is listened to; ``"classes"`` needs the clients' class counts.
        sharpen: Temperature of the last softmax; DS-FL uses 0.1. None: none.
        keep: k, likeliest classes kept of each row; None: all.
        scale: Bits after the point of the exact sums.

    Raises:
        LichenError: if a word is unknown or a number out of range.
    """

    mean: Literal["prob", "logits"] = "prob"
    _: KW_ONLY
    classes: int
    weigh: Listening = "uniform"
    sharpen: float | None = None
    keep: int | None = None
    scale: int = 30

    def __post_init__(self) -> None:
        if self.mean not in ("prob", "logits"):
            raise LichenError(f"no mean of {self.mean!r}", where="ensemble.mean", fix="use prob or logits")
        if self.weigh not in ("uniform", "examples", "confidence", "classes"):
            raise LichenError(
                f"cannot weigh by {self.weigh!r}",
                where="ensemble.weigh",
                fix="use uniform, examples, confidence or classes",
            )
        if self.sharpen is not None and not 0 < self.sharpen < math.inf:
            raise LichenError(f"{self.sharpen} is no temperature", where="ensemble.sharpen", fix="use a number > 0")
        if not 2 <= self.classes <= 32767:
            raise LichenError(f"{self.classes} classes", where="ensemble.classes", fix="use 2 to 32767")
        if self.keep is not None and not 1 <= self.keep <= self.classes:
            raise LichenError(
                f"{self.keep} of {self.classes} classes", where="ensemble.keep", fix="use 1 to the class count"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=self.scale)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every client's answers, one at a time: in float64 a cohort's would be many times the message.

        Raises:
            LichenError: if a message holds no answers to these K classes.
        """
        weight_C = weigh_C(message, "examples" if self.weigh == "examples" else "uniform", discount_C)
        for c, weight in enumerate(weight_C.tolist()):
            one = take_client(message, c)
            if weight == 0:  # whatever it sent
                one = replace(one, tensors=zeros_like(one.tensors))
            yield Terms(replace(one, tensors=self._answers(one)), weight_C[c : c + 1])

    def _answers(self, one: Message) -> Tree:
        """What is summed of one client's answers, ``(1, ...)`` float64."""
        logp_NK = self._log_probabilities(one)
        x_NK = logp_NK.exp() if self.mean == "prob" else logp_NK
        if self.weigh == "confidence":
            entropy_N = -(logp_NK.exp() * logp_NK).sum(-1)
            sure_N = (1 - entropy_N / math.log(self.classes)).clamp(min=_SURE)
            return {"sum": (x_NK * sure_N[:, None])[None], "weight_N": sure_N[None]}
        if self.weigh == "classes":
            n_K = one.tensors["n"][0].cpu().double() if "n" in one.tensors else torch.empty(0)
            if n_K.shape != (self.classes,) or not bool((n_K >= 0).all()):
                raise self._refused(one, "holds no class counts", "let the work Predict tell its counts")
            return {"sum": (x_NK * n_K)[None], "weight_K": n_K[None]}
        return {"sum": x_NK[None]}

    def _log_probabilities(self, one: Message) -> Tensor:
        tensors = {name: x[0].cpu() for name, x in one.tensors.items()}
        if "logits" in tensors:
            if tensors["logits"].dim() != 2 or tensors["logits"].shape[1] != self.classes:
                raise self._refused(one, f"answers with shape {tuple(tensors['logits'].shape)}", "load one recipe")
            return tensors["logits"].double().log_softmax(-1).clamp(min=_LEAST)
        if not {"index", "prob"} <= tensors.keys() or tensors["index"].shape != tensors["prob"].shape:
            raise self._refused(one, "holds no answers", "pair Ensemble with the work Predict")
        index_Nk, prob_Nk = tensors["index"].long(), tensors["prob"].double()
        if index_Nk.dim() != 2 or bool(((index_Nk < -1) | (index_Nk >= self.classes)).any()):
            raise self._refused(one, f"names a class outside 0..{self.classes - 1}", "load one recipe")
        # A spare last column takes the pairs that name no class.
        given_NK = torch.zeros(index_Nk.shape[0], self.classes + 1, dtype=torch.float64)
        place_Nk = index_Nk.where(index_Nk >= 0, self.classes)
        given_NK.scatter_(1, place_Nk, prob_Nk)
        named_NK = torch.zeros_like(given_NK, dtype=torch.bool).scatter_(1, place_Nk, True)[:, :-1]
        left_N1 = (1 - given_NK[:, :-1].sum(1, keepdim=True)).clamp(min=0)
        spread_NK = torch.where(named_NK, 0.0, left_N1 / (~named_NK).sum(1, keepdim=True).clamp(min=1))
        p_NK = given_NK[:, :-1] + spread_NK
        return (p_NK / p_NK.sum(1, keepdim=True)).log().clamp(min=_LEAST)

    def _refused(self, one: Message, what: str, fix: str) -> LichenError:
        return LichenError(what, where=f"message of client {int(one.client_C[0])}", fix=fix)

    def probabilities(self, total: FixedSum) -> Tensor:
        """``p̄`` ``(N, K)`` float64, rows summing to 1.

        Raises:
            LichenError: if nothing was folded in.
        """
        if not total.count:
            raise LichenError("no client answered", where="aggregator.ensemble", fix="invite clients that have trained")
        sums = fixed_point.read_sums(total)
        if "weight_N" in sums:
            weight = sums["weight_N"][:, None]
        elif "weight_K" in sums:
            weight = sums["weight_K"][None, :]
        else:
            weight = torch.full((1, 1), total.weight / 2**WEIGHT_BITS, dtype=torch.float64)
        none = 0.0 if self.mean == "prob" else -math.inf
        x_NK = torch.where(weight > 0, sums["sum"] / weight.clamp(min=2.0**-self.scale), none)
        if self.mean == "logits":
            return (x_NK / (self.sharpen or 1.0)).softmax(-1)
        p_NK = x_NK / x_NK.sum(1, keepdim=True)
        return p_NK if self.sharpen is None else (p_NK / self.sharpen).softmax(-1)

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """Frozen ``answers.prob`` ``(N, k)`` float16 and ``answers.index`` ``(N, k)``, likeliest first.

        Metrics are ``clients``, and the answers' mean ``entropy`` in nats.

        Raises:
            LichenError: if nothing was folded in.
        """
        p_NK = self.probabilities(total)
        entropy = -torch.special.xlogy(p_NK, p_NK).sum(-1).mean()
        return Shared(frozen=as_answers(p_NK, self.keep)), {"clients": float(total.count), "entropy": float(entropy)}


def as_answers(p_NK: Tensor, keep: int | None = None) -> Tree:
    """The ``keep`` likeliest classes of every row as shared answers.

    >>> {name: x.tolist() for name, x in as_answers(torch.tensor([[0.25, 0.75]]), 1).items()}
    {'answers.prob': [[0.75]], 'answers.index': [[1]]}
    """
    prob_NK, index_NK = p_NK.sort(dim=-1, descending=True, stable=True)
    most = p_NK.shape[1] if keep is None else keep
    narrow = torch.int8 if p_NK.shape[1] <= 128 else torch.int16
    return {
        "answers.prob": prob_NK[:, :most].half().contiguous(),
        "answers.index": index_NK[:, :most].to(narrow).contiguous(),
    }
