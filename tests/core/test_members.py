"""The roster: what clients declare is kept to the letter, and every lie is one clear error."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.roster import MOST_LETTERS, PARTS, Member, Roster, declared_name

WARD = Member(name="ward-3", rows={"train": 40, "test": 10}, labels={"yes": 30, "no": 10}, capacity=(4, None))
SHOP = Member(name="Łódź, left", rows={"train": 0, "valid": 2}, group="tokens")
ROSTER = Roster((WARD, SHOP))


def test_everything_decided_by_rows_reads_the_roster() -> None:
    assert len(ROSTER) == 2
    assert ROSTER.names == ("ward-3", "Łódź, left")
    assert [ROSTER.rows(part) for part in PARTS] == [(40, 0), (0, 2), (10, 0)]
    assert torch.equal(ROSTER.rows_N("train"), torch.tensor([40.0, 0.0], dtype=torch.float64))
    assert ROSTER.labels() == {"yes": 30, "no": 10}
    assert (ROSTER[1], *ROSTER) == (SHOP, WARD, SHOP)


def test_what_json_wrote_is_the_same_roster() -> None:
    again = Roster.load(json.loads(json.dumps(ROSTER.dump())))
    assert again == ROSTER
    assert again[0].capacity == (4, None)
    assert again.digest() == ROSTER.digest() == Roster.load(ROSTER.dump()).digest()


@pytest.mark.parametrize("other", [(SHOP, WARD), (WARD,), (replace(WARD, rows={"train": 41}), SHOP)])
def test_other_clients_have_another_digest(other: tuple[Member, ...]) -> None:
    assert Roster(other).digest() != ROSTER.digest()


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "negative rows": ({"rows": {"train": -1}}, "train rows of 'ward-3' is -1"),
    "rows that are no number": ({"rows": {"train": float("nan")}}, "is nan"),
    "half a row": ({"rows": {"train": 2.5}}, "is 2.5, and no whole number"),
    "rows that are a truth": ({"rows": {"train": True}}, "is True"),
    "more rows than there are": ({"rows": {"train": 1 << 60}}, "and no whole number from 0 to"),
    "an unknown part": ({"rows": {"secret": 1}}, "rows for 'secret', which is none of train, valid, test"),
    "rows that are no mapping": ({"rows": [1, 2]}, "not counts by name"),
    "no name": ({"name": ""}, "a client has no name"),
    "a name with an escape": ({"name": "a\x1b[31mb"}, r"is no name"),
    "a name of two lines": ({"name": "a\nb"}, "is no name"),
    "a name that turns around": ({"name": "a\u202eb"}, "is no name"),
    "a name of 10,000 letters": ({"name": "a" * 10_000}, "at most 200 letters"),
    "a name that is a number": ({"name": 7}, "is no name"),
    "a label with an escape": ({"labels": {"\x1b": 1}}, "a label of 'ward-3'"),
    "labels that are no number": ({"labels": {"yes": float("nan")}}, "with label 'yes' is nan"),
    "endless labels": ({"labels": {"yes": float("inf")}}, "with label 'yes' is inf"),
    "very many labels": ({"labels": {str(i): 1 for i in range((1 << 16) + 1)}}, "has 65,537 labels"),
    "a long group": ({"group": "g" * 10_000}, "the group of 'ward-3'"),
    "a capacity that is a list": ({"capacity": [[1]]}, "the capacity of 'ward-3'"),
    "an endless capacity": ({"capacity": float("inf")}, "the capacity of 'ward-3' is inf"),
    "a nested capacity": ({"capacity": ((1,),)}, "the capacity of 'ward-3'"),
    "one field more": ({"secret": 1}, "a client is declared by name, rows"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_clear_error(lie: str) -> None:
    changes, message = LIES[lie]
    with pytest.raises(LichenError, match=message) as told:
        Member.load({**WARD.dump(), **changes})
    assert told.value.where == "roster"
    assert told.value.fix
    assert len(str(told.value)) < 3000
    assert "\x1b" not in str(told.value)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (None, "is no roster"),
        ({"format": 2, "members": []}, "is no roster of format 1"),
        ({"format": 1}, "a roster is a list of 1"),
        ({"format": 1, "members": []}, "a roster is a list of 1"),
        ({"format": 1, "members": [7]}, "a client is declared by name, rows"),
        ({"format": 1, "members": [{"rows": {}}]}, "a client is declared by name, rows"),
        ({"format": 1, "members": [WARD.dump(), WARD.dump()]}, "two clients have the name 'ward-3'"),
    ],
)
def test_what_is_no_roster_is_told(plain: object, message: str) -> None:
    with pytest.raises(LichenError, match=message):
        Roster.load(plain)


def test_very_many_members_of_nothing_are_refused_in_a_moment() -> None:
    start = time.perf_counter()
    with pytest.raises(LichenError, match="none of 100,000 clients has a row"):
        Roster.load({"format": 1, "members": [{"name": f"{i}", "rows": {}} for i in range(100_000)]})
    with pytest.raises(LichenError, match="a roster is a list of 1 to 10,000,000"):
        Roster.load({"format": 1, "members": [{}] * 10_000_001})
    assert time.perf_counter() - start < 10


def test_a_part_that_is_none_is_told() -> None:
    with pytest.raises(LichenError, match="'tset' is none of"):
        ROSTER.rows_N("tset")


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_name_can_be_declared(name: str) -> None:
    told = declared_name(name)
    assert len(told) <= MOST_LETTERS
    assert Member(name=told, rows={}).name == told
    assert declared_name(told) == told


def test_names_that_differ_stay_apart() -> None:
    names = ["a" * 10_000, "a" * 9_999, "a" * 9_999 + "b", "\x1b", "\\x1b", "", "a\nb", "a\tb"]
    assert len({declared_name(name) for name in names}) == len(names)
    assert declared_name("a" * MOST_LETTERS) == "a" * MOST_LETTERS


@given(
    st.recursive(
        st.none() | st.floats() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
@settings(max_examples=200, deadline=None)
def test_nothing_else_than_an_error_comes_of_nonsense(plain: object) -> None:
    for value in (plain, {"format": 1, "members": plain}, {"format": 1, "members": [plain]}):
        with pytest.raises(LichenError):
            Roster.load(value)
