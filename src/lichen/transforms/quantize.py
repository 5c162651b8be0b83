"""Quantises to bfloat16, or to 8, 4 or 2 bits with a scale for each block.

Numbers of a block share one scale, its largest magnitude over the largest whole number, kept as bfloat16
and rounded up, so that no number is cut off. Rounding is stochastic, so that the mean over many clients is
the mean of what they meant (unbiased), or to nearest, which loses less of a single message and suits error
feedback.

References:
    Dan Alistarh, Demjan Grubic, Jerry Li, Ryota Tomioka and Milan Vojnovic. "QSGD: Communication-Efficient
    SGD via Gradient Quantization and Encoding." NeurIPS 2017. https://arxiv.org/abs/1610.02132
    Tim Dettmers, Mike Lewis, Sam Shleifer and Luke Zettlemoyer. "8-bit Optimizers via Block-wise
    Quantization." ICLR 2022. https://arxiv.org/abs/2110.02861 (a scale for each block)

Legend: C clients, N numbers, K blocks, b numbers of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.transforms.bits import bytes_for, pack_bits, unpack_bits
from lichen.transforms.codec import Parts
from lichen.transforms.layout import Layout

__all__ = ["Bfloat16", "Quantize"]


@final
@dataclass(frozen=True, slots=True)
class Bfloat16:
    """Two bytes a number, rounded to nearest: off by at most ``2^-8`` of it."""

    last = True

    def parts(self, layout: Layout) -> Parts:
        """The numbers."""
        return {"x": (torch.bfloat16, (layout.size,))}

    def rest(self, layout: Layout) -> Layout:
        """Nothing."""
        return Layout(())

    def encode(self, x_CN: Tensor, layout: Layout, seeds_C: Sequence[int]) -> tuple[Tree, Tensor]:
        """The numbers, rounded."""
        return {"x": x_CN.to(torch.bfloat16)}, x_CN[:, :0]

    def decode(self, parts: Tree, rest_CM: Tensor, layout: Layout) -> Tensor:
        """The same as float32."""
        return parts["x"].float()


@final
@dataclass(frozen=True, slots=True)
class Quantize:
    """Whole numbers from ``-L`` to ``L = 2^(bits - 1) - 1``, and a scale for each block.

    With ``s`` a block's scale, which is at most ``(1 + 2^-7) max|x| / L``, a number is off by less than
    ``s`` where rounding is stochastic, and by at most ``s / 2`` where it is to nearest.

    Args:
        bits: 8, 4 or 2 for each number.
        block: Numbers that share a scale of two bytes.
        stochastic: Round up with the probability that makes the mean right.

    Raises:
        LichenError: if a value is out of range.
    """

    bits: int = 4
    _: KW_ONLY
    block: int = 128
    stochastic: bool = True
    last = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise LichenError(f"{self.bits} bits are not possible", where="wire", fix="use 8, 4 or 2")
        if self.block < 1:
            raise LichenError(f"a block of {self.block} is empty", where="wire", fix="use 32 or more")

    @property
    def _top(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def parts(self, layout: Layout) -> Parts:
        """The whole numbers and the scales."""
        blocks = -(-layout.size // self.block)
        return {
            "scale": (torch.bfloat16, (blocks,)),
            "code": (torch.uint8, (bytes_for(layout.size, self.bits),)),
        }

    def rest(self, layout: Layout) -> Layout:
        """Nothing."""
        return Layout(())

    def encode(self, x_CN: Tensor, layout: Layout, seeds_C: Sequence[int]) -> tuple[Tree, Tensor]:
        """Scales and whole numbers; a block that is not finite decodes to what is not finite either."""
        clients, count = x_CN.shape
        x_CKb = torch.nn.functional.pad(x_CN, (0, -count % self.block)).view(clients, -1, self.block)
        scale_CK = _up(x_CKb.abs().amax(-1) / self._top)
        s_CK1 = scale_CK.float().unsqueeze(-1)
        y_CN = torch.where(s_CK1 > 0, x_CKb / s_CK1, torch.zeros_like(x_CKb)).view(clients, -1)[:, :count]
        if self.stochastic:
            low_CN = y_CN.floor()
            u_CN = torch.stack([torch.rand(count, generator=torch_generator(s, "round")) for s in seeds_C])
            y_CN = low_CN + (u_CN.to(y_CN.device) < y_CN - low_CN)
        else:
            y_CN = y_CN.round()
        code_CN = y_CN.nan_to_num().clamp(-self._top, self._top) + self._top
        return {"scale": scale_CK, "code": pack_bits(code_CN.to(torch.uint8), self.bits)}, x_CN[:, :0]

    def decode(self, parts: Tree, rest_CM: Tensor, layout: Layout) -> Tensor:
        """Whole numbers times scales."""
        count = layout.size
        y_CN = unpack_bits(parts["code"], count, self.bits).float() - self._top
        scale_CN = parts["scale"].float().repeat_interleave(self.block, 1)[:, :count]
        return y_CN * scale_CN


def _up(x: Tensor) -> Tensor:
    """Non-negative float32 as bfloat16, rounded up: the upper half of its bits, plus one if the lower is not empty."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32).to(torch.bfloat16)
