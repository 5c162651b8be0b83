"""Attention over packed rows, registered through transformers' own interface.

On an accelerator in half precision: one kernel for sequences of any length. Elsewhere: sequences of
like length are padded to one and go through torch's scaled dot product attention, bucket by bucket;
attention is a few per cent of a short row's work, so that padding here costs little.

Causal, bidirectional, sliding-window and grouped-query attention are known; anything else (a position
bias, a cap on the scores) is refused, and the cohort falls back to padded rows.

References:
    Dao (2024). FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning. ICLR
    2024, arXiv:2307.08691.
    Ainslie, Lee-Thorp, de Jong, Zemlyanskiy, Lebrón and Sanghai (2023). GQA: Training Generalized
    Multi-Query Transformer Models from Multi-Head Checkpoints. EMNLP 2023, arXiv:2305.13245.

Legend: N tokens in all, S sequences of a bucket, L tokens of its longest, h heads, k key and value heads,
d width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.models.packing.packing import PACKED_ATTENTION, Bucket, Pack, Packing

__all__ = ["attend", "register"]

_STRANGE = ("s_aux", "softcap", "position_bias", "head_mask")


def register() -> None:
    """Make the implementation known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_ATTENTION, _interface)
    # No mask: the pack says which token belongs to which row.
    AttentionMaskInterface.register(PACKED_ATTENTION, lambda *_, **__: None)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: ``(1, heads, N, d)`` each, to ``(1, N, heads, d)``."""
    packing: Packing = module.packing  # type: ignore[assignment]
    strange = [name for name in _STRANGE if more.get(name) is not None]
    if packing.current is None or attention_mask is not None or dropout or strange or query.shape[0] != 1:
        what = strange[0] if strange else "a mask or dropout"
        raise LichenError(f"attention with {what} cannot be packed", where="model", fix="set engine.packing: false")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    window = more.get("sliding_window")
    query_Nhd, key_Nkd, value_Nkd = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend(query_Nhd, key_Nkd, value_Nkd, packing.current, causal=causal, window=window, scale=scaling)
    return out[None], None


def attend(
    query_Nhd: Tensor,
    key_Nkd: Tensor,
    value_Nkd: Tensor,
    pack: Pack,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """``(N, h, d)``: every token attends within its own row.

    Args:
        query_Nhd: Queries.
        key_Nkd: Keys, of k heads that divide h.
        value_Nkd: Values, likewise.
        pack: Where rows begin.
        causal: To no later token.
        window: To the last so many tokens, itself among them; None: to all.
        scale: Of the scores; None: one over the root of d.
    """
    if window is not None and window >= max(pack.lengths, default=0):
        window = None
    half = query_Nhd.is_cuda and query_Nhd.dtype in (torch.bfloat16, torch.float16)
    if half and (causal or window is None) and _kernel()[0] is not None:
        return _varlen(query_Nhd, key_Nkd, value_Nkd, pack, causal=causal, window=window, scale=scale)
    spread = [_spread(x, pack) for x in (query_Nhd, key_Nkd, value_Nkd)]
    parts = [
        _bucket(q, k, v, bucket, causal=causal, window=window, scale=scale)
        for bucket, q, k, v in zip(pack.buckets, *spread, strict=True)
    ]
    return _collect(parts, pack).view(query_Nhd.shape)


@cache
def _kernel() -> tuple[Any, bool]:
    """torch's attention over sequences of any length, None before 2.10, and whether it knows grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, False
    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, causal: bool, window: int | None, scale: float | None
) -> Tensor:
    kernel, grouped = _kernel()
    groups, longest = q.shape[1] // k.shape[1], max(pack.lengths)
    more: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0) if causal else (-1, -1)}
    if groups > 1 and grouped:
        more["enable_gqa"] = True
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    offsets_S = pack.sequence_offsets
    q, k, v = (x.contiguous() for x in (q, k, v))
    out: Tensor = kernel(q, k, v, offsets_S, offsets_S, longest, longest, scale=scale, **more)
    return out


def _bucket(
    q_ShLd: Tensor,
    k_SkLd: Tensor,
    v_SkLd: Tensor,
    bucket: Bucket,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    mask: Tensor | None = None
    if window is not None or (not causal and not bucket.even):
        at = torch.arange(bucket.width, device=q_ShLd.device)
        seen_SLL = (at < bucket.lengths[:, None])[:, None, :].expand(-1, bucket.width, -1)
        if causal:
            seen_SLL = seen_SLL & (at <= at[:, None])
        if window is not None:
            seen_SLL = seen_SLL & (at > at[:, None] - window)
            if not causal:
                seen_SLL = seen_SLL & (at < at[:, None] + window)
        # A padded place sees itself: a softmax over nothing is not a number.
        mask = (seen_SLL | torch.eye(bucket.width, dtype=torch.bool, device=q_ShLd.device))[:, None]
    # A causal row's own tokens never see the padding, which comes after them.
    return nn.functional.scaled_dot_product_attention(
        q_ShLd,
        k_SkLd,
        v_SkLd,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q_ShLd.shape[1] != k_SkLd.shape[1],
    )


def _spread(x_Nhd: Tensor, pack: Pack) -> list[Tensor]:
    """``(S, h, L, d)`` for every bucket."""
    parts: tuple[Tensor, ...] = _Spread.apply(x_Nhd.flatten(1), pack)  # type: ignore[no-untyped-call]
    buckets = zip(parts, pack.buckets, strict=True)
    return [x.view(b.sequences, b.width, *x_Nhd.shape[1:]).transpose(1, 2) for x, b in buckets]


def _collect(parts: list[Tensor], pack: Pack) -> Tensor:
    """The buckets' real tokens, back in one line."""
    flat = [part_ShLd.transpose(1, 2).flatten(2).flatten(0, 1) for part_ShLd in parts]
    out: Tensor = _Collect.apply(pack, *flat)  # type: ignore[no-untyped-call]
    return out


def _to_line(parts: Sequence[Tensor], pack: Pack) -> Tensor:
    """Every token from its padded place; each token has one."""
    line_NF = parts[0].new_empty(pack.tokens, parts[0].shape[1])
    for part, bucket in zip(parts, pack.buckets, strict=True):
        line_NF.index_copy_(0, bucket.token, part if bucket.even else part.index_select(0, bucket.place))
    return line_NF


@final
class _Spread(torch.autograd.Function):
    """Gather into padded places; on the way back only the real ones count: padding has no gradient to give."""

    @staticmethod
    def forward(ctx: Any, x_NF: Tensor, pack: Pack) -> tuple[Tensor, ...]:
        ctx.pack = pack
        return tuple(x_NF.index_select(0, bucket.gather) for bucket in pack.buckets)

    @staticmethod
    def backward(ctx: Any, *dparts: Tensor) -> tuple[Tensor, None]:
        return _to_line(dparts, ctx.pack), None


@final
class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pack: Pack, *parts: Tensor) -> Tensor:
        ctx.pack = pack
        return _to_line(parts, pack)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, ...]:
        # What was padding had no part in the result, and so has no gradient.
        parts = []
        for bucket in ctx.pack.buckets:
            part = dy_NF.index_select(0, bucket.gather)
            parts.append(part if bucket.even else part.mul_(bucket.real))
        return None, *parts
