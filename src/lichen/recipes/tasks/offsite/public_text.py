"""Turns public text into rows of tokens on which an emulator's middle is trained, and such on which it is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.core.errors import LichenError
from lichen.data.sources.records import load_records

__all__ = ["LENGTH", "public_token_rows"]

LENGTH = 128
"""Tokens of a row."""

_MEASURED = 16
"""Rows that are not trained on, at most."""


def public_token_rows(
    name: str, tokenizer: Any, *, most: int, stream: bool, where: str, say: Callable[[str], None]
) -> tuple[list[list[int]], list[list[int]]]:
    """``(rows to train on, rows to measure on)``, from all over the text.

    Args:
        name: Catalog name, file or folder.
        tokenizer: The model's.
        most: Rows to train on, at most.
        stream: Texts end to end, as a language model reads them; else a row a text, cut at the right.
        where: The flag or key that names the text.
        say: Called with lines of progress.

    Raises:
        LichenError: if there is no such text, or too little of it.
    """
    records = load_records(name, columns={}, say=say)
    texts = ["\n".join(part for part in (record.prompt, record.text) if part) for record in records]
    for at, record in enumerate(records):
        if record.messages:
            texts[at] = "\n".join(str(turn.get("content") or "") for turn in record.messages)
    texts = [text for text in texts if text.strip()]
    count = most + _MEASURED
    rows: list[list[int]] = []
    if stream:
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        each = [[*tokenizer(text)["input_ids"], *end] for text in texts]
        ids = [token for text in each for token in text]
        rows = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    else:
        rows = [ids for ids in tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"] if len(ids) > 2]
    step = max(1, len(rows) // count)
    rows = rows[::step][:count]
    if len(rows) < 8:
        raise LichenError(f"gives {len(rows)} rows of {LENGTH} tokens", where=where, fix="name a longer public text")
    measured = max(1, min(_MEASURED, len(rows) // 8))
    apart = len(rows) // measured
    chosen = set(range(0, measured * apart, apart))
    return [row for at, row in enumerate(rows) if at not in chosen], [rows[at] for at in sorted(chosen)]
