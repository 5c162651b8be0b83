"""Whoever drops out at whichever stage: the sum is that of all who sent numbers, or there is none below a threshold."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from support.masked_talk import Talk, ended, numbers, plain

LEAST = 3


def survivors(talk: Talk, k: int, threshold: int) -> set[int] | None:
    """Whose numbers are in the sum, counted from who drops out when; None: there is no sum."""
    stages, around = talk.stages, talk.closing._around
    advertised = {client for client, stage in stages.items() if stage > 0}
    if len(advertised) < LEAST or min(k, len(advertised) - 1) + 1 < threshold:
        return None
    shared = {c for c in advertised if stages[c] > 1 and len(around[c]) + 1 >= threshold}
    masked = {c for c in shared if stages[c] > 2 and len(shared & set(around[c])) + 1 >= threshold}
    if len(shared) < LEAST or len(masked) < LEAST:
        return None
    opening = {c for c in masked if stages[c] > 3 and len(masked & set(around[c])) + 1 >= threshold}
    for dealer in shared:
        if dealer in masked or masked & set(around[dealer]):
            holders = len(opening & set(around[dealer])) + (dealer in opening)
            if holders < threshold:
                return None
    return masked


@st.composite
def talks(draw: st.DrawFn) -> tuple[Talk, int, int]:
    n = draw(st.integers(3, 20), label="clients")
    k = draw(st.integers(2, n - 1), label="neighbours")
    threshold = draw(st.integers((k + 1) // 2 + 1, max((k + 1) // 2 + 1, 2 * (k + 1) // 3)), label="threshold")
    stages = draw(st.lists(st.sampled_from((4,) * 12 + (0, 1, 2, 3)), min_size=n, max_size=n), label="stages")
    ids = draw(st.lists(st.integers(0, 10**6), min_size=n, max_size=n, unique=True), label="ids")
    units = numbers(ids, draw(st.integers(1, 4)), seed=n)
    return Talk(units, k=k, threshold=threshold, stages=dict(zip(ids, stages, strict=True))), k, threshold


@given(talks())
def test_the_sum_is_exact_or_there_is_none_just_below_the_thresholds(given_talk: tuple[Talk, int, int]) -> None:
    talk, k, threshold = given_talk
    total, error = ended(talk)
    left = survivors(talk, k, threshold)
    if total is None or left is None:
        assert total is left is None
        assert error is not None
        assert error.reason == "masks"
        return
    assert talk.closing.survivors == tuple(sorted(left))
    assert np.array_equal(total, plain(talk.units, sorted(left), len(total)))
    assert talk.closing.liars == {}
