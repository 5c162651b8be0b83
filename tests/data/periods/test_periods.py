"""The periods that rows make."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.data.periods.lengths import Length, length_of
from lichen.data.periods.periods import MAX_PERIODS, cut


@pytest.mark.parametrize(
    ("by", "length"),
    [
        ("month", Length(1, "month")),
        ("3 months", Length(3, "month")),
        ("20 years", Length(20, "year")),
        ("500 rows", Length(500, "row")),
        ("7 days", Length(7, "day")),
        ("0 rows", None),
        ("fortnight", None),
        ("1.5 years", None),
        ("", None),
    ],
)
def test_lengths_of_known_form(by: str, length: Length | None) -> None:
    assert length_of(by) == length


def test_periods_have_names_and_begin_where_all_data_have_them_begin() -> None:
    times = ["1805-03-01", "1790-01-08", "1819", "1820"]
    found, waiting = cut(times, Length(20, "year"))
    assert [(one.name, one.rows.tolist()) for one in found] == [
        ("1780-1799", [1]),
        ("1800-1819", [0, 2]),
        ("1820-1839", [3]),
    ]
    assert waiting == 0
    months = ["2018-12-31T23:59:59Z", "2019-01-01", "2018-11"]
    assert [one.name for one in cut(months, Length(1, "month"))[0]] == ["2018-11", "2018-12", "2019-01"]
    assert [one.name for one in cut(months, Length(3, "month"))[0]] == ["2018-10-to-2018-12", "2019-01-to-2019-03"]
    days = ["2018-05-03", "2018-05-04T10:00"]
    assert [one.name for one in cut(days, Length(1, "day"))[0]] == ["2018-05-03", "2018-05-04"]


def test_a_period_of_days_may_end_after_the_calendar_does() -> None:
    assert [one.name for one in cut(["2018-05-03"], Length(9_999_999, "day"))[0]] == ["0001-01-01-to-9999-12-31"]
    assert cut(["9999-12-31"], Length(7, "day"))[0][0].name == "9999-12-26-to-9999-12-31"


def test_rows_come_in_the_order_of_their_dates_and_the_rest_waits() -> None:
    found, waiting = cut(["3", "1", "2", "5", "4"], Length(2, "row"))
    assert [(one.name, one.rows.tolist()) for one in found] == [
        ("rows-0000001-0000002", [1, 2]),
        ("rows-0000003-0000004", [0, 4]),
    ]
    assert waiting == 1
    assert [one.rows.tolist() for one in cut([""] * 4, Length(2, "row"))[0]] == [[0, 1], [2, 3]]


def test_numbers_make_no_months_and_too_many_periods_are_refused() -> None:
    with pytest.raises(LichenError, match="row 1 has '1790', which names no month"):
        cut(["1790"], Length(1, "month"))
    with pytest.raises(LichenError, match="row 1 has '1790-01', which names no day"):
        cut(["1790-01"], Length(1, "day"))
    with pytest.raises(LichenError, match="at most are trained"):
        cut([str(number) for number in range(MAX_PERIODS + 1)], Length(1, "year"))


DATES = st.dates().map(lambda day: day.isoformat())


@given(times=st.lists(DATES, min_size=1, max_size=30), later=st.dates(), unit=st.sampled_from(["month", "year"]))
def test_later_rows_leave_earlier_periods_as_they_were(times: list[str], later: object, unit: str) -> None:
    length = Length(7, unit)  # type: ignore[arg-type]
    try:
        before, _ = cut(times, length)
    except LichenError:
        return
    assert sorted(np.concatenate([one.rows for one in before]).tolist()) == list(range(len(times)))
    after = {one.name: one.rows.tolist() for one in cut([*times, str(later)], length)[0]}
    changed = [one.name for one in before if after[one.name] != one.rows.tolist()]
    assert len(changed) <= 1
    for name in changed:
        assert after[name][:-1] == next(one.rows.tolist() for one in before if one.name == name)
