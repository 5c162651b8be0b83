"""What crosses a cut: the hidden states of a batch's tokens, row after row without padding, and the rows' lengths.

Masks, positions and rotary tables are made anew on each side from the lengths alone. Both sides make batches of one
width of them, which is that of the whole model's own call, so that what is computed has the same bits.

Legend: C = 1, B rows, T tokens of a padded row, N tokens of all rows, H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["Rows", "narrow"]

MULTIPLE = 8
"""Widths are rounded up to this, as in :func:`lichen.models.client_axis.one_client`."""


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Where the tokens of one client's batch lie.

    Attributes:
        length_B: Tokens of each row, int32; 0 for padding rows.
        width: T of the padded batch.
    """

    length_B: Tensor
    width: int

    @classmethod
    def of(cls, length_B: Tensor, most: int) -> Rows:
        """Rows of these lengths, in a batch that is ``most`` tokens wide at most."""
        longest = max(int(length_B.max()) if length_B.numel() else 0, 1)
        return cls(length_B.cpu(), min(-(-longest // MULTIPLE) * MULTIPLE, most))

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.length_B.sum())

    @property
    def _real_BT(self) -> Tensor:
        return torch.arange(self.width) < self.length_B[:, None]

    def flat(self, hidden_CBTH: Tensor) -> Tensor:
        """``(1, N, H)``: the hidden states of real tokens, or their gradients."""
        return hidden_CBTH[0][self._real_BT.to(hidden_CBTH.device)][None]

    def padded(self, flat_CNH: Tensor) -> Tensor:
        """``(1, B, T, H)``: undo :meth:`flat`, with zeros where there is no token.

        Raises:
            LichenError: for another number of tokens.
        """
        if flat_CNH.shape[:2] != (1, self.tokens):
            what = f"{flat_CNH.shape[1]} tokens came for rows of {self.tokens}"
            raise LichenError(what, where="split", fix="send as many as the lengths say", reason="shape")
        out_BTH = flat_CNH.new_zeros(len(self.length_B), self.width, flat_CNH.shape[2])
        out_BTH[self._real_BT.to(flat_CNH.device)] = flat_CNH[0]
        return out_BTH[None]

    def batch(self, flat_CNH: Tensor) -> Tree:
        """A batch of hidden states; a padding row attends to one padding token, as everywhere."""
        mask_BT = torch.arange(self.width) < self.length_B.clamp(min=1)[:, None]
        return {
            "active_C": torch.ones(1, dtype=torch.bool),
            "attention_mask_CBT": mask_BT.long()[None],
            "hidden_CBTH": self.padded(flat_CNH),
        }


def narrow(batch: Batch) -> tuple[Mapping[str, Tensor], Rows]:
    """A batch of one client without the columns that it only pads, and its rows.

    Raises:
        LichenError: for several clients, or rows that are not padded on the right.
    """
    mask_BT = batch["attention_mask_CBT"][0] != 0
    if len(batch["active_C"]) != 1 or "second_mask_CBT" in batch:
        raise LichenError("rows of several clients, or pairs of answers, do not cross a cut together", where="split")
    length_B = mask_BT.sum(1)
    if not torch.equal(mask_BT, torch.arange(mask_BT.shape[1]) < length_B[:, None]):
        raise LichenError("rows are not padded on the right", where="split", fix="use a tokenizer that pads there")
    length_B = torch.where(batch["index_CB"][0] >= 0, length_B, torch.zeros_like(length_B)).int()
    rows = Rows.of(length_B, mask_BT.shape[1])
    return {name: x[:, :, : rows.width] if name.endswith("_CBT") else x for name, x in batch.items()}, rows
