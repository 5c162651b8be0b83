"""A soft prompt of few numbers for gradient-free search: prompt = p0 + R z.

R is drawn once from a seed and never sent; z, some hundred numbers, is what clients search for and a
server averages. With z of unit spread, R z has ``scale`` times the spread of the model's own
embeddings, which the model knows and nobody else needs to. To every work and evaluation this is a cohort
model whose trainable tensors are ``mean`` (z) and ``std`` (how far a search looks around it; the loss does
not see it).

References:
    Tianxiang Sun, Yunfan Shao, Hong Qian, Xuanjing Huang and Xipeng Qiu. "Black-Box Tuning for
    Language-Model-as-a-Service." ICML 2022. https://arxiv.org/abs/2201.03514
    Tianxiang Sun, Zhengfu He, Hong Qian, Yunhua Zhou, Xuanjing Huang and Xipeng Qiu. "BBTv2: Towards a
    Gradient-Free Future with Large Language Models." EMNLP 2022. https://arxiv.org/abs/2205.11200
    (normal projections scaled to the embeddings).

Legend: C clients, B rows, T tokens, K classes, D numbers searched, P positions, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, Objective
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.fm.interface import SoftModel, token_rows
from lichen.models.client_axis import row_by_row
from lichen.models.objectives import Classification, NextToken

__all__ = ["SoftPrompt"]


@final
class SoftPrompt:
    """A soft prompt as a cohort model; clients are gone through one by one, so that company changes no bit.

    Rows with classes are answered by words: the loss is the cross entropy among them alone.

    Args:
        fm: The model.
        seed: R is drawn from it; the same for all of a federation.
        size: D.
        scale: Spread of the offset at ``z = 1``, in units of the embeddings' spread.
        spread: What ``std`` starts from.
        words: One word a class, each a single token; none for language modelling.
        before: Text between the soft prompt and a row.
        after: Text between a row and its answer.

    Raises:
        LichenError: if the model has no room for a soft prompt, or a number is out of range.
    """

    reference = True

    def __init__(
        self,
        fm: SoftModel,
        *,
        seed: int,
        size: int = 500,
        scale: float = 1.0,
        spread: float = 1.0,
        words: Sequence[str] = (),
        before: str = "",
        after: str = "",
    ) -> None:
        if fm.positions < 1:
            raise LichenError("the face has no soft prompt", where="positions", fix="give it positions")
        if size < 1 or not scale > 0 or not spread > 0 or len(words) == 1:
            raise LichenError(
                "size, scale or spread is not positive, or one class alone", where="soft prompt", fix="use > 0, 2 words"
            )
        self.fm, self.words = fm, tuple(words)
        self.name, self.base = f"{fm.name}+prompt", fm.base
        self.group = f"soft-prompt/{size}/{fm.positions}x{fm.width}"
        self.objective: Objective = Classification(len(words)) if words else NextToken()
        self.classes = self.objective.classes
        self.size, self.spread = size, spread
        self._before, self._after = fm.tokens(before), fm.tokens(after)
        generator = torch_generator(seed, "projection")
        self._R_ED = torch.randn(fm.positions * fm.width, size, generator=generator) * (scale / size**0.5)

    def init(self, seed: int) -> Tree:
        """z at zero, which is the starting text; nothing is drawn. ``std`` is float16, to be short on the wire."""
        del seed
        return {"mean": torch.zeros(self.size), "std": torch.full((self.size,), self.spread, dtype=torch.float16)}

    def offset(self, z_D: Tensor) -> Tensor:
        """``(P, H)`` float32: ``R z``."""
        offset_E: Tensor = self._R_ED @ z_D.detach().cpu().float()
        return offset_E.view(self.fm.positions, self.fm.width)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)`` float64: summed cross entropy of labelled rows or tokens; 0 where inactive."""
        del fixed
        found = []
        for c, active in enumerate(batch["active_C"].tolist()):
            if not active:
                found.append((torch.zeros((), dtype=torch.float64), torch.tensor(0)))
                continue
            offset_PH = self.offset(trainable_C["mean"][c])
            if self.classes is None:
                rows = token_rows(batch, c)
                labels = [batch["labels_CBT"][c, b][: len(row)].tolist() for b, row in rows]
                texts = [[*self._before, *row] for _, row in rows]
                hidden = [-100] * len(self._before)
                found.append(self.fm.follow(texts, [[*hidden, *one] for one in labels], offset_PH=offset_PH))
                continue
            rows = [(b, row) for b, row in token_rows(batch, c) if int(batch["labels_CB"][c, b]) >= 0]
            label_B = torch.tensor([int(batch["labels_CB"][c, b]) for b, _ in rows], dtype=torch.int64)
            logp_BK = self._answers([row for _, row in rows], offset_PH)
            found.append((-logp_BK.double().gather(1, label_B[:, None]).sum(), torch.tensor(len(rows))))
        return torch.stack([loss for loss, _ in found]), torch.stack([count for _, count in found])

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``, one row at a time."""
        return row_by_row(self.loss, trainable_C, fixed, batch)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK``: log-probabilities among the words; zeros for padding rows and inactive clients.

        Raises:
            LichenError: for a language model.
        """
        del fixed
        if self.classes is None:
            raise LichenError("has no classes", where="soft prompt", fix="give it words")
        active = batch["active_C"].tolist()
        out_CBK = torch.zeros(*batch["input_ids_CBT"].shape[:2], self.classes)
        for c in (c for c, on in enumerate(active) if on):
            rows = token_rows(batch, c)
            logp_BK = self._answers([row for _, row in rows], self.offset(trainable_C["mean"][c]))
            out_CBK[c, [b for b, _ in rows]] = logp_BK
        return out_CBK

    def _answers(self, rows: Sequence[Sequence[int]], offset_PH: Tensor) -> Tensor:
        texts = [[*self._before, *row, *self._after] for row in rows]
        return torch.log_softmax(self.fm.choose(texts, self.words, offset_PH=offset_PH), -1)
