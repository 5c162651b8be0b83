"""A cohort of sequence classifiers.

Legend: C clients, B rows, T tokens, H width, K classes, N packed tokens.
"""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.tree import Tree, split, to_device
from lichen.models.adapters.kind import Spec
from lichen.models.client_axis import map_clients
from lichen.models.cohort import Cohort, flat_inputs
from lichen.models.ends import with_one_end
from lichen.models.findings import Recall, anew
from lichen.models.objectives import Classification, RowObjective
from lichen.models.packed_cohort import call_with_hidden, hidden_of
from lichen.models.packing.packing import pack_rows

__all__ = ["ClassifierCohort"]


@final
class ClassifierCohort(Cohort):
    """A sequence classifier for C clients; a :class:`lichen.core.contracts.model.CohortModel`.

    Args:
        model: From :func:`lichen.models.loading.classifier.load_classifier`.
        adapter: What is trained; its ``heads`` usually name the classification head.
        name: The model's name in groups and messages.
        reference: One call a client (equal bits in any company) or all clients in one call; None:
            the first on a CPU, the second elsewhere.
        packed: Where clients share a call: without padding; None: if the model can.
        objective: What its outputs are held against; None: they are logits of classes.
        prove: Check at once that no client's rows touch another's.
        recall: Remembers what was found of the same model before.

    Raises:
        LichenError: if the adapter does not fit the model, the model mixes rows, or packing is asked
            for and it cannot be packed.
    """

    __slots__ = ("_rows",)

    def __init__(
        self,
        model: Any,
        *,
        adapter: Spec,
        name: str,
        reference: bool | None = None,
        packed: bool | None = None,
        objective: RowObjective | None = None,
        prove: bool = True,
        recall: Recall = anew,
    ) -> None:
        self._rows: RowObjective = objective or Classification(int(model.config.num_labels))
        super().__init__(model, adapter, name, objective=self._rows, reference=reference)
        self._admit(packed, prove=prove, recall=recall)

    def _is_plain(self) -> bool:
        return True  # its logits are asked for whole

    def _run(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool, of_rows: bool
    ) -> tuple[Tensor, Tensor]:
        patch, answers = split(fixed, "patch.")
        patch = {f"patch.{name}": x for name, x in patch.items()}

        def losses(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            logits_CBK = self._logits(part_C, patch, part, packed=packed and not reference)[0]
            objective = self._rows.losses_CB if of_rows else self._rows.losses_C
            return objective(logits_CBK, answers, to_device(part, logits_CBK.device))

        loss, count = map_clients(losses, trainable_C, batch, reference=reference)
        return loss, count

    def _logits(self, trainable_C: Tree, fixed: Tree, batch: Batch, *, packed: bool) -> tuple[Tensor, ...]:
        clients, rows = batch["attention_mask_CBT"].shape[:2]
        pack = pack_rows(batch, to_label=False, device=self.wrapped.model.device) if packed else None
        inputs: dict[str, Any] = {**flat_inputs(to_device(batch, self.wrapped.model.device))}
        if "input_ids" in inputs:
            inputs = with_one_end(self.wrapped.model.config, **inputs)
        with self._weighed(trainable_C, batch) as trainable_C:
            if pack is not None and pack.tokens:
                hidden_NH = hidden_of(self.wrapped, trainable_C, fixed, pack, part=self._backbone, prefix=self.prefix)
                logits = call_with_hidden(self.wrapped, trainable_C, fixed, hidden_NH, pack, **inputs).logits
            else:
                logits = self.wrapped.call(trainable_C, fixed, **inputs).logits
        return (logits.reshape(clients, rows, -1),)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK``."""
        packed = self.packed and not self.reference

        def logits(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            return self._logits(part_C, fixed, part, packed=packed)

        return map_clients(logits, trainable_C, batch, reference=self.reference)[0]
