"""FedMKT's selection: for each text, the logits of least cross entropy.

Research: no recipe and no public name reaches this module.

Each client tells its loss on every public text beside its answers. Of a text the answers of the client with
the lowest loss are kept, and only if that is lower than one's own: who cannot teach is not heard. The clients
make the second half of the choice themselves, against what the server tells
(:class:`lichen.research.mutual.token_distill.DistillLogits`).

Choosing is exact: numbers are compared and copied, never added; equal losses go to the lowest client number.
So messages may come in any order and grouping, and a total holds one answer a text, however many clients
there are. Answers of one vocabulary alone can be compared place by place: others are carried over first
(:class:`lichen.research.mutual.alignment.Bridge`).

References:
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224 (dual minimum cross entropy)

Legend: C clients, N texts, R places with a label, text by text, k answers kept of a place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.single import SingleMessages
from lichen.server.sums.summed import weigh_C

__all__ = ["Chosen", "Select"]

_NOBODY = torch.iinfo(torch.int64).max


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """The best of each text so far.

    Attributes:
        count: Clients heard.
        group: The messages' group.
        best: ``loss`` ``(N,)``, the lowest, infinite where nobody told one; ``client`` ``(N,)``, whose it
            is; ``index`` and ``prob`` ``(R, k)``, that client's answers. Empty before anybody was heard.
    """

    count: int = 0
    group: str = ""
    best: Tree = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Select(SingleMessages):
    """The answers of whoever had the lowest loss, text by text, as an aggregator.

    Args:
        starts: The place where each text begins, and where the last one ends: N + 1 numbers from 0.

    Raises:
        LichenError: if they do not begin at 0 or fall.
    """

    one_version: ClassVar[bool] = True

    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.starts) < 2 or self.starts[0] != 0 or any(a > b for a, b in pairwise(self.starts)):
            raise LichenError("texts begin nowhere, or one behind the next", where="select.starts", fix="rise from 0")

    def zero(self) -> Chosen:
        """Nobody was heard."""
        return Chosen()

    def add(self, total: Chosen, message: Message, discount_C: Tensor | None = None) -> Chosen:
        """Hear every client of the message; one of weight 0, or without a finite loss on a text, is not heard of it.

        Raises:
            LichenError: if the group differs from that before, or the tensors are not of these texts.
        """
        texts, width = len(self.starts) - 1, self.starts[-1]
        try:
            index_CRk, prob_CRk, loss_CN = (message.tensors[name].cpu() for name in ("index", "prob", "loss"))
        except KeyError as error:
            raise LichenError(f"no tensor {error} came", where="message", fix="let clients run ReportLogits") from None
        if index_CRk.shape != prob_CRk.shape or index_CRk.shape[1:2] != (width,) or loss_CN.shape[1:] != (texts,):
            raise LichenError(
                f"answers {tuple(index_CRk.shape)}, losses {tuple(loss_CN.shape)} for {texts} texts, {width} places",
                where=f"message of client {int(message.client_C[0])}",
                fix="let everybody hold the same public texts, and carry answers into one vocabulary",
            )
        weight_C = weigh_C(message, "examples", discount_C)
        for c, (client, weight) in enumerate(zip(message.client_C.tolist(), weight_C.tolist(), strict=True)):
            if weight > 0:
                loss_N = loss_CN[c].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
                nobody_N = loss_N.isinf()
                best = {
                    "loss": loss_N,
                    "client": torch.full((texts,), client, dtype=torch.int64).masked_fill(nobody_N, _NOBODY),
                    "index": index_CRk[c],
                    "prob": prob_CRk[c],
                }
                total = self.merge(total, Chosen(count=1, group=message.group, best=best))
        return total

    def clients(self, total: Chosen) -> int:
        """Clients heard."""
        return total.count

    def merge(self, a: Chosen, b: Chosen) -> Chosen:
        """The better of both, text by text; raises as :meth:`add` where groups differ."""
        if not a.count or not b.count:
            return a if a.count else b
        if a.group != b.group or a.best["index"].shape != b.best["index"].shape:
            raise LichenError(
                f"answers of {a.group!r} and {b.group!r} do not compare",
                where="message",
                fix="carry them into one vocabulary first",
            )
        lower_N = b.best["loss"] < a.best["loss"]
        better_N = lower_N | ((b.best["loss"] == a.best["loss"]) & (b.best["client"] < a.best["client"]))
        better_R1 = self._by_place(better_N)[:, None]
        which = {"loss": better_N, "client": better_N, "index": better_R1, "prob": better_R1}
        best = {name: torch.where(which[name], b.best[name], x) for name, x in a.best.items()}
        return Chosen(count=a.count + b.count, group=a.group, best=best)

    def _by_place(self, x_N: Tensor) -> Tensor:
        length_N = torch.tensor([b - a for a, b in pairwise(self.starts)])
        return x_N.repeat_interleave(length_N)

    def close(self, total: Chosen, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(answers, metrics)``: what is believed, under the names a listener takes them by.

        Args:
            total: At least one client.
            shared: May hold one's own losses as frozen ``answers.loss`` ``(N,)``: a text is believed only where
                the best client's is lower. Without them all are.

        Returns:
            ``answers.index`` and ``answers.prob`` ``(R, k)``, -1 and 0 where nobody is believed;
            ``answers.loss`` ``(N,)``, the best losses; ``answers.client`` ``(N,)``, who is believed, -1 for
            nobody. Metrics: ``clients``, and ``believed``, the share of texts.

        Raises:
            LichenError: if nobody was heard, or one's own losses are of other texts.
        """
        if not total.count:
            raise LichenError("no client told anything", where="aggregator.select", fix="invite more clients")
        loss_N, client_N = total.best["loss"], total.best["client"]
        own_N = shared.frozen.get("answers.loss", torch.full_like(loss_N, torch.inf)).cpu()
        if own_N.shape != loss_N.shape:
            raise LichenError(
                f"{len(own_N)} own losses for {len(loss_N)} texts", where="aggregator.select", fix="tell first"
            )
        accepted_N = (client_N != _NOBODY) & ~(own_N.to(loss_N) <= loss_N)
        gone_R1 = ~self._by_place(accepted_N)[:, None]
        answers = {
            "answers.index": total.best["index"].masked_fill(gone_R1, -1),
            "answers.prob": total.best["prob"].masked_fill(gone_R1, 0),
            "answers.loss": loss_N,
            "answers.client": torch.where(accepted_N, client_N, -1),
        }
        return Shared(frozen=answers), {"clients": float(total.count), "believed": float(accepted_N.double().mean())}

    def dump(self, total: Chosen) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        return dict(total.best), {"count": total.count, "group": total.group}

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> Chosen:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if these are not such a total.
        """
        try:
            count, group = int(header["count"]), str(header["group"])
            best = {name: tensors[name] for name in ("loss", "client", "index", "prob")} if count else {}
        except (KeyError, TypeError, ValueError) as error:
            raise LichenError(f"this is no choice of answers: {error!r}", where="sum", fix="send it again") from None
        return Chosen(count=count, group=group, best=best)
