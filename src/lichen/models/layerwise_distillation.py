"""Layer-wise distillation: a student's hidden states follow those of a frozen encoder.

A teacher at hand shows more than its answers. Two terms, each a mean over a row's attended tokens, and
so of the size of one row's loss:

- *hidden states* (TinyBERT): the squared distance of ``W h_student`` to ``h_teacher``, where the
  projection W is learned along and thrown away at the end;
- *relations* (MiniLM): every token's softmax over its scaled dot products with all others, of queries,
  keys or values, compared by Kullback-Leibler divergence. Cut into equally many relation heads on both
  sides (MiniLMv2) they compare models of any width without a projection.

:class:`Layerwise` is a cohort model around the student, so that every work trains it as it is: clients
with the teacher on their own machine, or the server before the first round
(:func:`lichen.clients.distillation.distill.pre_distil`). Its rows are in the teacher's tokens; where the student has a
vocabulary of its own, a table says which of its tokens each of them is, so both always see one text.

References:
    Xiaoqi Jiao, Yichun Yin, Lifeng Shang, Xin Jiang, Xiao Chen, Linlin Li, Fang Wang and Qun Liu.
    "TinyBERT: Distilling BERT for Natural Language Understanding." Findings of EMNLP 2020.
    https://arxiv.org/abs/1909.10351
    Wenhui Wang, Furu Wei, Li Dong, Hangbo Bao, Nan Yang and Ming Zhou. "MiniLM: Deep Self-Attention
    Distillation for Task-Agnostic Compression of Pre-Trained Transformers." NeurIPS 2020.
    https://arxiv.org/abs/2002.10957
    Wenhui Wang, Hangbo Bao, Shaohan Huang, Li Dong and Furu Wei. "MiniLMv2: Multi-Head Self-Attention
    Relation Distillation for Compressing Pretrained Transformers." Findings of ACL 2021.
    https://arxiv.org/abs/2012.15828

Legend: C clients, B rows, T tokens, E student's width, H teacher's width, A relation heads, V teacher's
vocabulary, N = C * B.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, Objective
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree, to_device
from lichen.models.client_axis import map_clients, row_by_row
from lichen.models.cohort import group_of
from lichen.models.loading.load import base_digest, frozen_eval
from lichen.models.losses import classify_losses_C

__all__ = ["EncoderStates", "Layers", "Layerwise", "Open", "hidden_rows", "relation_rows", "renumbering"]

Kind = Literal["query", "key", "value"]

PROJECT = "project."
"""Prefix of the projections among the trainable tensors."""


@final
@dataclass(frozen=True, slots=True)
class Layers:
    """Which layers follow which, ``{student's: teacher's}``, counted from 1; 0 are the embeddings.

    Args:
        hidden: Pairs whose hidden states are compared, through a projection.
        relation: Pairs whose relations are compared; no embeddings.
        kinds: Of what; ``("value",)`` is MiniLM's relation, all three are MiniLMv2's.
        heads: Relation heads A; they divide both widths.
        hidden_weight: Factor of the hidden term, of each pair, against a label's loss.
        relation_weight: Factor of the relation term, of each pair and kind.

    Raises:
        LichenError: if no pair is named, or a number is out of range.
    """

    hidden: Mapping[int, int] = field(default_factory=dict)
    _: KW_ONLY
    relation: Mapping[int, int] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = ("value",)
    heads: int = 4
    hidden_weight: float = 1.0
    relation_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.hidden and not self.relation:
            raise LichenError("no pair of layers is named", where="layers", fix="for example relation: {2: 6}")
        if min([*self.hidden, *self.hidden.values()], default=0) < 0:
            raise LichenError("a layer is below 0", where="layers.hidden", fix="count from 1; 0 are the embeddings")
        if min([*self.relation, *self.relation.values()], default=1) < 1:
            raise LichenError("a layer is below 1", where="layers.relation", fix="count from 1")
        if not self.kinds or set(self.kinds) - {"query", "key", "value"}:
            raise LichenError(f"{self.kinds} are no kinds", where="layers.kinds", fix="use query, key or value")
        if self.heads < 1:
            raise LichenError(f"{self.heads} heads", where="layers.heads", fix="use a number above 0")
        for name in ("hidden_weight", "relation_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LichenError("is out of range", where=f"layers.{name}", fix="use a number >= 0")


@runtime_checkable
class Open(Protocol):
    """A student that shows its inner states: :class:`lichen.models.students.students.TwoLayerTransformer` is one."""

    name: str
    reference: bool
    classes: int | None

    def init(self, seed: int) -> Tree: ...
    def states(self, params: Tree, *inputs: Tensor) -> Tree:
        """``logits``, ``hidden.l`` from 0, ``query.l``, ``key.l`` and ``value.l`` from 1, (B, T, E) each."""
        ...

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor: ...
    @property
    def objective(self) -> Objective: ...


@final
class EncoderStates:
    """The inner states of a frozen encoder built like BERT, whose layers attend to their input as it is.

    Args:
        model: From :func:`lichen.models.loading.load.load_encoder`.

    Raises:
        LichenError: if it is not frozen, or built otherwise.
    """

    __slots__ = ("base", "model")

    def __init__(self, model: Any) -> None:
        frozen_eval(model)
        try:
            self_attention = model.encoder.layer[0].attention.self
            known = all(hasattr(self_attention, kind) for kind in ("query", "key", "value"))
        except (AttributeError, IndexError, TypeError):
            known = False
        if not known:
            raise LichenError(
                f"the inner states of a {type(model).__name__} cannot be seen",
                where="teacher",
                fix="use an encoder built like BERT, such as minilm-l6, or teach by answers alone",
            )
        self.model, self.base = model, base_digest(model)

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.model.encoder.layer)

    @property
    def width(self) -> int:
        """H."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, ids_NT: Tensor, mask_NT: Tensor, names: Collection[str]) -> Tree:
        """The states of these names, such as ``hidden.6`` or ``value.6``; ``(N, T, H)`` float32 each."""
        device = self.model.device
        hidden = self.model(
            input_ids=ids_NT.to(device), attention_mask=mask_NT.to(device), output_hidden_states=True
        ).hidden_states
        outputs: Tree = {}
        for name in names:
            kind, _, layer = name.partition(".")
            x_NTH = hidden[int(layer)]
            if kind != "hidden":
                # What layer l attends with is made from what the layer below gives.
                x_NTH = getattr(self.model.encoder.layer[int(layer) - 1].attention.self, kind)(hidden[int(layer) - 1])
            outputs[name] = x_NTH.float().to(ids_NT.device)
        return outputs


