"""Digests of messages that counted, so that it can be shown later which message of a client went into a round.

The digest of a client's message is the SHA-256 of, in this order: its version (int64) and weight (float64), both little
endian; of each tensor and then of each metric, in order of name, ``name|dtype|shape|`` and its bytes; and of each text
its length in bytes (int64) and its bytes. A message is as the aggregator gets it, once codecs are undone.

Legend: C clients.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from lichen.core.message import Message
from lichen.core.replies import Receipt

__all__ = ["digest_C", "receipts"]

_WORDS = 8
"""Of 32 bits each, which a float64 holds exactly: so a digest crosses between ranks as any metric does."""


def digest_C(message: Message) -> Tensor:
    """Each client's digest as ``(C, 8)`` float64: eight whole numbers below 2^32."""
    versions, weights = message.version_C.tolist(), message.weight_C.tolist()
    hashes = [
        hashlib.sha256(struct.pack("<qd", version, weight)) for version, weight in zip(versions, weights, strict=True)
    ]
    for head, rows in _parts(message):
        for one, row in zip(hashes, rows, strict=True):
            one.update(head)
            one.update(row)
    for one, texts in zip(hashes, message.texts, strict=False):
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            one.update(struct.pack("<q", len(data)))
            one.update(data)
    words = [struct.unpack(f">{_WORDS}I", one.digest()) for one in hashes]
    return torch.tensor(words, dtype=torch.float64).reshape(len(hashes), _WORDS)


def _parts(message: Message) -> Iterator[tuple[bytes, list[memoryview]]]:
    """What all clients share of a tensor or metric, and each one's bytes."""
    for tree in (message.tensors, message.metrics):
        for name in sorted(tree):
            x_C = tree[name].detach().cpu()
            count, alike = x_C.shape[0], x_C.shape[0] > 1 and x_C.stride(0) == 0  # one row lies in memory, for all
            x_C = (x_C[:1] if alike else x_C).contiguous()
            head = f"{name}|{x_C.dtype}|{tuple(x_C.shape[1:])}|".encode("utf-8", "surrogatepass")
            if not x_C.numel():
                yield head, [memoryview(b"")] * count
                continue
            flat = x_C.reshape(-1)
            if flat.stride(0) != 1:  # one number
                flat = flat.new_empty(1).copy_(flat)
            rows = [row.data for row in flat.view(torch.uint8).reshape(len(x_C), -1).numpy()]
            yield head, rows * count if alike else rows


def receipts(client_N: Tensor, version_N: Tensor, weight_N: Tensor, digest_N: Tensor) -> tuple[Receipt, ...]:
    """What counted, of each client, from digests as :func:`digest_C` gives them."""
    lists = (client_N.tolist(), version_N.tolist(), weight_N.tolist(), digest_N.tolist())
    return tuple(
        Receipt(client, version, weight, struct.pack(f">{_WORDS}I", *map(int, words)).hex())
        for client, version, weight, words in zip(*lists, strict=True)
    )
