"""A cohort of language models.

Logits are never held whole: the output layer sees the positions whose next token has a label, and nothing else.

Legend: C clients, B rows, T tokens, H width, R positions with a label, N packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, split, to_device
from lichen.models.adapters.kind import Spec
from lichen.models.client_axis import clients_of, map_clients, one_client
from lichen.models.cohort import Cohort, flat_inputs
from lichen.models.findings import Recall, anew
from lichen.models.loading.span import entered
from lichen.models.objectives import NextToken
from lichen.models.packed_cohort import hidden_of
from lichen.models.packing.packing import pack_rows
from lichen.models.tokens.token_losses import linear_loss_C, token_loss, token_losses
from lichen.models.tokens.token_targets import TokenPositions

__all__ = ["CausalCohort"]


@final
class CausalCohort(Cohort):
    """A causal language model for C clients; a :class:`lichen.core.contracts.model.CohortModel`.

    Args:
        model: From :func:`lichen.models.loading.load.load_causal`.
        adapter: What is trained.
        name: The model's name in groups and messages.
        reference: One call a client (equal bits in any company) or all clients in one call; None:
            the first on a CPU, the second elsewhere.
        packed: Where clients share a call: without padding; None: if the model can.
        chunk: Labelled positions the output layer sees at once.
        prove: Check at once that no client's rows touch another's.
        recall: Remembers what was found of the same model before.

    Raises:
        LichenError: if the adapter does not fit the model, the model mixes rows, or packing is asked
            for and it cannot be packed.
    """

    __slots__ = ("_chunk", "_head")

    def __init__(
        self,
        model: Any,
        *,
        adapter: Spec,
        name: str,
        reference: bool | None = None,
        packed: bool | None = None,
        chunk: int = 1024,
        prove: bool = True,
        recall: Recall = anew,
    ) -> None:
        super().__init__(model, adapter, name, objective=NextToken(), reference=reference)
        self._chunk = chunk
        names = {id(layer): path for path, layer in self.wrapped.model.named_modules()}
        self._head = names[id(self.wrapped.model.get_output_embeddings())]
        self._admit(packed, prove=prove, recall=recall)

    def _is_plain(self) -> bool:
        """Whether logits are the output layer of the hidden states, with no cap or factor after it."""
        start_C = {name: x[None] for name, x in self.wrapped.init(0).items()}
        ids_CBT = torch.arange(4, device=self.wrapped.model.device)[None, None]
        tokens = {"input_ids_CBT": ids_CBT, "attention_mask_CBT": torch.ones_like(ids_CBT)}
        inputs: dict[str, Any] = {**flat_inputs(entered(self.wrapped.model, tokens)), "use_cache": False}
        with torch.no_grad():
            whole = self.wrapped.call(start_C, {}, **inputs).logits
            hidden = self.wrapped.call(start_C, {}, part=self._backbone, **inputs)[0]
            short = self.wrapped.call(start_C, {}, part=self._head, **{self._input(): hidden})
        return bool(torch.allclose(whole, short, rtol=1e-3, atol=1e-3 * float(whole.abs().max())))

    def _input(self) -> str:
        return "x" if self._head in (*self.wrapped.heads, *self.wrapped.layers) else "input"

    def _run(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool, of_rows: bool
    ) -> tuple[Tensor, Tensor]:
        if split(fixed, "answers.")[0]:
            raise LichenError("a language model cannot learn from class answers", where="job", fix="use a classifier")

        if packed and not reference:
            return self._packed(trainable_C, fixed, batch, of_rows=of_rows)
        batch = to_device(batch, self.wrapped.model.device)

        def losses(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            return self._padded(part_C, fixed, part, of_rows=of_rows)

        loss, count = map_clients(losses, trainable_C, batch, reference=reference)
        return loss, count

    def positions(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> list[TokenPositions]:
        """Each client's labelled places, from which the output layer makes as many logits at once as one asks for."""
        batch = to_device(batch, self.wrapped.model.device)
        clients = clients_of(trainable_C, batch)
        if not self.reference:
            return self._positions(trainable_C, fixed, batch)
        parts = {name: torch.split(x, 1) for name, x in trainable_C.items()}
        alone = [({name: part[c] for name, part in parts.items()}, one_client(batch, c)) for c in range(clients)]
        return [self._positions(mine, fixed, one)[0] for mine, one in alone]

    def _padded(self, trainable_C: Tree, fixed: Tree, batch: Batch, *, of_rows: bool) -> tuple[Tensor, ...]:
        positions = self._positions(trainable_C, fixed, batch)
        if of_rows:
            count_CB = ((batch["labels_CBT"][:, :, 1:] != -100) & batch["active_C"][:, None, None]).sum(-1)
            rows = [
                token_losses(one.head, one.hidden_RH, one.label_R, counts, chunk=self._chunk)
                for one, counts in zip(positions, count_CB.tolist(), strict=True)
            ]
            return torch.stack(rows), count_CB
        losses = [token_loss(one.head, one.hidden_RH, one.label_R, chunk=self._chunk) for one in positions]
        counts = torch.tensor([one.label_R.shape[0] for one in positions], device=batch["labels_CBT"].device)
        return torch.stack(losses), counts

    def _positions(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> list[TokenPositions]:
        clients, rows, width = batch["attention_mask_CBT"].shape
        next_CBT = batch["labels_CBT"][:, :, 1:]
        inputs: dict[str, Any] = {**flat_inputs(batch), "use_cache": False}
        with self._weighed(trainable_C, batch) as trainable_C:
            if self.plain:
                out = self.wrapped.call(trainable_C, fixed, part=self._backbone, **inputs)[0]
            else:
                out = self.wrapped.call(trainable_C, fixed, **inputs).logits
        out_CBTH = out.reshape(clients, rows, width, -1)[:, :, :-1]
        positions = []
        for c in range(clients):
            chosen = (next_CBT[c] != -100) & batch["active_C"][c]
            head = self._head_of(trainable_C, fixed, c) if self.plain else lambda logits: logits
            positions.append(TokenPositions(out_CBTH[c][chosen], next_CBT[c][chosen], head))
        return positions

    def _packed(self, trainable_C: Tree, fixed: Tree, batch: Batch, *, of_rows: bool) -> tuple[Tensor, Tensor]:
        if not self.plain:
            raise LichenError("logits are changed after the output layer", where=self.name, fix="use padded rows")
        pack = pack_rows(batch, to_label=True, device=self.wrapped.model.device)
        clients, counts = len(pack.labels), list(pack.labels)
        count_C = torch.tensor(pack.row_labels if of_rows else pack.labels).to(self.wrapped.model.device)
        count = count_C.view(clients, -1) if of_rows else count_C
        if not pack.tokens:
            nothing_C = torch.zeros(clients, device=count_C.device)
            loss_C = sum((x_C.flatten(1)[:, :0].sum(1) for x_C in trainable_C.values()), nothing_C)
            return loss_C[:, None].expand_as(count) if of_rows else loss_C, count
        with self._weighed(trainable_C, batch) as trainable_C:
            hidden_NH = hidden_of(self.wrapped, trainable_C, fixed, pack, part=self._backbone, prefix=self.prefix)
        hidden_RH = hidden_NH.index_select(0, pack.at_R)
        if self._head in (*self.wrapped.heads, *self.wrapped.layers):
            parts = zip(torch.split(hidden_RH, counts), torch.split(pack.label_R, counts), strict=True)
            losses = []
            for c, (hidden, label) in enumerate(parts):
                mine = self._head_of(trainable_C, fixed, c)
                if of_rows:
                    losses.append(token_losses(mine, hidden, label, count[c].tolist(), chunk=self._chunk))
                else:
                    losses.append(token_loss(mine, hidden, label, chunk=self._chunk))
            return torch.stack(losses), count
        head, each = self.wrapped.model.get_output_embeddings(), pack.row_labels if of_rows else pack.labels
        loss = linear_loss_C(hidden_RH, head.weight, getattr(head, "bias", None), pack.label_R, each)
        return loss.view_as(count), count

    def _head_of(self, trainable_C: Tree, fixed: Tree, client: int) -> Callable[[Tensor], Tensor]:
        """The output layer of one client, for its own rows."""
        mine = {name: x[client : client + 1] for name, x in trainable_C.items()}

        def head(hidden_RH: Tensor) -> Tensor:
            logits_RV: Tensor = self.wrapped.call(mine, fixed, part=self._head, **{self._input(): hidden_RH})
            return logits_RV

        return head

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """Never: a language model's logits are too large to hold.

        Raises:
            LichenError: always.
        """
        raise LichenError("a language model's logits are never held whole", where=self.name, fix="ask for its loss")
