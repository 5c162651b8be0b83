"""Who gains and who is harmed: shares, spread, and tests that know nothing where there is nothing to know."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.present.charts.card_terms import whose_text
from lichen.present.clients import client_rows, clients_csv, read_clients
from lichen.present.gains import gains_of, gains_text, harmed_below

PAIRS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(1, 500)), min_size=1, max_size=8)


@given(pairs=PAIRS, higher=st.booleans())
def test_shares_and_gains_are_those_of_the_pairs(pairs: list[tuple[float, float, int]], higher: bool) -> None:
    alone, joined, rows = map(list, zip(*pairs, strict=True))
    gain = gains_of({"alone": alone, "federated": joined}, rows, higher_is_better=higher)["federated"]["alone"]
    gains = [(1 if higher else -1) * (b - a) for a, b in zip(alone, joined, strict=True)]
    assert gain["clients"] == len(gains)
    assert gain["gaining"] == sum(x > 0 for x in gains) / len(gains)
    assert gain["harmed"] == sum(x < 0 for x in gains) / len(gains)
    assert gain["mean"] == pytest.approx(statistics.mean(gains), abs=1e-12)
    assert gain["least"] == min(gains)
    assert gain["p"] is None or 0 <= gain["p"] <= 1
    assert (gain["p"] is None) == (len(gains) < 3 or not any(gains))
    other_way = gains_of({"alone": joined, "federated": alone}, rows, higher_is_better=higher)["federated"]["alone"]
    assert (other_way["gaining"], other_way["harmed"]) == (gain["harmed"], gain["gaining"])
    assert f"of {len(gains)} gain" in gains_text(gain)


def test_small_clients_that_gain_most_are_seen() -> None:
    rows, alone = [10, 20, 40, 80, 160, 320], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    found = gains_of({"alone": alone, "federated": [0.7] * 6}, rows, higher_is_better=True)["federated"]["alone"]
    assert found["by_rows"] == pytest.approx(-1.0)
    assert found["spread"] == 0
    assert found["p"] < 0.1


def test_who_has_no_score_is_in_no_comparison() -> None:
    scores = {"base": [math.nan, 0.5, 0.5], "alone": [math.nan] * 3, "federated": [0.1, 0.6, math.inf]}
    found = gains_of(scores, (), higher_is_better=True)
    assert found.keys() == {"federated"}
    assert found["federated"].keys() == {"base"}
    assert found["federated"]["base"]["clients"] == 1
    assert found["federated"]["base"]["spread"] is None
    assert gains_of({"federated": [0.5], "pooled": [0.1]}, (), higher_is_better=True) == {}


def test_a_personal_column_is_held_against_the_same() -> None:
    scores = {"alone": [0.5, 0.5], "federated": [0.4, 0.6], "personal": [0.6, 0.7]}
    found = gains_of(scores, (), higher_is_better=True)
    assert found["personal"]["alone"]["harmed"] == 0
    assert found["federated"]["alone"]["harmed"] == 0.5


def test_the_harmed_are_named_in_the_file(tmp_path: Path) -> None:
    scores = {"base": [9.0, 2.0], "alone": [3.0, 1.5], "federated": [4.0, 2.5]}
    rows = client_rows(["ada", "=bo"], [], scores, higher_is_better=False)
    assert [row["harmed"] for row in rows] == ["alone", "base alone"]
    (tmp_path / "clients.csv").write_text(clients_csv(rows), encoding="utf-8")
    assert [row["harmed"] for row in read_clients(tmp_path)] == ["alone", "base alone"]
    assert harmed_below({"federated": 1.0, "alone": None}, higher_is_better=False) == ""
    better = client_rows(["ada"], [], {"alone": [3.0], "federated": [2.0]}, higher_is_better=False)
    assert better[0]["harmed"] is None


def test_a_card_says_what_owners_gave_and_got_and_names_none() -> None:
    scores = {"alone": [0.5, 0.5, 0.7, 0.2], "federated": [0.6, 0.4, 0.9, 0.9]}
    gains = gains_of(scores, (), higher_is_better=True)
    text = whose_text({"gains": gains}, (3.0, 1.0, -0.5, 1.0), 2)
    assert "3 of 4 clients score better with it than with `alone`, 1 worse." in text
    assert "gave most has 60 %" in text
    assert "half of them at least 20.0 %" in text
    assert "1 have made the model worse" in text
    assert "2 owners can claim it" in text
    assert whose_text({}, (), 0) == ""
    assert whose_text({}, (0.0, -1.0), 0) == ""  # nobody gave anything that could be shared out
