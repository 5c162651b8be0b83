"""Finds rows that several clients hold, by fingerprints alone.

Every client gives digests of its rows (:func:`lichen.data.splits.fingerprint.fingerprint`, under a key that the clients
share), and no row. Whoever compares them learns which digests are equal, and no text that it cannot guess and try.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["elsewhere"]


def elsewhere(texts_of: Sequence[Iterable[str]], tests_of: Sequence[Sequence[str]]) -> list[list[bool]]:
    """Whether somebody else holds what each client asks for.

    Args:
        texts_of: Digests of the rows each client holds; behind the clients' may come those of others.
        tests_of: Digests each client asks for, in the same order of clients.

    >>> elsewhere([["a", "b"], ["b"]], [["a", "b"], ["b", "c"]])
    [[False, True], [True, False]]
    """
    own = [frozenset(some) for some in texts_of]
    holders = Counter(one for some in own for one in some)
    return [
        [holders[one] > (one in mine) for one in some]
        for mine, some in zip(own[: len(tests_of)], tests_of, strict=True)
    ]
