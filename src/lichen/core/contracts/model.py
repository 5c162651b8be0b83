"""What is trained: batches, models that run C clients at once, and what their outputs are held against.

Legend: C clients, B rows of a batch, T tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from lichen.core.expected import MetricSpec
from lichen.core.tree import Tree

__all__ = ["Batch", "CohortModel", "Objective"]

Batch = Mapping[str, Tensor]
"""One step of C clients, on the host: whoever computes moves what it needs. Every tensor has a leading client axis.

==================  =======================================================================
``active_C``        bool, False where this client has no such step (always present)
``input_ids_CBT``   int64 tokens, with ``attention_mask_CBT`` int64
``labels_CBT``      int64, language modelling: -100 where no loss is taken; position t holds
                    the label OF token t (models shift inside, as transformers does)
``labels_CB``       int64 class, -100 where the row has none (padding rows, unlabelled rows); or float32
                    numbers ``(C, B, ...)``, not-a-number where the row has none
``x_CBF`` (any)     float32 features or pixels of rows without tokens, ``(C, B, ...)``
``answer_CB``       int64 row of the shared ``answers.*`` tensors, -1 where the row has none
``index_CB``        int64 position of the row in the client's shard, -1 for padding rows
``good_CB``         int64 1 where a row's answer is good, 0 where it is bad, -100 for padding rows
``second_ids_CBT``  int64 another answer to each row's prompt, with ``second_mask_CBT`` and ``second_labels_CBT``
``reference_CB``    float32 log-probability of each row by the model before unlearning
``reference_CB2``   float32 log-probabilities of both answers by the model that training begins from
``ends_step_C``     bool, whether a client's step ends with this micro-batch; from a source whose steps have
                    rows in unequal numbers (:class:`lichen.data.batches.poisson_rows.PoissonRows`) alone
==================  =======================================================================
"""


class Objective(Protocol):
    """What a model's outputs are held against when it is scored; see :mod:`lichen.models.objectives`."""

    @property
    def classes(self) -> int | None:
        """Number of classes among which rows are told; None where there are none."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """A client's sums by name; ``loss_sum`` and ``count``, both single numbers, are among them."""
        ...

    def specs(self) -> Mapping[str, MetricSpec]:
        """What those sums can be, by the same names; :func:`lichen.core.expected.sums_of` where little is known."""
        ...

    def sums(self, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """Those sums over one batch, ``(C, ...)``; rows without a label count for nothing."""
        ...

    def made_up(self, ids_CBT: Tensor, mask_CBT: Tensor) -> Tree:
        """The labels that made-up rows of tokens might have, as a batch names them."""
        ...


class CohortModel(Protocol):
    """A model that runs C clients at once: frozen parts held once, trainable parts with a client axis."""

    name: str
    base: str
    """Digest of the frozen parts; empty where there are none."""
    group: str
    """What must be equal for two clients' messages to stack."""
    classes: int | None
    """Number of classes among which rows are told; None where there are none."""
    reference: bool
    """Every client's numbers have the same bits in any company."""

    @property
    def objective(self) -> Objective:
        """What it is scored by."""
        ...

    def init(self, seed: int) -> Tree:
        """Trainable tensors without client axis, as every client starts from them."""
        ...

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: the SUM of losses over each client's labelled tokens or rows, and their number.

        ``trainable_C`` is stacked; ``fixed`` (``patch.*``, ``answers.*``) has no client axis. Client
        c's loss depends on nothing but row c of everything.
        """
        ...

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row, 0 where it has no label; for what needs each row's gradient.

        Summed over rows they are :meth:`loss` but for rounding: where both see logits of the same bits and add n
        terms that are not negative, they lie within ``2 n u`` of one another, relatively; u is the unit roundoff of
        the losses, 2^-24 in float32.

        Raises:
            LichenError: if the loss is no sum over rows.
        """
        ...

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK`` of a classifier.

        Raises:
            LichenError: for a language model, whose logits are never held whole.
        """
        ...
