"""DeBERTa's relative positions under each client's own adapter.

Its attention sends one ``(positions, H)`` table through projections that may carry adapters. In a call of C clients
there is no row of the table that is a client's own: each client's adapters must see the whole of it. So the part of
the attention that the table makes is computed client by client; everything else stays one call.

References:
    Pengcheng He, Xiaodong Liu, Jianfeng Gao and Weizhu Chen. "DeBERTa: Decoding-enhanced BERT with Disentangled
    Attention." ICLR 2021. https://arxiv.org/abs/2006.03654

Legend: C clients, B rows, T tokens, H width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lichen.models.packing.packing import Packing

__all__ = ["part_position_tables"]

_METHODS = ("disentangled_attention_bias", "disentangled_att_bias")
"""Of DeBERTa's second and first version."""
_PROJECTIONS = ("pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj")
_SHARED = ("query_proj", "key_proj")
"""What the table goes through where it shares the projections of the rows."""


def part_position_tables(model: Any, trained: Collection[str], packing: Packing) -> None:
    """Teach attention with such a table, where one of its projections is among the trained layers."""
    for path, layer in model.named_modules():
        projections = _PROJECTIONS + (_SHARED if getattr(layer, "share_att_key", False) else ())
        for method in _METHODS:
            if hasattr(layer, method) and any(f"{path}.{name}" in trained for name in projections):
                setattr(layer, method, _by_client(getattr(layer, method), packing))


def _by_client(method: Any, packing: Packing) -> Any:
    def of_each_client(query: Tensor, key: Tensor, relative_pos: Any, table: Tensor, scale: Any) -> Any:
        if packing.clients == 1 or packing.current is not None:
            return method(query, key, relative_pos, table, scale)
        # Rows (and heads, where they are folded into them) are the clients' in equal numbers, one after the other.
        each = zip(query.chunk(packing.clients), key.chunk(packing.clients), strict=True)
        parts = []
        for client, (mine, other) in enumerate(each):
            with packing.alone(client):
                parts.append(method(mine, other, relative_pos, table, scale))
        return torch.cat(parts)

    return of_each_client
