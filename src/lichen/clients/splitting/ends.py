"""What a client of a split model holds: the first blocks with the embeddings, and the last with the head.

Where a client has little memory the middle lies at the server, which sees hidden states and their gradients, no token
and no label (a U-shape, Vepakomma et al. 2018). A client makes its few first blocks' hidden states again on the way
back: no graph is alive while it waits, nor beside the logits of the last blocks.

Legend: C clients, B rows, T tokens, H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.tree import Tree

__all__ = ["Cut", "Ends", "Piece", "entering"]


@final
@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """Where a model is cut: blocks at the client before the first cut, and after the second.

    >>> Cut(2, 1)
    Cut(first=2, last=1)
    """

    first: int
    last: int


class Piece(Protocol):
    """A piece of a model that gives hidden states, such as :class:`lichen.models.pieces.piece_cohort.PieceCohort`."""

    def init(self, seed: int) -> Tree:
        """Its trainable tensors, by the whole model's names."""
        ...

    def hidden(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``(C, B, T, H)``: what it makes of its rows."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LastPass:
    """What a client learns of a batch above the second cut.

    Attributes:
        loss_C: Summed over labels.
        count_C: Labels.
        grads_C: Of the mean loss, for the last blocks' tensors.
        gradient_CBTH: Of the mean loss, for what came in.
    """

    loss_C: Tensor
    count_C: Tensor
    grads_C: Tree
    gradient_CBTH: Tensor


@final
@dataclass(frozen=True, slots=True)
class Ends:
    """The two ends of a model, as functions of a client's tensors.

    Args:
        first: Gives hidden states at the first cut.
        last: Takes those at the second cut in the place of tokens; a cohort of the recipe's task.
        middle_names: What is trained between them.
        first_names: What is trained of the first piece.
        last_names: What is trained of the last.
    """

    first: Piece
    last: CohortModel
    middle_names: frozenset[str]
    first_names: frozenset[str]
    last_names: frozenset[str]

    @classmethod
    def around(cls, middle: Piece, first: Piece, last: CohortModel) -> Ends:
        """The ends around a middle."""
        return cls(first, last, *(frozenset(piece.init(0)) for piece in (middle, first, last)))

    def hidden(self, params_C: Tree, batch: Batch) -> Tensor:
        """``(C, B, T, H)`` at the first cut."""
        with torch.enable_grad():  # the kernels of the way back
            return self.first.hidden(self._first(params_C), {}, batch).detach()

    def lower(self, leaves_C: Tree, frozen_C: Tree, batch: Batch, gradient_CBTH: Tensor) -> Tree:
        """Gradients of the first blocks' tensors, by the gradient of what they give."""
        mine = {name: x for name, x in leaves_C.items() if name in self.first_names}
        if not mine:
            return {}
        mine_C = {name: x.detach().requires_grad_() for name, x in mine.items()}
        with torch.enable_grad():
            hidden_CBTH = self.first.hidden(self._first({**frozen_C, **mine_C}), {}, batch)
            grads = torch.autograd.grad(
                hidden_CBTH, list(mine_C.values()), gradient_CBTH, allow_unused=True, materialize_grads=True
            )
        return dict(zip(mine_C, grads, strict=True))

    def upper(self, leaves_C: Tree, frozen_C: Tree, batch: Batch, hidden_CBTH: Tensor) -> LastPass:
        """Loss and gradients above the second cut."""
        mine = {name: x.detach().requires_grad_() for name, x in leaves_C.items() if name in self.last_names}
        hidden_CBTH = hidden_CBTH.detach().requires_grad_()
        with torch.enable_grad():
            loss_C, count_C = self.last.loss(self._last({**frozen_C, **mine}), {}, entering(batch, hidden_CBTH))
            mean_C = loss_C / count_C.clamp(min=1)
            *grads, gradient = torch.autograd.grad(
                mean_C.sum(), [*mine.values(), hidden_CBTH], allow_unused=True, materialize_grads=True
            )
        return LastPass(
            loss_C=loss_C.detach(),
            count_C=count_C,
            grads_C=dict(zip(mine, grads, strict=True)),
            gradient_CBTH=gradient,
        )

    def skipping(self, params_C: Tree, batch: Batch, hidden_CBTH: Tensor) -> Tensor:
        """The gradient at the first cut of a head of the client's own: the last blocks, right above the first."""
        hidden_CBTH = hidden_CBTH.detach().requires_grad_()
        with torch.enable_grad():
            loss_C, count_C = self.last.loss(self._last(params_C), {}, entering(batch, hidden_CBTH))
            (gradient,) = torch.autograd.grad((loss_C / count_C.clamp(min=1)).sum(), [hidden_CBTH])
        return gradient

    def last_params(self, params_C: Tree) -> Tree:
        """Of a client's tensors those of the last blocks and the head."""
        return self._last(params_C)

    def _first(self, params_C: Tree) -> Tree:
        return {name: params_C[name] for name in self.first_names}

    def _last(self, params_C: Tree) -> Tree:
        return {name: params_C[name] for name in self.last_names}


def entering(batch: Batch, hidden_CBTH: Tensor) -> Mapping[str, Tensor]:
    """The batch with hidden states in the place of tokens."""
    return {**{name: x for name, x in batch.items() if name != "input_ids_CBT"}, "hidden_CBTH": hidden_CBTH}
