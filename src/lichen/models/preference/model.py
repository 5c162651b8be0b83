"""A language model that learns preferences: a model of cohorts around another, whose rows it scores two by two.

Both answers of a row go through the model in one call, so that padded, packed and stacked clients are run as for any
loss of its tokens. All else is done on one client's numbers at a time, so that its bits are the same in any company.

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.causal_cohort import CausalCohort
from lichen.models.full import FullCausal
from lichen.models.preference.losses import PreferenceLoss, ScoredRows
from lichen.models.preference.objective import Preferences, loss_of_rows

__all__ = ["PreferenceModel", "row_logprobs"]


def row_logprobs(
    model: CohortModel, trainable_C: Tree, fixed: Tree, batch: Batch, *, first: bool = True, second: bool = True
) -> tuple[Tensor, Tensor]:
    """``(row_logprobs_CB, count_CB)``: each answer's summed log-probability, and its tokens.

    Args:
        model: A language model of cohorts, whose losses are of tokens.
        trainable_C: Stacked parameters.
        fixed: Shared tensors without client axis.
        batch: With the second answers.
        first: The rows' own answers are among them.
        second: Their second ones are, below the first.
    """
    parts = [name for name, there in (("", first), ("second", second)) if there]
    names = {"": ("input_ids_CBT", "attention_mask_CBT", "labels_CBT")}
    names["second"] = ("second_ids_CBT", "second_mask_CBT", "second_labels_CBT")
    joined = {target: torch.cat([batch[names[part][at]] for part in parts], 1) for at, target in enumerate(names[""])}
    index_CB = torch.cat([batch["index_CB"]] * len(parts), 1)
    loss_CB, count_CB = model.losses(
        trainable_C, fixed, {"active_C": batch["active_C"], "index_CB": index_CB, **joined}
    )
    return -loss_CB, count_CB


@final
class PreferenceModel:
    """A :class:`lichen.core.contracts.model.CohortModel` whose loss is one of preferences.

    Args:
        model: A language model.
        loss: The loss.
        rated: Rows are rated one by one, and no pairs.
    """

    __slots__ = ("base", "classes", "group", "inner", "kind", "name", "objective", "reference")

    def __init__(self, model: CausalCohort | FullCausal, loss: PreferenceLoss, *, rated: bool) -> None:
        self.inner, self.kind = model, loss
        self.name, self.base, self.group = model.name, model.base, model.group
        self.classes: int | None = None
        self.reference, self.objective = model.reference, Preferences(loss, rated)

    def checkpointed(self) -> PreferenceModel:
        """The same around a model that computes its layers again on the way back, where that can."""
        if isinstance(self.inner, FullCausal):
            return self
        return PreferenceModel(self.inner.checkpointed(), self.kind, rated=self.objective.rated)

    def init(self, seed: int) -> Tree:
        """The model's."""
        return self.inner.init(seed)

    def scored(self, trainable_C: Tree, fixed: Tree, batch: Batch, *, learns: bool) -> list[ScoredRows]:
        """Each client's rows; second answers have no gradient where the loss asks for none.

        Raises:
            LichenError: if nobody has scored the rows by the reference.
        """
        if "reference_CB2" not in batch:
            raise LichenError("rows came without the reference's scores", where="batch", fix="score them first")
        there = "second_ids_CBT" in batch
        both = there and (not learns or self.kind.second_learns)
        both_CB, tokens_CB = row_logprobs(self.inner, trainable_C, fixed, batch, second=both)
        rows = batch["index_CB"].shape[1]
        first_CB, tokens = both_CB[:, :rows], tokens_CB[:, :rows]
        if both:
            second_CB, second_tokens = both_CB[:, rows:], tokens_CB[:, rows:]
        elif there and self.kind.kind == "kto":
            with torch.no_grad():
                second_CB, second_tokens = row_logprobs(self.inner, trainable_C, fixed, batch, first=False)
        else:
            second_CB, second_tokens = torch.zeros_like(first_CB.detach()), torch.zeros_like(tokens)
        good_CB = (batch["good_CB"] == 1).to(first_CB.device)
        # What is computed of a slice begins at a cache line, as it would of a client alone.
        columns = (first_CB, tokens, second_CB, second_tokens, batch["reference_CB2"].to(first_CB), good_CB)
        each = zip(*(torch.unbind(x) for x in columns), strict=True)
        return [ScoredRows(*(x.clone() for x in one)) for one in each]

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: summed over rows that say something, and their number; raises as :meth:`scored`."""
        each = self.scored(trainable_C, fixed, batch, learns=True)
        real_CB = ((batch["index_CB"] >= 0) & batch["active_C"][:, None]).to(each[0].first_R.device)
        pairs = [loss_of_rows(self.kind, rows, real_R) for rows, real_R in zip(each, real_CB, strict=True)]
        return torch.stack([loss for loss, _ in pairs]), torch.stack([count for _, count in pairs])

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row.

        Raises:
            LichenError: as :meth:`scored`; and for a loss that depends on the other rows of its batch.
        """
        if self.kind.kind == "kto":
            raise LichenError("a loss of whole batches is no sum over rows", where="prefer.kind", fix="use dpo")
        each = self.scored(trainable_C, fixed, batch, learns=True)
        real_CB = ((batch["index_CB"] >= 0) & batch["active_C"][:, None]).to(each[0].first_R.device)
        counted = [self.kind.counted_R(rows) & real_R for rows, real_R in zip(each, real_CB, strict=True)]
        losses = [self.kind.losses_R(rows) for rows in each]
        rows = [torch.where(on, x, torch.zeros_like(x)) for on, x in zip(counted, losses, strict=True)]
        return torch.stack(rows), torch.stack(counted).long()

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """Never: as the model's.

        Raises:
            LichenError: always.
        """
        return self.inner.logits(trainable_C, fixed, batch)
