"""Scores a large language model that a small tuned one steers: proxy tuning.

Somebody tuned a small model s, and has a large one, l, of the same vocabulary whose weights nobody touches. The next
token is drawn by the logits::

    z = l + (s_tuned - s_untuned)

:class:`ProxiedLM` takes the cross entropy of z at the labelled places, and beside it that of l by itself. The three
models' logits are made some places at a time and never held whole. Models may have more output rows than the tokenizer
has tokens, and not equally many: z is over the first rows, which all three have.

References:
    Alisa Liu, Xiaochuang Han, Yizhong Wang, Yulia Tsvetkov, Yejin Choi and Noah A. Smith. "Tuning Language Models by
    Proxy." COLM 2024. https://arxiv.org/abs/2401.08565

Legend: C clients, B rows, T tokens, R and r places with a label, H width, V tokens of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, LOSS, MetricSpec
from lichen.core.tree import Tree, to_device
from lichen.core.wire.shared import Shared
from lichen.models.client_axis import one_client, row_by_row
from lichen.models.loading.load import frozen_eval
from lichen.models.tokens.token_targets import LogitsProvider, TokenPositions

__all__ = ["BIG_LOSS", "FrozenLM", "ProxiedLM", "combined"]

BIG_LOSS = "big_loss_sum"
"""The metric that holds the large model's own loss."""

LOGITS_BYTES = 1 << 25
"""Of one chunk of one model's logits on a CPU, eight times as many on an accelerator."""


def combined(big_RV: Tensor, tuned_RV: Tensor, untuned_RV: Tensor) -> Tensor:
    """``(R, V)``: the large model's logits, moved as far as the small one was by its tuning; V is the fewest of three.

    >>> combined(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[2.5, 0.0]]))
    tensor([[1.5000, 2.0000]])
    """
    size = min(x.shape[-1] for x in (big_RV, tuned_RV, untuned_RV))
    big_RV, tuned_RV, untuned_RV = (_wide(x[..., :size]) for x in (big_RV, tuned_RV, untuned_RV))
    return big_RV + (tuned_RV - untuned_RV)


def _wide(x: Tensor) -> Tensor:
    """At least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@final
class FrozenLM:
    """A causal language model as it was loaded, asked for its labelled places.

    Args:
        model: From :func:`lichen.models.loading.load.load_causal`.

    Raises:
        LichenError: if it is not frozen.
    """

    __slots__ = ("_plain", "model")

    def __init__(self, model: Any) -> None:
        frozen_eval(model)
        self.model = model
        self._plain = self._is_plain()

    @property
    def rows(self) -> int:
        """V, the rows of its output layer."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def _is_plain(self) -> bool:
        """Whether logits are the output layer of the hidden states, with no cap or factor after it."""
        ids = torch.arange(4, device=self.model.device)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        head = self.model.get_output_embeddings()
        with torch.no_grad():
            whole = self.model(**inputs).logits
            hidden = self.model.base_model(**inputs)[0]
            if hidden.shape[-1] != getattr(head, "in_features", -1):
                return False
            short = head(hidden)
        return bool(torch.allclose(whole, short, rtol=1e-3, atol=1e-3 * float(whole.abs().max())))

    @torch.no_grad()
    def positions(self, batch: Batch, client: int) -> TokenPositions:
        """The labelled places of one client; of one that is not active, none."""
        mine = to_device(one_client(batch, client), self.model.device)
        next_BT = mine["labels_CBT"][0, :, 1:]
        chosen_BT = (next_BT != -100) & mine["active_C"]
        ids_BT, mask_BT = mine["input_ids_CBT"][0], mine["attention_mask_CBT"][0]
        inputs: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
        if not self._plain:
            logits_BTV = self.model(**inputs).logits
            return TokenPositions(logits_BTV[:, :-1][chosen_BT], next_BT[chosen_BT], lambda logits: logits)
        hidden_BTH = self.model.base_model(**inputs)[0]
        return TokenPositions(
            hidden_BTH[:, :-1][chosen_BT], next_BT[chosen_BT], lambda x: self.model.get_output_embeddings()(x)
        )


