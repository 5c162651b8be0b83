"""Rows of the past that are trained on again: a uniform sample, the same whoever asks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lichen.data.periods.reservoir import replayed, reservoir
from lichen.data.sources.record import Record


def rows(count: int) -> list[Record]:
    return [Record(client="a", text=f"text {number // 2}", time=str(number // 2)) for number in range(count)]


def test_every_row_is_as_likely_as_any_other_also_where_rows_are_equal() -> None:
    """By chi squared with twenty rows, pairs of which are equal, over 3,000 seeds; its statistic is a little low, since
    the draws are without replacement.
    """
    some, seen = rows(20), np.zeros(20)
    for seed in range(3000):
        chosen = {id(row) for row in reservoir(some, 0.25, seed=seed, client="a")}
        seen += [id(row) in chosen for row in some]
    assert seen.sum() == 3000 * 5
    spread = ((seen - 750) ** 2).sum() / (750 * (1 - 0.25)) * 19 / 20
    assert 0.001 < stats.chi2.sf(spread, 19) < 0.999


@given(count=st.integers(0, 30), share=st.floats(0, 1), seed=st.integers(0, 99), shuffle=st.randoms())
def test_the_same_rows_whatever_their_order_and_those_of_a_larger_past(
    count: int, share: float, seed: int, shuffle: object
) -> None:
    some = [Record(client="a", text=str(number)) for number in range(count)]
    found = {row.text for row in reservoir(some, share, seed=seed, client="a")}
    assert len(found) == min(count, -int(-share * count // 1))
    mixed = list(some)
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    assert {row.text for row in reservoir(mixed, share, seed=seed, client="a")} == found
    more = [*some, *(Record(client="a", text=f"later {number}") for number in range(count))]
    later = {row.text for row in reservoir(more, share / 2, seed=seed, client="a")}
    assert not {text for text in later if not text.startswith("later")} - found


def test_another_client_or_seed_draws_other_rows() -> None:
    some = [Record(client="a", text=str(number)) for number in range(50)]
    one = [row.text for row in reservoir(some, 0.2, seed=0, client="a")]
    assert one != [row.text for row in reservoir(some, 0.2, seed=1, client="a")]
    assert one != [row.text for row in reservoir(some, 0.2, seed=0, client="b")]


@given(past=st.integers(0, 40), now=st.integers(1, 40), share=st.sampled_from([0.1, 0.5, 0.75]))
def test_rows_of_the_past_are_a_given_share_of_those_trained_on(past: int, now: int, share: float) -> None:
    some = [Record(client="a", text=str(number)) for number in range(past)]
    again = replayed(some, now, memory=0.5, share=share, seed=3, client="a", period="2018-05")
    assert len(again) == (round(share / (1 - share) * now) if past else 0)
    pool = {row.text for row in reservoir(some, 0.5, seed=3, client="a")}
    times = [sum(row.text == text for row in again) for text in pool]
    assert {row.text for row in again} <= pool
    assert max(times, default=0) - min(times, default=0) <= 1