def _mean_B(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT.bool(), x_BT, 0.0).sum(-1) / mask_BT.sum(-1).clamp(min=1)


def hidden_rows(teacher_BTH: Tensor, student_BTE: Tensor, weight_HE: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean squared distance of the projected student's states to the teacher's, of each row; ``(B,)``."""
    return _mean_B((student_BTE @ weight_HE.mT - teacher_BTH).square().mean(-1), mask_BT)


def relation_rows(teacher_BTH: Tensor, student_BTE: Tensor, mask_BT: Tensor, *, heads: int) -> Tensor:
    """Divergence of the student's token relations from the teacher's, of each row; ``(B,)``.

    The mean over relation heads and attended tokens of KL(teacher ‖ student).

    Args:
        teacher_BTH: Queries, keys or values, all heads side by side.
        student_BTE: The same of the student.
        mask_BT: Attended tokens.
        heads: A.
    """

    def relations(x_BTE: Tensor) -> Tensor:
        x_BATD = torch.unflatten(x_BTE, -1, (heads, -1)).transpose(-2, -3)
        score_BATT = x_BATD @ x_BATD.mT / x_BATD.shape[-1] ** 0.5
        return torch.where(mask_BT[..., None, None, :].bool(), score_BATT, -1e9).log_softmax(-1)

    teacher_BATT, student_BATT = relations(teacher_BTH), relations(student_BTE)
    divergence_BAT = (teacher_BATT.exp() * (teacher_BATT - student_BATT)).sum(-1)
    return _mean_B(divergence_BAT.mean(-2), mask_BT)


def renumbering(words: Mapping[int, int], *, unknown: int, vocabulary: int) -> Tensor:
    """The student's token for each of the teacher's, int64 ``(V,)``.

    Args:
        words: The student's tokens by the teacher's.
        unknown: The student's token for all others.
        vocabulary: V.

    >>> renumbering({0: 0, 3: 1}, unknown=0, vocabulary=5).tolist()
    [0, 0, 0, 1, 0]
    """
    return torch.tensor([words.get(token, unknown) for token in range(vocabulary)], dtype=torch.int64)


@final
class Layerwise:
    """A student that also follows a teacher's layers; a :class:`lichen.core.contracts.model.CohortModel`.

    Its trainable tensors are the student's and ``project.<layer>.weight`` (H, E) for every hidden pair.

    Args:
        student: Trained.
        teacher: Frozen.
        layers: Which follow which.
        words_V: The student's token for each of the teacher's; None: they are the same.

    Raises:
        LichenError: if a layer does not exist, or the relation heads do not divide a width.
    """

    def __init__(self, student: Open, teacher: EncoderStates, layers: Layers, *, words_V: Tensor | None = None) -> None:
        self.inner, self.teacher, self.layers, self.words_V = student, teacher, layers, words_V
        self.name, self.base, self.reference = f"{student.name}+layers", teacher.base, student.reference
        self.classes, self.objective = student.classes, student.objective
        one_11 = torch.zeros(1, 1, dtype=torch.int64)
        shown = student.states(student.init(0), one_11, one_11)
        self._width = shown["hidden.0"].shape[-1]
        depth = max(int(name.partition(".")[2]) for name in shown if name.startswith("hidden."))
        pairs = [*layers.hidden.items(), *layers.relation.items()]
        if max(s for s, _ in pairs) > depth or max(t for _, t in pairs) > teacher.layers:
            raise LichenError(
                f"a pair names a layer past the student's {depth} or the teacher's {teacher.layers}", where="layers"
            )
        for width in (self._width, teacher.width):
            if layers.relation and width % layers.heads:
                raise LichenError(
                    f"{layers.heads} relation heads do not divide width {width}",
                    where="layers.heads",
                    fix=f"use a divisor of {math.gcd(self._width, teacher.width)}",
                )
        self._needed = {f"hidden.{t}" for t in layers.hidden.values()}
        self._needed |= {f"{kind}.{t}" for kind in layers.kinds for t in layers.relation.values()}
        self.group = group_of(self.name, self.init(0))

    def init(self, seed: int) -> Tree:
        """The student's start, and projections uniform in ±1/sqrt(E)."""
        return {**self.inner.init(seed), **self.projections(seed)}

    def projections(self, seed: int) -> Tree:
        """``project.<layer>.weight`` for every hidden pair."""
        return {
            f"{PROJECT}{s}.weight": (
                2 * torch.rand(self.teacher.width, self._width, generator=torch_generator(seed, "project", s)) - 1
            )
            / self._width**0.5
            for s in self.layers.hidden
        }

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: the student's own loss, and the layers' terms of every row that is no padding.

        A row without label and answer counts as one.

        Raises:
            LichenError: as the student does.
        """
        batch = to_device(batch, next(iter(trainable_C.values())).device)
        loss_C, count_C = map_clients(
            lambda part_C, part: self._losses(part_C, fixed, part), trainable_C, batch, reference=self.reference
        )
        return loss_C, count_C

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``, one row at a time."""
        return row_by_row(self.loss, trainable_C, fixed, batch)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK`` of rows in the teacher's tokens."""
        params_C = {name: x for name, x in trainable_C.items() if not name.startswith(PROJECT)}
        return self.inner.logits(params_C, fixed, {**batch, "input_ids_CBT": self._words(batch["input_ids_CBT"])})

    def _words(self, ids: Tensor) -> Tensor:
        return ids if self.words_V is None else self.words_V.to(ids.device)[ids]

    def _losses(self, params_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, ...]:
        ids_CBT, mask_CBT = batch["input_ids_CBT"], batch["attention_mask_CBT"]
        inputs = (self._words(ids_CBT), mask_CBT)
        if ids_CBT.shape[0] == 1:  # no vmap: its kernels would be others
            alone = self.inner.states({n: x[0] for n, x in params_C.items()}, *(x[0] for x in inputs))
            student = {name: x[None] for name, x in alone.items()}
        else:
            student = torch.func.vmap(self.inner.states)(params_C, *inputs)
        flat = self.teacher(ids_CBT.flatten(0, 1), mask_CBT.flatten(0, 1), sorted(self._needed))
        teacher = {name: torch.unflatten(x, 0, tuple(ids_CBT.shape[:2])) for name, x in flat.items()}
        terms_CB = torch.zeros((), device=ids_CBT.device)
        for s, t in self.layers.hidden.items():
            weight_C1HE = params_C[f"{PROJECT}{s}.weight"][:, None]
            rows_CB = hidden_rows(teacher[f"hidden.{t}"], student[f"hidden.{s}"], weight_C1HE, mask_CBT)
            terms_CB = terms_CB + self.layers.hidden_weight * rows_CB
        for s, t in self.layers.relation.items():
            for kind in self.layers.kinds:
                rows_CB = relation_rows(
                    teacher[f"{kind}.{t}"], student[f"{kind}.{s}"], mask_CBT, heads=self.layers.heads
                )
                terms_CB = terms_CB + self.layers.relation_weight * rows_CB
        labelled_CB, real_CB = _known(batch)
        loss_C, count_C = classify_losses_C(student["logits"], fixed, batch)
        unlabelled_C = (real_CB & ~labelled_CB).sum(1)
        return loss_C + torch.where(real_CB, terms_CB, 0.0).sum(1), count_C + unlabelled_C


def _known(batch: Batch) -> tuple[Tensor, Tensor]:
    """``(rows with a label or an answer, rows that are no padding)``, bool ``(C, B)``, active clients' alone."""
    names = {"labels_CB": 0, "answer_CB": 0, "index_CB": 0}
    found = {name: batch[name] >= least for name, least in names.items() if name in batch}
    none_CB = torch.zeros_like(batch["attention_mask_CBT"][..., 0], dtype=torch.bool)
    labelled_CB = found.get("labels_CB", none_CB) | found.get("answer_CB", none_CB)
    real_CB = labelled_CB | found.get("index_CB", none_CB)
    active_C1 = batch["active_C"][:, None]
    return labelled_CB & active_C1, real_CB & active_C1
