"""When rows were written: dates, months, years and numbers."""

from __future__ import annotations

import pytest

from lichen.core.errors import LichenError
from lichen.data.periods.moments import Moment, moment_of, moments_of


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1790", Moment(1790)),
        ("17.5", Moment(17, rest=0.5)),
        ("-3", Moment(-3)),
        ("2018-05", Moment(2018, 5)),
        (" 2018-05-03 ", Moment(2018, 5, 3)),
        ("20180503", Moment(2018, 5, 3)),
        ("2018-05-03T01:00:02Z", Moment(2018, 5, 3, 3602.0)),
        ("2018-05-03 01:00:00+02:00", Moment(2018, 5, 2, 23 * 3600.0)),
        ("20181340", Moment(20181340)),
        ("2018-13", None),
        ("03/05/2018", None),
        ("soon", None),
        ("1e400", None),
        ("0001-01-01T00:00:00+10:00", None),
    ],
)
def test_a_text_names_a_moment_or_none(text: str, moment: Moment | None) -> None:
    assert moment_of(text) == moment


def test_a_row_without_a_date_is_named_by_its_number() -> None:
    with pytest.raises(LichenError, match="row 2 says not when it was written, nor do 1 others of 4") as caught:
        moments_of(["2018", "", "2019", " "])
    assert caught.value.where == "data.columns.time"
    with pytest.raises(LichenError, match="no row says when"):
        moments_of(["", ""])
    with pytest.raises(LichenError, match="row 3 has '12/04/2018', which is no date"):
        moments_of(["2018", "2019", "12/04/2018"])
