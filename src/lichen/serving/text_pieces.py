"""Hands a growing text out in pieces that nothing later takes back.

A stop text may lie across two tokens, and a letter may need several: what could be the beginning of either waits.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ready_length"]

_HALF = "�"


def ready_length(text: str, stop: Sequence[str]) -> tuple[int, bool]:
    """``(characters that are certain, whether a stop text was met)`` of a text that may still grow.

    >>> ready_length("one two. EN", ("END",)), ready_length("one END two", ("END",))
    ((9, False), (4, True))
    """
    at = min((text.index(mark) for mark in stop if mark in text), default=-1)
    if at >= 0:
        return at, True
    certain = len(text.rstrip(_HALF))
    for mark in stop:
        for size in range(min(len(mark) - 1, len(text)), 0, -1):
            if text.endswith(mark[:size]):
                certain = min(certain, len(text) - size)
                break
    return certain, False
