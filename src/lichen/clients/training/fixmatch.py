"""FixMatch: pseudo-labels from weakly augmented rows train the model on strongly augmented ones.

:class:`FixMatch` goes around :class:`lichen.clients.training.train.Train`. In every step the client's own rows
without a label (``labels_CB`` = -100, ``index_CB`` >= 0) are seen in a weak view; where the likeliest
class has at least ``threshold``, it becomes the row's label, and the strong view is to say the same:

    mean over labelled rows of CE(weak view, label)
    + weight * mean over unlabelled rows of [sure] CE(strong view, label of the weak view)

Labels come from the client's model as it is now (FixMatch), or as it was received (``by="received"``:
SemiFL's clients), or for some rounds from a teacher that has answered for the client's own rows: zero-shot
labels of a foundation model. With ``rows`` the threshold of a class grows with how many rows of it are
already learned (FlexMatch): hard classes get in early. With ``mixup`` rows that are sure are mixed, as
SemiFL does. A client that has no unlabelled row in a step takes the wrapped step, bit for bit; one that
has, but is sure of none and holds no label there, does not step.

References:
    Kihyuk Sohn, David Berthelot, Chun-Liang Li, Zizhao Zhang, Nicholas Carlini, Ekin D. Cubuk, Alex
    Kurakin, Han Zhang and Colin Raffel. "FixMatch: Simplifying Semi-Supervised Learning with Consistency
    and Confidence." NeurIPS 2020. https://arxiv.org/abs/2001.07685
    Bowen Zhang, Yidong Wang, Wenxin Hou, Hao Wu, Jindong Wang, Manabu Okumura and Takahiro Shinozaki.
    "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling." NeurIPS 2021.
    https://arxiv.org/abs/2110.08263
    Enmao Diao, Jie Ding and Vahid Tarokh. "SemiFL: Semi-Supervised Federated Learning for Unlabeled
    Clients with Alternate Training." NeurIPS 2022. https://arxiv.org/abs/2106.01432
    Hongyi Zhang, Moustapha Cisse, Yann N. Dauphin and David Lopez-Paz. "mixup: Beyond Empirical Risk
    Minimization." ICLR 2018. https://arxiv.org/abs/1710.09412

Legend: C clients, B rows, K classes, R rows of a client's shard, k answers kept of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from lichen.clients.training.soft_targets import TargetLoss
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, Expected
from lichen.core.message import Job, Message
from lichen.core.seeds import numpy_generator
from lichen.core.tree import Tree
from lichen.data.batches.augment import Views

__all__ = ["FixMatch", "thresholds_CK"]

_UNSEEN, _UNSURE = -2, -1


def thresholds_CK(table_CR: Tensor, classes: int, threshold: float) -> Tensor:
    """FlexMatch's thresholds: ``threshold * b / (2 - b)``, b a class's share of the class learned best.

    How far a class is learned is the number of rows that are surely of it; while more rows are unsure,
    their number stands for the best. Rows not yet seen do not count.

    Args:
        table_CR: The class each row was last found to be, -1 where that was not sure, -2 where it was not asked.
        classes: K.
        threshold: That of the class learned best.

    >>> table = torch.tensor([[0, 0, 0, 0, 1, 1, -1, -2]])
    >>> thresholds_CK(table, 3, 0.9)
    tensor([[0.9000, 0.3000, 0.0000]], dtype=torch.float64)
    """
    learned_CK = torch.stack([(table_CR == k).sum(1) for k in range(classes)], 1).double()
    best_C = torch.maximum(learned_CK.amax(1), (table_CR == _UNSURE).sum(1).double())
    share_CK = learned_CK / best_C.clamp(min=1).unsqueeze(1)
    return threshold * share_CK / (2 - share_CK)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FixMatchState:
    """The wrapped state, steps done, and what is known of the rows.

    Attributes:
        inner: The training's.
        step: Steps so far.
        initial_CR: The table as it came, int32; ``(C, 0)`` where none is kept.
        table_CR: As for :func:`thresholds_CK`.
        sums: ``(C,)`` float64: ``unlabelled`` rows seen, and how many of them got a ``pseudo`` label.
    """

    inner: TrainState
    step: int
    initial_CR: Tensor
    table_CR: Tensor
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class FixMatch:
    """Training that also learns from the client's unlabelled rows.

    What a client's weight counts as an example is a labelled row, or one that got a label here. With
    ``rows`` the private state has ``semi/table``, int32 ``(rows,)``.

    Args:
        inner: What is done with labelled rows.
        views: Makes weak and strong views.
        threshold: How likely a class must be.
        weight: λ of the unlabelled rows' loss.
        rows: Rows of the largest client: each class gets a threshold of its own. None: one for all.
        by: Whose labels: the model's as it is ``"now"``, or as the client ``"received"`` it.
        teacher_rounds: In the job's versions below this, rows that have a teacher's answer get its label.
        warm: In versions below this nobody labels anything: a model that knows nothing yet is sure of the wrong.
        mixup: Rows with a label found here are mixed two by two, in shares drawn from Beta(a, a); 0: none.

    Raises:
        LichenError: if a value is out of range, or the model is no classifier.
    """

    inner: Train
    views: Views
    _: KW_ONLY
    threshold: float = 0.95
    weight: float = 1.0
    rows: int | None = None
    by: Literal["now", "received"] = "now"
    teacher_rounds: int = 0
    mixup: float = 0.0
    warm: int = 0

    def __post_init__(self) -> None:
        if self.inner.model.classes is None:
            raise LichenError("a language model has no class to be sure of", where="semi", fix="use task: classify")
        if not 0 <= self.threshold <= 1:
            raise LichenError(f"{self.threshold} is no probability", where="semi.threshold", fix="use 0.8 to 0.95")
        for name in ("weight", "mixup"):
            if not 0 <= getattr(self, name) < math.inf:
                place = "semi.weight" if name == "weight" else f"FixMatch.{name}"
                raise LichenError(f"{getattr(self, name)} is out of range", where=place, fix="use 0 or more")
        if self.rows is not None and self.rows < 1:
            raise LichenError(f"{self.rows} rows", where="FixMatch.rows", fix="use the rows of the largest client")
        if self.by not in ("now", "received"):
            raise LichenError(f"labels cannot be by {self.by!r}", where="FixMatch.by", fix="use now or received")

    def expected(self, job: Job) -> Expected:
        """The wrapped work's, with the two counts of unlabelled rows."""
        inner = self.inner.expected(job)
        return replace(inner, metrics={**inner.metrics, "unlabelled": COUNT, "pseudo": COUNT})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> FixMatchState:
        """The wrapped work's beginning; it does not see the table.

        Raises:
            LichenError: if the table that was kept has another size.
        """
        retained, own = trees.split(own_C or {}, "semi/")
        fresh_CR = torch.full((len(clients), self.rows or 0), _UNSEEN, dtype=torch.int32)
        table_CR = retained["table"].cpu() if self.rows and "table" in retained else fresh_CR
        if table_CR.shape != fresh_CR.shape:
            raise LichenError(
                f"the table is of {table_CR.shape[1]} rows", where="private state", fix="start a new run folder"
            )
        return FixMatchState(
            inner=self.inner.init(job, clients, own or None),
            step=0,
            initial_CR=table_CR,
            table_CR=table_CR,
            sums={name: torch.zeros(len(clients), dtype=torch.float64) for name in ("unlabelled", "pseudo")},
        )

    def step(self, state: FixMatchState, batch: Batch) -> FixMatchState:
        """The wrapped step, with what the unlabelled rows of each client are now found to be.

        Raises:
            LichenError: if a client has more rows than the table, answers are named but not there, or rows
                of tokens are to be mixed.
        """
        free_CB = (batch["index_CB"] >= 0) & (batch["labels_CB"] < 0) & batch["active_C"].unsqueeze(1)
        some_C = free_CB.any(1)
        if not bool(some_C.any()) or state.inner.job.version < self.warm:
            return replace(state, inner=self.inner.step(state.inner, batch), step=state.step + 1)
        job, clients = state.inner.job, state.inner.clients
        weak, strong = (
            self.views.view(batch, kind, seed=job.seed, clients=clients, step=state.step) for kind in ("weak", "strong")
        )
        chance_CB, label_CB = self._found(state.inner, weak, free_CB)
        limit_CB = torch.full_like(chance_CB, self.threshold)
        table_CR = state.table_CR
        if self.rows is not None:
            limit_CK = thresholds_CK(table_CR, int(self.inner.model.classes or 0), self.threshold)
            limit_CB = limit_CK.gather(1, label_CB).to(chance_CB)
            table_CR = self._entered(table_CR, batch["index_CB"], free_CB, label_CB, chance_CB)
        sure_CB = free_CB & (chance_CB >= limit_CB)
        share_C = self.weight / free_CB.sum(1).clamp(min=1)
        target_CBK = torch.nn.functional.one_hot(label_CB, int(self.inner.model.classes or 0)).float()
        target_CBK = target_CBK * (sure_CB * share_C.unsqueeze(1)).unsqueeze(-1)
        labelled_CB = batch["labels_CB"] >= 0
        ready = {**batch, "target_CBK": target_CBK}
        for name, x in batch.items():
            if x is not weak[name] or x is not strong[name]:
                lightly = _where(some_C.unsqueeze(1).expand_as(free_CB), weak[name], x)
                ready[name] = _where(free_CB, strong[name], lightly)
        if "answer_CB" in batch:
            # These rows' answers are used here or not at all.
            ready["answer_CB"] = batch["answer_CB"].masked_fill(free_CB, -1)
            labelled_CB = labelled_CB | (ready["answer_CB"] >= 0)
        ready["active_C"] = batch["active_C"] & (~some_C | (sure_CB | labelled_CB).any(1))
        if self.mixup:
            if "x_CBF" not in batch:
                raise LichenError("rows of tokens cannot be mixed", where="FixMatch.mixup", fix="set it to 0")
            ready = self._mixed(ready, weak["x_CBF"], sure_CB, state)
        seen = {"unlabelled": free_CB.sum(1), "pseudo": sure_CB.sum(1)}
        return replace(
            state,
            inner=replace(self.inner, model=TargetLoss(self.inner.model)).step(state.inner, ready),
            step=state.step + 1,
            table_CR=table_CR,
            sums={name: total + seen[name] for name, total in state.sums.items()},
        )

    def _found(self, inner: TrainState, weak: Batch, free_CB: Tensor) -> tuple[Tensor, Tensor]:
        """``(chance_CB, label_CB)`` on the host: the likeliest class of each row, by model or teacher."""
        answering = inner.params_C if self.by == "now" else inner.initial_C
        with torch.no_grad():
            logits_CBK = self.inner.model.logits({**answering, **inner.frozen_C}, inner.fixed, weak)
            pairs = [x_BK.float().softmax(-1).max(-1) for x_BK in logits_CBK]
        chance_CB, label_CB = (torch.stack(x).cpu() for x in zip(*pairs, strict=True))
        if inner.job.version < self.teacher_rounds and "answer_CB" in weak:
            teacher_CB = free_CB & (weak["answer_CB"] >= 0)
            chance_Nk, index_Nk = (_answers(inner.fixed, name) for name in ("prob", "index"))
            best_N = chance_Nk.float().argmax(1, keepdim=True)
            row_CB = weak["answer_CB"].clamp(min=0)
            chance_CB = torch.where(teacher_CB, chance_Nk.gather(1, best_N)[:, 0].float()[row_CB], chance_CB)
            label_CB = torch.where(teacher_CB, index_Nk.long().gather(1, best_N)[:, 0][row_CB], label_CB)
        return chance_CB, label_CB

    def _entered(
        self, table_CR: Tensor, index_CB: Tensor, free_CB: Tensor, label_CB: Tensor, chance_CB: Tensor
    ) -> Tensor:
        most = int(index_CB.max())
        if most >= table_CR.shape[1]:
            raise LichenError(
                f"a client has more than {most} rows", where="FixMatch.rows", fix="give the rows of the largest client"
            )
        status_CB = torch.where(chance_CB >= self.threshold, label_CB, _UNSURE).to(table_CR.dtype)
        c_R, b_R = free_CB.nonzero(as_tuple=True)
        entered_CR = table_CR.clone()
        entered_CR[c_R, index_CB[c_R, b_R]] = status_CB[c_R, b_R]
        return entered_CR

    def _mixed(self, ready: Mapping[str, Tensor], x_CBF: Tensor, sure_CB: Tensor, state: FixMatchState) -> Tree:
        """The batch with as many rows again below it: every sure row mixed with one of its client's others."""
        targets, more_CBF = torch.zeros_like(ready["target_CBK"]), torch.zeros_like(x_CBF)
        for c, client in enumerate(state.inner.clients):
            rows = sure_CB[c].nonzero()[:, 0]
            draw = numpy_generator(state.inner.job.seed, client, "mixup", state.step)
            share, other = float(draw.beta(self.mixup, self.mixup)), rows[torch.from_numpy(draw.permutation(len(rows)))]
            for to, x in ((more_CBF, x_CBF), (targets, ready["target_CBK"])):
                to[c, rows] = share * x[c, rows] + (1 - share) * x[c, other]
        below: Tree = {"x_CBF": more_CBF, "target_CBK": targets}
        for name, empty in (("labels_CB", -100), ("index_CB", -1), ("answer_CB", -1)):
            if name in ready:
                below[name] = torch.full_like(ready[name], empty)
        return {name: torch.cat([x, below[name]], 1) if name in below else x for name, x in ready.items()}

    def final(self, state: FixMatchState) -> tuple[Message, Tree | None]:
        """The wrapped work's message, with the metrics ``unlabelled`` and ``pseudo``; and its private state."""
        message, own_C = self.inner.final(state.inner)
        message = replace(message, metrics={**message.metrics, **state.sums})
        if self.rows is None:
            return message, own_C
        finite_C1 = (message.metrics["failed"].cpu() == 0).unsqueeze(1)
        table_CR = torch.where(finite_C1, state.table_CR, state.initial_CR)
        return message, trees.join("semi/", {"table": table_CR}, own_C or {})


def _answers(fixed: Tree, name: str) -> Tensor:
    if f"answers.{name}" not in fixed:
        raise LichenError("rows name a teacher's answers, but none came down", where="job")
    return fixed[f"answers.{name}"].cpu()


def _where(mask_CB: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask_CB.view(*mask_CB.shape, *[1] * (a.dim() - 2)), a, b)
