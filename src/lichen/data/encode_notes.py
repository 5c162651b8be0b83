"""Counts what encoding cuts, drops or changes, for the report to the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

__all__ = ["NOTES", "sentences"]

NOTES: Final[Mapping[str, str]] = {
    "prompt cut": "{n} of {rows} rows are longer than data.max_length and lost the beginning of their prompt",
    "text cut": "{n} of {rows} rows are longer than data.max_length and lost the end of their text",
    "frame cut": "in {n} of {rows} rows the chat template alone takes more than three quarters of data.max_length, "
    "so that it was cut as well; raise data.max_length, or set data.system to something shorter",
    "unlearned": "{n} answers are read but not learned, because the chat template writes them otherwise once a "
    "conversation goes on; to learn them, give each a row of its own, or a template in data.template",
    "empty": "{n} assistant turns say nothing and are not learned",
    "developer": "in {n} of {rows} conversations the role developer is written as system, "
    "since the chat template does not know it",
    "left out": "in {n} of {rows} conversations the chat template leaves out or rewrites a system or user turn",
    "special": "{n} of {rows} rows hold words that the tokenizer reads as special tokens, as any server with it would",
    "across": "in {n} of {rows} rows an answer begins inside a token, which is learned with it; "
    "asked with such a prompt, a model sees other tokens at its end",
}
"""A sentence for each key that is counted, with ``{n}`` and ``{rows}``."""


def sentences(notes: Counter[str], rows: int) -> list[str]:
    """What there is to tell, in the order of :data:`NOTES`.

    >>> sentences(Counter({"empty": 2, "special": 0}), 10)
    ['2 assistant turns say nothing and are not learned']
    """
    return [text.format(n=f"{notes[key]:,}", rows=f"{rows:,}") for key, text in NOTES.items() if notes[key]]
