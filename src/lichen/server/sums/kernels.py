"""The inner loops of the exact sums.

    sum = onto + Σ_c round(f_c x_c)            sum = onto + Σ_k round(f_k B_k A_k)

Products are taken in float64 and rounded half to even. Numbers are taken in pieces that stay in the
cores' caches through all passes over them, in buffers made once. The sum over clients is in float64
first, where integers below 2^53 add exactly; where the largest magnitudes say that it might pass 2^53,
it is taken in int64. Whether a sum fits into 64 bits is the caller's question: magnitudes are told.

References:
    James Demmel and Hong Diep Nguyen. "Fast Reproducible Floating-Point Summation." IEEE ARITH 2013.

Legend: C clients, N numbers of one client, P numbers of a piece, W of a buffer, m rows, n columns, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["LIMIT", "add_products", "add_rows"]

LIMIT = 2**63
"""What a sum's magnitude must stay below."""

_EXACT = 2**53
_CACHED = 2**17  # numbers a thread: one megabyte of float64, half of a common second-level cache
_ON_DEVICE = 2**24
_MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = 0x4338000000000000
"""Of ``_MAGIC`` as a float64."""


def add_rows(onto_N: Tensor | None, rows: Sequence[Tensor], factor_C: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum_N, top_C)``: every client's numbers times its factor, rounded, summed and added.

    Args:
        onto_N: int64 sum so far, which stays as it is; None for zeros.
        rows: Tensors ``(C, ·)``, N numbers a client in all, any real dtypes, on one device.
        factor_C: float64.

    Returns:
        int64 sums on the device of the rows, modulo 2^64; and each client's largest magnitude after
        weighing and rounding, float64 on the CPU, which is not finite where one of its numbers is not:
        the sums mean nothing then.
    """
    device, C = rows[0].device, factor_C.shape[0]
    if C == 1 and device.type == "cpu" and rows[0].is_floating_point() and len({x.dtype for x in rows}) == 1:
        found = _add_one(onto_N, torch.cat([x.detach()[0] for x in rows]), float(factor_C))
        if found is not None:
            return found
    pieces = list(_pieces(rows, max(1, _buffer(device) // C)))
    sizes = [sum(x.shape[1] for x in parts) for parts in pieces]
    old_N = torch.zeros(sum(sizes), dtype=torch.int64, device=device) if onto_N is None else onto_N.to(device)
    new_N = torch.empty_like(old_N)
    wide_W = torch.empty(C * max(sizes, default=0), dtype=torch.float64, device=device)
    sum_W, units_W = wide_W.new_empty(max(sizes, default=0)), old_N.new_empty(max(sizes, default=0))
    factor_C1 = factor_C.to(device).unsqueeze(1)

    def once(*, floats: bool) -> Tensor:
        tops = [wide_W.new_zeros(C)]
        for parts, P, old_P, new_P in zip(
            pieces, sizes, torch.split(old_N, sizes), torch.split(new_N, sizes), strict=True
        ):
            wide_CP = wide_W[: C * P].view(C, P)
            for x, place in zip(parts, torch.split(wide_CP, [x.shape[1] for x in parts], 1), strict=True):
                place.copy_(x)
            wide_CP.mul_(factor_C1).round_()
            tops += [wide_CP.amax(1), wide_CP.amin(1)]
            if floats:
                units_W[:P].copy_(torch.sum(wide_CP, 0, out=sum_W[:P]))
            else:
                torch.sum(wide_CP.long(), 0, out=units_W[:P])
            torch.add(old_P, units_W[:P], out=new_P)
        return torch.stack(tops).abs().amax(0).cpu()

    top_C = once(floats=True)
    if _EXACT <= sum(top_C.tolist()) < LIMIT:
        once(floats=False)
    return new_N, top_C


def _add_one(onto_N: Tensor | None, x_N: Tensor, factor: float) -> tuple[Tensor, Tensor] | None:
    """:func:`add_rows` for one client's numbers of one dtype; None where one is too large for it, or no number.

    Added to 1.5 · 2^52, a number is rounded half to even by the addition itself, and the bits of the sum, taken as an
    integer, are that integer beside those of 1.5 · 2^52. So nothing is converted, which processors without AVX-512 do
    one number at a time.
    """
    N, piece = x_N.shape[0], _CACHED * torch.get_num_threads()
    new_N = torch.empty(N, dtype=torch.int64)
    wide_W = torch.empty(min(N, piece), dtype=torch.float64)
    ends = [wide_W.new_full((), _MAGIC)]
    for start in range(0, N, piece):
        x_P, new_P = x_N[start : start + piece], new_N[start : start + piece]
        wide_P = wide_W[: x_P.shape[0]]
        wide_P.copy_(x_P).mul_(factor).add_(_MAGIC)
        ends += torch.aminmax(wide_P)
        units_P = wide_P.view(torch.int64).sub_(_MAGIC_BITS)
        if onto_N is None:
            new_P.copy_(units_P)
        else:
            torch.add(onto_N[start : start + piece], units_P, out=new_P)
    top = float((torch.stack(ends) - _MAGIC).abs().amax())
    return (new_N, torch.tensor([top], dtype=torch.float64)) if top < 2**51 else None


def _buffer(device: torch.device) -> int:
    return _CACHED * torch.get_num_threads() if device.type == "cpu" else _ON_DEVICE


def _pieces(rows: Iterable[Tensor], width: int) -> Iterator[list[Tensor]]:
    """The rows ``(C, ·)`` in order, large ones cut evenly and small ones side by side, none wider than ``width``."""
    chunk: list[Tensor] = []
    left = width
    for x in rows:
        cuts = -(-x.shape[1] // width)
        for part in torch.split(x, -(-x.shape[1] // cuts), 1) if cuts > 1 else [x] * cuts:
            if part.shape[1] > left:
                yield chunk
                chunk, left = [], width
            chunk.append(part)
            left -= part.shape[1]
    if chunk:
        yield chunk


def add_products(
    onto_mn: Tensor | None, pairs: Sequence[tuple[Tensor, Tensor]], factors: Sequence[float]
) -> tuple[Tensor, int]:
    """``(sum_mn, bound)``: every pair's product times its factor, rounded, summed and added.

    Each product is made alone and in blocks that follow from its shape, so that its bits do not depend
    on the company.

    Args:
        onto_mn: int64 sum so far, which stays as it is; None for zeros.
        pairs: ``B (m, r)`` and ``A (r, n)`` of any real dtypes, one or more; ranks may differ.
        factors: One a pair.

    Returns:
        int64 sums on the pairs' device, modulo 2^64; and what the sum of their magnitudes cannot
        exceed, which is ``2^63`` or more where a product is not finite or the sums may be wrapped.
    """
    m, n, device = pairs[0][0].shape[0], pairs[0][1].shape[1], pairs[0][0].device
    # Fresh copies: a BLAS may choose its path by how its operands lie in memory.
    wide = [
        tuple(x.detach().to(torch.float64, memory_format=torch.contiguous_format, copy=True) for x in p) for p in pairs
    ]
    bound = sum(_top(B, A, factor) for (B, A), factor in zip(wide, factors, strict=True))
    height = max(1, min(m, (_CACHED if device.type == "cpu" else _ON_DEVICE) // n))
    old_mn = torch.zeros(m, n, dtype=torch.int64, device=device) if onto_mn is None else onto_mn.to(device)
    new_mn = torch.empty_like(old_mn)
    product = torch.empty(height, n, dtype=torch.float64, device=device)
    total = torch.empty_like(product, dtype=torch.float64 if bound < _EXACT else torch.int64)
    for start in range(0, m, height):
        rows = slice(start, min(m, start + height))
        one, all_ = product[: rows.stop - start], total[: rows.stop - start].zero_()
        for (B, A), factor in zip(wide, factors, strict=True):
            torch.mm(B[rows], A, out=one)
            all_.add_(one.mul_(factor).round_().to(total.dtype))
        torch.add(old_mn[rows], all_.long(), out=new_mn[rows])
    return new_mn, bound


def _top(B_mr: Tensor, A_rn: Tensor, factor: float) -> int:
    top = B_mr.shape[1] * float(B_mr.abs().max()) * float(A_rn.abs().max()) * factor
    # The margin covers the rounding of this line and of the product.
    return int(top * (1 + 2**-30)) + 1 if top < LIMIT else LIMIT