@final
@dataclass(frozen=True, slots=True)
class WithBigLoss:
    """The loss of the combined logits, and that of the large model by itself on the same tokens."""

    @property
    def classes(self) -> int | None:
        """None: tokens are no classes."""
        return None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Both losses, and the number of labelled tokens."""
        return {"loss_sum": (), "count": (), BIG_LOSS: ()}

    def specs(self) -> Mapping[str, MetricSpec]:
        """A cross entropy is not negative."""
        return {"loss_sum": LOSS, "count": COUNT, BIG_LOSS: LOSS}

    def sums(self, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """Those sums over one batch; of a :class:`ProxiedLM` alone."""
        assert isinstance(model, ProxiedLM)
        return model.sums(params_C, fixed, batch)

    def made_up(self, ids_CBT: Tensor, mask_CBT: Tensor) -> Tree:
        """Labels of made-up rows: their own tokens."""
        return {"labels_CBT": torch.where(mask_CBT == 1, ids_CBT, -100)}


@final
class ProxiedLM:
    """A large model steered by a cohort's; a :class:`lichen.core.contracts.model.CohortModel` that is only scored.

    Args:
        inner: The small model, whose tensors a job brings.
        untuned: The small model's tensors before it was tuned.
        big: The large model.
    """

    __slots__ = ("base", "big", "classes", "group", "inner", "name", "objective", "reference", "untuned")

    def __init__(self, inner: LogitsProvider, *, untuned: Shared, big: FrozenLM) -> None:
        self.inner, self.untuned, self.big = inner, untuned, big
        self.name, self.base, self.group = inner.name, inner.base, inner.group
        self.classes: int | None = None
        self.objective = WithBigLoss()
        self.reference = inner.reference

    def init(self, seed: int) -> Tree:
        """As the small model."""
        return self.inner.init(seed)

    @torch.no_grad()
    def sums(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """``(C,)`` each: ``loss_sum`` of the combined logits, ``big_loss_sum`` of the large model's, and ``count``.

        Args:
            trainable_C: The tuned small model's tensors.
            fixed: Its tensors without client axis.
            batch: Rows.
        """
        clients = len(batch["active_C"])
        tuned_C = self.inner.positions(trainable_C, fixed, batch)
        before_C = trees.expand(self.untuned.trainable, clients)
        untuned_C = self.inner.positions(before_C, self.untuned.fixed, batch)
        losses = [
            self._losses(tuned, untuned, self.big.positions(batch, client))
            for client, (tuned, untuned) in enumerate(zip(tuned_C, untuned_C, strict=True))
        ]
        loss_C, big_C = (torch.stack(column) for column in zip(*losses, strict=True))
        count_C = torch.tensor([one.label_R.shape[0] for one in tuned_C], device=loss_C.device)
        return {"loss_sum": loss_C, BIG_LOSS: big_C, "count": count_C}

    def _losses(self, tuned: TokenPositions, untuned: TokenPositions, big: TokenPositions) -> tuple[Tensor, Tensor]:
        """Summed cross entropy of the combined logits, and of the large model's, at the same places."""
        total, alone = (_wide(tuned.hidden_RH[:0]).sum() for _ in range(2))
        budget = LOGITS_BYTES * (8 if big.hidden_RH.is_cuda else 1)
        chunk = max(1, budget // (4 * self.big.rows))
        for at in range(0, big.label_R.shape[0], chunk):
            part, label_r = slice(at, at + chunk), big.label_R[at : at + chunk]
            tuned_rV, untuned_rV, big_rV = (one.head(one.hidden_RH[part]) for one in (tuned, untuned, big))
            z_rV = combined(big_rV, tuned_rV, untuned_rV)
            total = total + nn.functional.cross_entropy(z_rV, label_r, reduction="sum")
            alone = alone + nn.functional.cross_entropy(_wide(big_rV), label_r, reduction="sum")
        return total, alone

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)`` of the combined logits; no gradient is taken."""
        sums = self.sums(trainable_C, fixed, batch)
        return sums["loss_sum"], sums["count"]

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``, one row at a time."""
        return row_by_row(self.loss, trainable_C, fixed, batch)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """Never: a language model's logits are too large to hold.

        Raises:
            LichenError: always.
        """
        raise LichenError("a language model's logits are never held whole", where=self.name, fix="ask for its loss")
