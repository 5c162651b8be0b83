"""Full fine-tuning of transformers models: one forward pass a client, with its own tensors.

The model is a function of its tensors (:mod:`lichen.models.whole`). Clients of a block go one after the other, so that
each one's numbers have the same bits in any company; what a block saves is nothing but the loop around it.

Losses are those of :class:`lichen.models.causal_cohort.CausalCohort` and
:class:`lichen.models.classifier_cohort.ClassifierCohort`.

Legend: C clients, B rows, T tokens, H width, K classes, R places with a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, split, to_device
from lichen.models.adapters.whole_layers import whole_layers
from lichen.models.client_axis import clients_of, one_client
from lichen.models.cohort import group_of
from lichen.models.ends import with_one_end
from lichen.models.objectives import Classification, LogitsLoss, NextToken, RowObjective
from lichen.models.tokens.token_losses import token_loss, token_losses
from lichen.models.tokens.token_targets import TokenPositions
from lichen.models.whole import Whole

__all__ = ["FullCausal", "FullClassifier"]


def _parts(trainable_C: Tree, clients: int) -> list[Tree]:
    """Each client's tensors, without copies; alone, without so much as a copy on the way back."""
    if clients == 1:
        return [{name: x.view(x.shape[1:]) for name, x in trainable_C.items()}]
    split = {name: x.unbind(0) for name, x in trainable_C.items()}
    return [{name: x[c] for name, x in split.items()} for c in range(clients)]


def _nothing(tensors: Tree) -> Tensor:
    """Zero, yet part of the graph, for a client with nothing to learn from."""
    return next(iter(tensors.values())).flatten()[:0].sum()


