"""Sign compression: one bit a number, with a scale for each block.

The steps of adaptive optimizers are much alike in magnitude, and most of what a change says is in its signs.
A sign alone is biased, so it wants error feedback: with it, it converges like uncompressed training.

References:
    Frank Seide, Hao Fu, Jasha Droppo, Gang Li and Dong Yu. "1-Bit Stochastic Gradient Descent and its
    Application to Data-Parallel Distributed Training of Speech DNNs." Interspeech 2014.
    Jeremy Bernstein, Yu-Xiang Wang, Kamyar Azizzadenesheli and Animashree Anandkumar. "signSGD: Compressed
    Optimisation for Non-Convex Problems." ICML 2018. https://arxiv.org/abs/1802.04434
    Sai Praneeth Karimireddy, Quentin Rebjock, Sebastian U. Stich and Martin Jaggi. "Error Feedback Fixes
    SignSGD and other Gradient Compression Schemes." ICML 2019. https://arxiv.org/abs/1901.09847 (scaled)

Legend: C clients, N numbers, K blocks, b numbers of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.transforms.bits import bytes_for, pack_bits, unpack_bits
from lichen.transforms.codec import Parts
from lichen.transforms.layout import Layout

__all__ = ["Sign"]


@final
@dataclass(frozen=True, slots=True)
class Sign:
    """``sign(x) * mean|x|`` of each block; ``‖x - x̂‖ <= ‖x‖ (1 + 2^-8)``, and less the more alike magnitudes are.

    Args:
        block: Numbers that share a magnitude of two bytes.

    Raises:
        LichenError: if the block is empty.
    """

    block: int = 128
    last = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise LichenError(f"a block of {self.block} is empty", where="wire", fix="use 32 or more")

    def parts(self, layout: Layout) -> Parts:
        """Magnitudes and signs."""
        return {
            "size": (torch.bfloat16, (-(-layout.size // self.block),)),
            "sign": (torch.uint8, (bytes_for(layout.size, 1),)),
        }

    def rest(self, layout: Layout) -> Layout:
        """Nothing."""
        return Layout(())

    def encode(self, x_CN: Tensor, layout: Layout, seeds_C: Sequence[int]) -> tuple[Tree, Tensor]:
        """Magnitudes and signs; zero counts as positive."""
        clients, count = x_CN.shape
        x_CKb = torch.nn.functional.pad(x_CN.abs(), (0, -count % self.block)).view(clients, -1, self.block)
        # In float64 and block by block: a client's bits do not depend on who stands beside it.
        sum_CK = torch.stack([x_Kb.double().sum(-1) for x_Kb in x_CKb])
        filled_K = torch.full((x_CKb.shape[1],), self.block, dtype=torch.float64, device=x_CN.device)
        filled_K[-1:] -= -count % self.block
        size_CK = (sum_CK / filled_K).to(torch.bfloat16)
        return {"size": size_CK, "sign": pack_bits((x_CN < 0).to(torch.uint8), 1)}, x_CN[:, :0]

    def decode(self, parts: Tree, rest_CM: Tensor, layout: Layout) -> Tensor:
        """Signs times magnitudes."""
        count = layout.size
        sign_CN = 1.0 - 2.0 * unpack_bits(parts["sign"], count, 1).float()
        return sign_CN * parts["size"].float().repeat_interleave(self.block, 1)[:, :count]
