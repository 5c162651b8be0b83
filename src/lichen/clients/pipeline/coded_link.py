"""How hidden states and gradients cross from one host of a pipeline to its neighbour: as they are, or coded by token.

Both ends of a link hold the same code. Padding crosses too, as it does uncoded. What is random of a code follows from
the job's seed, the host and the number of its question, so that a round that is begun again has the same bytes.

Legend: C = 1, B rows, T tokens, H width, K bytes of a coded token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.expected import ANY, TensorSpec
from lichen.transforms.activations import ActivationCode

__all__ = ["CodedLink"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CodedLink:
    """One link between two hosts.

    Attributes:
        width: H.
        dtype: Of hidden states.
        code: How they cross; None: as they are.
    """

    width: int
    dtype: torch.dtype = torch.float32
    code: ActivationCode | None = None

    @property
    def spec(self) -> TensorSpec:
        """What crosses: ``(B, T, H)`` in the model's numbers, or ``(B, T, K)`` bytes."""
        if self.code is None:
            return TensorSpec((ANY, ANY, self.width), self.dtype)
        return TensorSpec((ANY, ANY, self.code.nbytes(self.width)), torch.uint8)

    def departing(self, out_BTH: Tensor, seed: int) -> Tensor:
        """What leaves for the neighbour.

        Raises:
            LichenError: if a number is not finite, which no code would say.
        """
        if self.code is None:
            return out_BTH
        if not bool(out_BTH.isfinite().all()):
            raise LichenError("came to numbers that are not finite", where="pipeline", fix="lower optimizer.lr")
        rows, tokens, width = out_BTH.shape
        length_B = torch.full((rows,), tokens)
        flat_CNH = out_BTH.reshape(1, rows * tokens, width)
        payload, _ = self.code.encode(flat_CNH, length_B, torch.full((rows,), -1), {}, [seed])
        return payload.reshape(rows, tokens, -1)

    def arrived(self, came_CBTH: Tensor) -> Tensor:
        """``(1, B, T, H)`` of what came, in the model's numbers.

        Raises:
            LichenError: if it does not have this code's bytes.
        """
        if self.code is None:
            return came_CBTH
        _, rows, tokens, nbytes = came_CBTH.shape
        length_B = torch.full((rows,), tokens)
        flat = came_CBTH.reshape(1, rows * tokens, nbytes)
        out_CNH, _ = self.code.decode(flat, length_B, torch.full((rows,), -1), {}, self.width)
        return out_CNH.reshape(1, rows, tokens, self.width).to(self.dtype)
