"""What a client computes of its rows once and keeps in its private state, beside a digest of what it follows from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.data.batches.content_digest import shards_digest
from lichen.data.batches.rows import TextShard

__all__ = ["KEY", "KEY_BYTES", "stored"]

KEY, KEY_BYTES = "key", 32
"""What stands beside the tensors: a SHA-256."""


def stored(
    folder: Path | None,
    client: int,
    shard: TextShard,
    make: Callable[[], Tree],
    origin: Callable[[], str],
    *how: object,
) -> Tree:
    """What ``make`` gives, or has given before for the same rows, model and start.

    Args:
        folder: Of one kind and part of rows; None: nothing is kept.
        client: Whose rows they are.
        shard: The rows.
        make: Computes it.
        origin: Names the model and what all begin from.
        how: What else it follows from.
    """
    if folder is None:
        return make()
    second = shard.compared.second if shard.compared is not None else None
    rows = shards_digest([shard] if second is None else [shard, second()])
    digest = hashlib.sha256(f"{origin()} {rows} {how}".encode()).digest()
    key, store = torch.tensor(list(digest), dtype=torch.uint8), ClientStore(folder)
    known = store.load((client,), 0)
    if known is not None and torch.equal(known[KEY][0], key):
        return {name: x[0] for name, x in known.items() if name != KEY}
    made = make()
    store.stage((client,), 0, {name: x[None] for name, x in {**made, KEY: key}.items()})
    return made
