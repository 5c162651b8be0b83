"""Plans synthetic rows for a client: its scarcest labels first.

A client of a federation often lacks whole labels, and a model trained on it forgets them. Synthetic rows of
just these labels give every client a balanced set, at a price in tokens that is known before.

References:
    Paul Joe Maliakel, Shashikant Ilager and Ivona Brandic. "FLIGAN: Enhancing Federated Learning with
    Incomplete Data using GAN." 2024. https://arxiv.org/abs/2403.16930 (classes that clients lack)
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from lichen.core.errors import LichenError
from lichen.fm.generation.synthesis import Label

__all__ = ["texts_to_write"]


def texts_to_write(counts: Mapping[Label, int], *, most: int, floor: int = 0) -> dict[Label, int]:
    """How many texts of each label to write for a client, so that its scarcest labels grow first.

    Every label is to have as many rows as the client's most frequent one, and ``floor`` at least; where
    that takes more than ``most`` texts, the smallest count is made as large as it can be.

    Args:
        counts: The client's rows by label, the missing labels with 0. They say something of the client:
            let it ask for what it lacks itself, or let the counts be noised before.
        most: Texts in all.
        floor: Rows that every label is to have.

    Returns:
        Texts by label, in the order of ``counts``; ties go to the label named first.

    Raises:
        LichenError: if a number is below 0.

    >>> texts_to_write({"good": 9, "fair": 2, "bad": 0}, most=6)
    {'good': 0, 'fair': 2, 'bad': 4}
    """
    if min([most, floor, *counts.values()]) < 0:
        raise LichenError("a number is below 0", where="wanted", fix="give counts of 0 or more")
    target = max([floor, *counts.values()])
    heap = [(count, place) for place, count in enumerate(counts.values()) if count < target]
    heapq.heapify(heap)
    added = [0] * len(counts)
    for _ in range(most):
        if not heap:
            break
        count, place = heapq.heappop(heap)
        added[place] += 1
        if count + 1 < target:
            heapq.heappush(heap, (count + 1, place))
    return dict(zip(counts, added, strict=True))