@final
class FullCausal:
    """A causal language model trained whole; a :class:`lichen.core.contracts.model.CohortModel`.

    Args:
        model: From :func:`lichen.models.loading.load.load_causal`, or any frozen causal model in evaluation mode.
        name: The model's name in groups and messages.
        exclude: As for :class:`lichen.models.whole.Whole`.
        base: Digest of what both ends must have alike; None: of the frozen tensors.
        chunk: Labelled places the output layer sees at once; more than that are computed twice, to save memory.

    Raises:
        LichenError: as :class:`lichen.models.whole.Whole`.
    """

    __slots__ = ("_backbone", "_chunk", "_head", "base", "classes", "group", "name", "objective", "reference", "whole")

    def __init__(
        self, model: Any, *, name: str, exclude: Sequence[str] = (), base: str | None = None, chunk: int = 1024
    ) -> None:
        self.whole = Whole(model, exclude)
        self.name, self.reference = name, True
        self.classes: int | None = None
        self.objective = NextToken()
        self.base = self.whole.base() if base is None else base
        self.group = group_of(name, self.whole.init())
        self._chunk = chunk
        paths = {id(layer): path for path, layer in model.named_modules()}
        self._backbone, self._head = paths[id(model.base_model)], paths.get(id(model.get_output_embeddings()), "")
        if not (self._backbone and self._head and self._is_plain()):
            self._head = ""

    def _is_plain(self) -> bool:
        """Whether logits are the output layer of the hidden states, with no cap or factor after it."""
        ids = torch.arange(4, device=self.whole.model.device)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with torch.no_grad():
            whole = self.whole.model(**inputs).logits
            hidden = self.whole.model.base_model(**inputs)[0]
            if hidden.shape[-1] != getattr(self.whole.model.get_output_embeddings(), "in_features", -1):
                return False
            short = self.whole.model.get_output_embeddings()(hidden)
        return bool(torch.allclose(whole, short, rtol=1e-3, atol=1e-3 * float(whole.abs().max())))

    def init(self, seed: int) -> Tree:
        """The model's own tensors: every client starts from them, whatever the seed."""
        return self.whole.init()

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: summed cross entropy over the labelled next tokens, and their number.

        Raises:
            LichenError: if the tensors are not this model's, or ``fixed`` holds a teacher's answers.
        """
        losses, counts = [], []
        self._refuse(fixed)
        for tensors, mine, next_BT, chosen_BT in self._labelled(trainable_C, fixed, batch):
            counts.append(chosen_BT.sum())
            if not int(counts[-1]):
                losses.append(_nothing(tensors))
                continue
            at = self._positions(tensors, mine, next_BT, chosen_BT)
            losses.append(token_loss(at.head, at.hidden_RH, at.label_R, chunk=self._chunk))
        return torch.stack(losses), torch.stack(counts)

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row; raises as :meth:`loss`."""
        losses, counts = [], []
        self._refuse(fixed)
        for tensors, mine, next_BT, chosen_BT in self._labelled(trainable_C, fixed, batch):
            count_B = chosen_BT.sum(1)
            counts.append(count_B)
            if not bool(count_B.any()):
                losses.append(_nothing(tensors).expand(count_B.shape))
                continue
            at = self._positions(tensors, mine, next_BT, chosen_BT)
            losses.append(token_losses(at.head, at.hidden_RH, at.label_R, count_B.tolist(), chunk=self._chunk))
        return torch.stack(losses), torch.stack(counts)

    @staticmethod
    def _refuse(fixed: Tree) -> None:
        if split(fixed, "answers.")[0]:
            raise LichenError("a language model cannot learn from class answers", where="job", fix="use a classifier")

    def _labelled(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Iterator[tuple[Tree, Batch, Tensor, Tensor]]:
        """For each client its tensors, its batch, the next tokens, and which of them have a label."""
        self.whole.check(trainable_C, fixed)
        for c, tensors in enumerate(_parts(trainable_C, clients_of(trainable_C, batch))):
            mine = to_device(one_client(batch, c), self.whole.model.device)
            next_BT = mine["labels_CBT"][0, :, 1:]
            yield tensors, mine, next_BT, (next_BT != -100) & mine["active_C"]

    def positions(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> list[TokenPositions]:
        """Each client's labelled places, from which the output layer makes as many logits at once as one asks for."""
        return [self._positions(*one) for one in self._labelled(trainable_C, fixed, batch)]

    def _positions(self, tensors: Tree, mine: Batch, next_BT: Tensor, chosen_BT: Tensor) -> TokenPositions:
        inputs: dict[str, Any] = {
            "input_ids": mine["input_ids_CBT"][0],
            "attention_mask": mine["attention_mask_CBT"][0],
            "use_cache": False,
        }
        if not self._head:
            out_BTV = self.whole.call(tensors, **inputs).logits
            return TokenPositions(out_BTV[:, :-1][chosen_BT], next_BT[chosen_BT], lambda logits: logits)
        hidden_BTH = self.whole.call(tensors, part=self._backbone, **inputs)[0]

        def head(hidden_RH: Tensor) -> Tensor:
            logits_RV: Tensor = self.whole.call(tensors, part=self._head, input=hidden_RH)
            return logits_RV

        return TokenPositions(hidden_BTH[:, :-1][chosen_BT], next_BT[chosen_BT], head)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """Never: a language model's logits are too large to hold.

        Raises:
            LichenError: always.
        """
        raise LichenError("a language model's logits are never held whole", where=self.name, fix="ask for its loss")


@final
class FullClassifier:
    """A sequence classifier trained whole; a :class:`lichen.core.contracts.model.CohortModel`.

    Args:
        model: From :func:`lichen.models.loading.classifier.load_classifier`.
        name: The model's name in groups and messages.
        exclude: As for :class:`lichen.models.whole.Whole`.
        base: Digest of what both ends must have alike; None: of the frozen tensors.
        objective: What its outputs are held against; None: they are logits of classes.

    Raises:
        LichenError: as :class:`lichen.models.whole.Whole`.
    """

    __slots__ = ("base", "classes", "group", "name", "objective", "reference", "whole")

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        exclude: Sequence[str] = (),
        base: str | None = None,
        objective: RowObjective | None = None,
    ) -> None:
        self.whole = Whole(model, exclude, heads=whole_layers(model, (), classifier=True))
        self.name, self.reference = name, True
        self.objective: RowObjective = objective or Classification(int(model.config.num_labels))
        self.classes = self.objective.classes
        self.base = self.whole.base() if base is None else base
        self.group = group_of(name, self.whole.init())

    def init(self, seed: int) -> Tree:
        """The model's own tensors: every client starts from them, whatever the seed."""
        return self.whole.init()

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: summed cross entropy over labelled rows and rows with a teacher's answer.

        Raises:
            LichenError: if the tensors are not this model's, a label lies outside the classes, or answers
                are named but not there.
        """
        none = torch.zeros(1, dtype=torch.int64)
        return self._against(self.objective.losses_C, none, trainable_C, fixed, batch)

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row; raises as :meth:`loss`."""
        none = torch.zeros(1, batch["input_ids_CBT"].shape[1], dtype=torch.int64)
        return self._against(self.objective.losses_CB, none, trainable_C, fixed, batch)

    def _against(
        self, objective: LogitsLoss, none: Tensor, trainable_C: Tree, fixed: Tree, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Clients one after the other; ``none`` is the count of one that is not active."""
        self.whole.check(trainable_C, fixed)
        losses, counts = [], []
        for c, tensors in enumerate(_parts(trainable_C, clients_of(trainable_C, batch))):
            mine = to_device(one_client(batch, c), self.whole.model.device)
            if bool(mine["active_C"]):
                loss, count = objective(self._logits(tensors, mine), fixed, mine)
            else:
                loss, count = _nothing(tensors).expand(none.shape), none.to(mine["active_C"].device)
            losses.append(loss)
            counts.append(count)
        return torch.cat(losses), torch.cat(counts)

    def _logits(self, tensors: Tree, mine: Batch) -> Tensor:
        ids_BT, mask_BT = mine["input_ids_CBT"][0], mine["attention_mask_CBT"][0]
        inputs = with_one_end(self.whole.model.config, input_ids=ids_BT, attention_mask=mask_BT)
        logits_BK: Tensor = self.whole.call(tensors, **inputs).logits
        return logits_BK[None]

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK``."""
        self.whole.check(trainable_C, fixed)
        parts = _parts(trainable_C, clients_of(trainable_C, batch))
        mine = [to_device(one_client(batch, c), self.whole.model.device) for c in range(len(parts))]
        return torch.cat([self._logits(tensors, one) for tensors, one in zip(parts, mine, strict=True)])
