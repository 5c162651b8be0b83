"""A frozen linear layer with every client's LoRA beside it, over packed rows.

    y_c = x_c W' + b + s x_c A_c' B_c'

Products with the frozen weight see all tokens at once; only the thin products go client by client:
by a grouped kernel on an accelerator, by one small product a client, written into place, on a CPU.
The backward pass is written out, so that nothing is kept but what it reads, and the gradient of the
input is not computed below the lowest adapter.

References:
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen (2022). LoRA: Low-Rank Adaptation of Large
    Language Models. ICLR 2022, arXiv:2106.09685.

Legend: C clients, N tokens of all clients, sorted by client, r rank, i in, o out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.models.packing.packing import Pack

__all__ = ["packed_adapter", "packed_linear"]


def packed_adapter(
    x_Ni: Tensor,
    weight: Callable[[], Tensor],
    bias_o: Tensor | None,
    A_Cri: Tensor,
    B_Cor: Tensor,
    *,
    scale: float,
    pack: Pack,
) -> Tensor:
    """``(N, out)``: the frozen layer's output and each client's adapter's beside it, if there is one.

    The thin products are taken in the dtype of ``x`` on an accelerator and in the adapters' own on a CPU,
    where small products in half precision cost more than large ones save.

    Args:
        x_Ni: Tokens.
        weight: Gives the frozen ``(out, in)`` matrix, here and once more on the way back: what is made for the
            call alone is not kept between.
        bias_o: The frozen bias.
        A_Cri: Adapters; empty for none.
        B_Cor: Adapters; empty for none.
        scale: What their products are multiplied by.
        pack: Whose tokens these are.
    """
    y: Tensor = _Adapter.apply(x_Ni, weight, bias_o, A_Cri, B_Cor, scale, pack)  # type: ignore[no-untyped-call]
    return y


def packed_linear(x_Ni: Tensor, weight_Coi: Tensor, pack: Pack) -> Tensor:
    """``(N, out)``: every token times its own client's matrix."""
    y: Tensor = _Grouped.apply(x_Ni, weight_Coi, pack)  # type: ignore[no-untyped-call]
    return y


def _fast(x: Tensor, pack: Pack) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and pack.tokens > 0


def _rows_times(x_Ni: Tensor, w_Cio: Tensor, pack: Pack) -> Tensor:
    """``(N, o)``: each client's rows times its ``(i, o)`` matrix."""
    if _fast(x_Ni, pack):
        return nn.functional.grouped_mm(x_Ni, w_Cio, offs=pack.client_ends)
    out_No = x_Ni.new_empty(x_Ni.shape[0], w_Cio.shape[2])
    for w_io, (a, b) in zip(w_Cio, pairwise(pack.client_offsets), strict=True):
        if a != b:
            torch.mm(x_Ni[a:b], w_io, out=out_No[a:b])
    return out_No


def _add_rows_times(onto_No: Tensor, x_Ni: Tensor, w_Cio: Tensor, pack: Pack) -> None:
    """The same, added in place."""
    if _fast(x_Ni, pack) or x_Ni.dtype != onto_No.dtype:
        onto_No.add_(_rows_times(x_Ni, w_Cio, pack))
        return
    for w_io, (a, b) in zip(w_Cio, pairwise(pack.client_offsets), strict=True):
        if a != b:
            torch.addmm(onto_No[a:b], x_Ni[a:b], w_io, out=onto_No[a:b])


def _sums_over_rows(a_Np: Tensor, b_Nq: Tensor, pack: Pack) -> Tensor:
    """``(C, p, q)``: the sum over each client's rows of their outer products."""
    if _fast(a_Np, pack):
        return nn.functional.grouped_mm(a_Np.t(), b_Nq, offs=pack.client_ends)
    out = a_Np.new_empty(len(pack.client_offsets) - 1, a_Np.shape[1], b_Nq.shape[1])
    for c, (a, b) in enumerate(pairwise(pack.client_offsets)):
        if a == b:
            out[c] = 0.0
        else:
            torch.mm(a_Np[a:b].t(), b_Nq[a:b], out=out[c])
    return out


@final
class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_Ni: Tensor,
        weight: Callable[[], Tensor],
        bias_o: Tensor | None,
        A_Cri: Tensor,
        B_Cor: Tensor,
        scale: float,
        pack: Pack,
    ) -> Tensor:
        y_No = nn.functional.linear(x_Ni, weight(), bias_o)
        ctx.weight, ctx.alone = weight, not A_Cri.numel()
        if ctx.alone:
            return y_No
        thin = x_Ni.dtype if x_Ni.is_cuda else A_Cri.dtype
        down_Cri, up_Cor = A_Cri.to(thin), (B_Cor * scale).to(thin)
        low_Nr = _rows_times(x_Ni.to(thin), down_Cri.transpose(1, 2), pack)
        _add_rows_times(y_No, low_Nr, up_Cor.transpose(1, 2), pack)
        # Adapters that stand still leave nothing behind but what the gradient of the input reads.
        saved = x_Ni if ctx.needs_input_grad[3] else None, low_Nr if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(down_Cri, up_Cor, *saved)
        ctx.scale, ctx.pack, ctx.dtypes = scale, pack, (A_Cri.dtype, B_Cor.dtype)
        return y_No

    @staticmethod
    def backward(ctx: Any, dy_No: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.alone:
            return (dy_No @ ctx.weight() if ctx.needs_input_grad[0] else None), *[None] * 6
        down_Cri, up_Cor, x_Ni, low_Nr = ctx.saved_tensors
        pack: Pack = ctx.pack
        dy_No = dy_No.contiguous()
        thin_No = dy_No.to(up_Cor.dtype)
        dlow_Nr = _rows_times(thin_No, up_Cor, pack)
        dA = dB = dx_Ni = None
        if ctx.needs_input_grad[3]:
            dA = _sums_over_rows(dlow_Nr, x_Ni.to(up_Cor.dtype), pack).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            dB = _sums_over_rows(thin_No, low_Nr, pack).to(ctx.dtypes[1]) * ctx.scale
        if ctx.needs_input_grad[0]:
            dx_Ni = dy_No @ ctx.weight()
            _add_rows_times(dx_Ni, dlow_Nr, down_Cri, pack)
        return dx_Ni, None, None, dA, dB, None, None


@final
class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Ni: Tensor, weight_Coi: Tensor, pack: Pack) -> Tensor:
        weight = weight_Coi.to(x_Ni.dtype)
        ctx.save_for_backward(x_Ni, weight)
        ctx.pack, ctx.dtype = pack, weight_Coi.dtype
        return _rows_times(x_Ni, weight.transpose(1, 2), pack)

    @staticmethod
    def backward(ctx: Any, dy_No: Tensor) -> tuple[Tensor | None, ...]:
        x_Ni, weight_Coi = ctx.saved_tensors
        dy_No = dy_No.contiguous()
        dx = _rows_times(dy_No, weight_Coi, ctx.pack) if ctx.needs_input_grad[0] else None
        dw = _sums_over_rows(dy_No, x_Ni, ctx.pack).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None
