"""Caches token rows on disk, and maps them into memory.

What is kept is found by all it follows from: the tokenizer's own description, the rows' text, the form
and the length. So nothing is ever stale; what is no longer asked for is dropped in time. Tokens of private
rows are as good as the rows: the caller says where they may lie, if at all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lichen.core.tree import Tree
from lichen.data.batches import text
from lichen.data.batches.rows import Ragged, TextShard
from lichen.data.batches.text import LmForm, encode_classify, encode_lm
from lichen.data.chat import chat_template, conversation, encode_chat, spans
from lichen.data.sources.cache import keep, key_of
from lichen.data.sources.record import Record

__all__ = ["MIN_RECORDS", "classify_shard", "lm_shard"]

Noted = tuple[TextShard, "Counter[str]"]
"""A shard, and what encoding it counted."""

MIN_RECORDS = 1000
"""Fewer rows are tokenised as quickly as they are found."""


def lm_shard(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    form: LmForm,
    max_length: int,
    thinking: bool = False,
    notes: Counter[str] | None = None,
    folder: Path | None = None,
) -> TextShard:
    """One shard of language modelling; arguments as in :func:`lichen.data.batches.text.encode_lm`.

    Args:
        folder: Where token rows are kept; None: nowhere.

    Raises:
        LichenError: as there.
    """

    def make() -> Noted:
        count: Counter[str] = Counter()
        rows = encode_lm(records, tokenizer, form=form, max_length=max_length, thinking=thinking, notes=count)
        return TextShard.of(rows, kind="lm"), count

    shard, count = _cached(records, tokenizer, ("lm", form, max_length, thinking), make, folder)
    if notes is not None:
        notes.update(count)
    return shard


def classify_shard(
    records: Sequence[Record], tokenizer: Any, *, max_length: int, classes: Sequence[str], folder: Path | None = None
) -> TextShard:
    """One shard of classification; arguments as in :func:`lichen.data.batches.text.encode_classify`.

    Args:
        folder: Where token rows are kept; None: nowhere.

    Raises:
        LichenError: as there.
    """

    def make() -> Noted:
        rows = encode_classify(records, tokenizer, max_length=max_length, classes=classes)
        return TextShard.of(rows, kind="classify"), Counter()

    return _cached(records, tokenizer, ("classify", max_length, tuple(classes)), make, folder)[0]


def _cached(
    records: Sequence[Record], tokenizer: Any, how: tuple[object, ...], make: Callable[[], Noted], folder: Path | None
) -> Noted:
    about = _tokenizer(tokenizer) if len(records) >= MIN_RECORDS else None
    if about is None:
        return make()
    code = tuple(str(part.__file__) for part in (text, encode_chat, conversation, chat_template, spans))
    return keep(key_of("tokens", how, about, _texts(records), code=code), make, write=_write, read=_read, folder=folder)


def _tokenizer(tokenizer: Any) -> object | None:
    """All that decides which tokens a text becomes; None for a tokenizer that cannot tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # Left over from the last call, and set again at the next: no part of what the tokenizer is.
    backend.no_truncation()
    backend.no_padding()
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    template = getattr(tokenizer, "chat_template", None)
    from transformers import __version__

    return (type(tokenizer).__name__, __version__, special, template, backend.to_str())


def _texts(records: Sequence[Record]) -> str:
    total = hashlib.sha256()
    for r in records:
        turns = [sorted(turn.items()) for turn in r.messages]
        total.update(repr((r.text, r.prompt, r.label, turns)).encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def _write(noted: Noted) -> Tree:
    shard, count = noted
    ids = Ragged.of(shard.input_ids)
    labels = shard.labels if isinstance(shard.labels, np.ndarray) else Ragged.of(shard.labels).flat_T
    arrays = {"tokens": ids.flat_T, "offsets": ids.offset_N1, "labels": labels}
    arrays["notes"] = np.frombuffer(bytearray(json.dumps(count).encode()), dtype=np.uint8)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _read(tree: Tree) -> Noted:
    tokens, offsets, labels = (tree[name].numpy() for name in ("tokens", "offsets", "labels"))
    ids, count = Ragged(tokens, offsets), Counter[str](json.loads(tree["notes"].numpy().tobytes()))
    if labels.dtype == np.int64:
        return TextShard(ids, labels=labels, kind="classify"), count
    return TextShard(ids, labels=Ragged(labels, offsets), kind="lm"), count
