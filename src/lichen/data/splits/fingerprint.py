"""A fingerprint of what a model reads of a row: rows with equal ones are copies.

Case, punctuation and spacing do not tell rows apart. A digest can be compared where the row itself may not go.

References:
    Lee et al., "Deduplicating Training Data Makes Language Models Better", ACL 2022, arXiv:2107.06499 (why
    copies spoil a test).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lichen.data.sources.record import Record

__all__ = ["Reads", "answers", "fingerprint", "normalise"]

Reads = Literal["text", "pair", "messages"]
"""What a model reads of a row: its text, its prompt and text, or its conversation."""


def normalise(text: str) -> str:
    """Text with case, accents' encoding, punctuation and spacing evened out, to find near-exact copies.

    Text without any letter or digit keeps its signs.

    >>> normalise("  Hello,   WORLD! ")
    'hello world'
    >>> normalise(":-)")
    ':-)'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    if folded.isascii():
        words = re.findall(r"\w+", folded)
    else:  # the vowels of many scripts are marks, which \w leaves out
        letters = (c if c == "_" or c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded)
        words = "".join(letters).split()
    return " ".join(words) or " ".join(folded.split())


def fingerprint(record: Record, *, reads: Reads = "pair", key: bytes = b"") -> str:
    """A digest (32 hex digits) that copies of a row have in common.

    Args:
        record: The row; of a picture its pixels count.
        reads: What the model reads of it. A row without a conversation is its prompt and text.
        key: Secret of those who compare digests, at most 64 bytes, so that nobody else can try out texts.

    >>> a, b = Record(client="x", prompt="Fit?", text="Yes."), Record(client="y", prompt="fit", text="yes")
    >>> fingerprint(a) == fingerprint(b)
    True
    """
    digest = hashlib.blake2b(digest_size=16, key=key)
    if record.features is not None:
        digest.update(record.features.tobytes())
        return digest.hexdigest()
    if reads == "messages" and record.messages:
        parts = [part for turn in record.messages for part in (turn["role"], normalise(turn["content"]), *_calls(turn))]
    else:
        parts = [normalise(record.text)] if reads == "text" else [normalise(record.prompt), normalise(record.text)]
    digest.update("\x1f".join(parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _calls(turn: Mapping[str, Any]) -> list[str]:
    return [repr(turn["tool_calls"])] if "tool_calls" in turn else []


def answers(records: Sequence[Record], *, reads: Reads = "pair") -> list[str]:
    """Each row's answer, evened out; empty where no other row has it, as for free text."""
    answer_texts = [normalise(_answer(record, reads)) for record in records]
    once: dict[str, str] = {}
    often: set[str] = set()
    for record, answer in zip(records, answer_texts, strict=True):
        mark = fingerprint(record, reads=reads)
        if once.setdefault(answer, mark) != mark:
            often.add(answer)
    return [answer if answer in often else "" for answer in answer_texts]


def _answer(record: Record, reads: Reads) -> str:
    if reads == "messages" and record.messages:
        return next((turn["content"] for turn in reversed(record.messages) if turn["role"] == "assistant"), "")
    return record.text
