"""Packs integers of few bits into bytes.

Legend: C clients, K numbers, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bytes_for", "pack_bits", "unpack_bits"]

ABREAST = 1 << 16
"""Numbers spread into single bits at once; a multiple of eight, so that pieces end at whole bytes."""


def bytes_for(count: int, bits: int) -> int:
    """Bytes of so many numbers of so many bits.

    >>> bytes_for(3, 5)
    2
    """
    return -(-count * bits // 8)


def pack_bits(values_CK: Tensor, bits: int) -> Tensor:
    """Whole numbers in ``[0, 2^bits)`` as uint8 ``(C, B)``, lowest bits first; 1 to 63 bits.

    >>> pack_bits(torch.tensor([[1, 2, 3]]), 4)
    tensor([[33,  3]], dtype=torch.uint8)
    """
    clients, count = values_CK.shape
    if bits == 8:
        return values_CK.to(torch.uint8)
    if bits in (1, 2, 4):
        each = 8 // bits
        wide = torch.nn.functional.pad(values_CK.to(torch.uint8), (0, -count % each)).view(clients, -1, each)
        out = wide[..., 0].clone()
        for place in range(1, each):
            out |= wide[..., place] << (bits * place)
        return out
    within, eight = torch.arange(bits, device=values_CK.device), torch.arange(8, device=values_CK.device)
    pieces = []
    for start in range(0, count, ABREAST):
        some = values_CK[:, start : start + ABREAST].long()
        some = torch.nn.functional.pad(some, (0, -some.shape[1] % 8))
        single = ((some.unsqueeze(-1) >> within) & 1).reshape(clients, -1, 8)
        pieces.append((single << eight).sum(-1).to(torch.uint8))
    whole = torch.cat(pieces, 1) if pieces else values_CK.new_zeros(clients, 0, dtype=torch.uint8)
    return whole[:, : bytes_for(count, bits)].contiguous()


def unpack_bits(bytes_CB: Tensor, count: int, bits: int) -> Tensor:
    """Undo :func:`pack_bits`: ``(C, count)``, uint8 of 1, 2, 4 or 8 bits, else int64.

    >>> unpack_bits(torch.tensor([[33, 3]], dtype=torch.uint8), 3, 4)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    clients = bytes_CB.shape[0]
    if bits == 8:
        return bytes_CB
    if bits in (1, 2, 4):
        each, mask = 8 // bits, (1 << bits) - 1
        fields = [(bytes_CB >> (bits * place)) & mask for place in range(each)]
        return torch.stack(fields, -1).view(clients, -1)[:, :count]
    within, eight = torch.arange(bits, device=bytes_CB.device), torch.arange(8, device=bytes_CB.device)
    step = ABREAST // 8 * bits
    pieces = []
    for start in range(0, bytes_CB.shape[1], step):
        some = bytes_CB[:, start : start + step].long()
        some = torch.nn.functional.pad(some, (0, -some.shape[1] % bits))
        single = ((some.unsqueeze(-1) >> eight) & 1).reshape(clients, -1, bits)
        pieces.append((single << within).sum(-1))
    whole = torch.cat(pieces, 1) if pieces else bytes_CB.new_zeros(clients, 0, dtype=torch.int64)
    return whole[:, :count]
