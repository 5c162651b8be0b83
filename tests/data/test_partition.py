"""Partition and split: every row once, groups whole, no text of training in what measures it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.data.partition import by_client, dirichlet, iid, normalise, split
from lichen.data.records import Record


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=12, max_size=120),
    clients=st.integers(1, 6),
    alpha=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 100.0]),
    least=st.integers(0, 2),
    seed=st.integers(0, 2**40),
)
def test_dirichlet_deals_every_row_once(labels: list[int], clients: int, alpha: float, least: int, seed: int) -> None:
    parts = dirichlet(labels, clients=clients, alpha=alpha, seed=seed, min_examples=least)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert min(len(part) for part in parts) >= least
    again = dirichlet(labels, clients=clients, alpha=alpha, seed=seed, min_examples=least)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), clients=st.integers(1, 20), seed=st.integers(0, 99))
def test_iid_deals_every_row_once_and_evenly(n: int, clients: int, seed: int) -> None:
    if n < clients:
        with pytest.raises(LichenError, match="too few"):
            iid(n, clients=clients, seed=seed)
        return
    parts = iid(n, clients=clients, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_small_alpha_is_more_skewed_than_large() -> None:
    labels = np.repeat(np.arange(10), 100)

    def top_share(alpha: float) -> float:
        parts = dirichlet(labels, clients=10, alpha=alpha, seed=3)
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert top_share(0.05) > 0.5 > 0.2 > top_share(100.0)


def test_dirichlet_seeds_differ_and_bad_input_is_told() -> None:
    labels = list(range(5)) * 20
    one, two = (dirichlet(labels, clients=4, alpha=1.0, seed=s) for s in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(LichenError, match=r"data\.alpha"):
        dirichlet(labels, clients=4, alpha=0.0, seed=0)
    with pytest.raises(LichenError, match="too few"):
        dirichlet(labels, clients=4, alpha=1.0, seed=0, min_examples=26)


rows = st.lists(
    st.builds(
        lambda text, group: Record(client="a", text=text, group=group),
        st.text(alphabet="abC ,.", min_size=1, max_size=4),
        st.sampled_from(["", "g1", "g2", "g3", "g4"]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(records=rows, by=st.sampled_from(["group", "row"]), seed=st.integers(0, 999))
def test_split_keeps_groups_whole_and_train_texts_out(records: list[Record], by: str, seed: int) -> None:
    parts = split(records, valid=0.2, test=0.2, seed=seed, by=by)  # type: ignore[arg-type]
    train, valid, test = parts
    learned = {normalise(r.text) for r in train}
    assert not learned & {normalise(r.text) for r in valid + test}
    assert sum(map(len, parts)) <= len(records)
    assert all(any(r is q for q in records) for part in parts for r in part)
    assert bool(train) == bool(records)
    if by == "group":
        groups = [{r.group for r in part if r.group} for part in parts]
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]


def test_split_shares_are_met_and_reproducible() -> None:
    records = [Record(client="a", text=f"word{i}", group=f"g{i // 2}") for i in range(200)]
    train, valid, test = split(records, valid=0.1, test=0.2, seed=1)
    assert (len(train), len(valid), len(test)) == (140, 20, 40)
    assert split(records, valid=0.1, test=0.2, seed=1) == (train, valid, test)
    assert split(records, valid=0.1, test=0.2, seed=2) != (train, valid, test)
    assert split(records, valid=0.0, test=0.0, seed=1) == (records, [], [])


def test_split_gives_small_clients_something_to_measure() -> None:
    records = [Record(client="a", text=t) for t in ("one", "two", "three")]
    assert [len(part) for part in split(records, valid=0.1, test=0.1, seed=0, by="row")] == [1, 1, 1]
    assert [len(part) for part in split(records[:1], valid=0.1, test=0.1, seed=0, by="row")] == [1, 0, 0]
    with pytest.raises(LichenError, match=r"data\.split"):
        split(records, valid=0.5, test=0.5, seed=0)


def test_pairs_keep_short_answers_that_texts_would_drop() -> None:
    records = [Record(client="a", prompt=f"question {i}", text="yes", group=f"g{i}") for i in range(10)]
    assert [len(p) for p in split(records, valid=0.2, test=0.2, seed=0)] == [6, 0, 0]
    assert [len(p) for p in split(records, valid=0.2, test=0.2, seed=0, duplicates="pair")] == [6, 2, 2]


def test_split_pictures_are_copies_by_their_pixels() -> None:
    same, other = np.zeros((1, 2, 2), np.float32), np.ones((1, 2, 2), np.float32)
    records = [Record(client="", features=x, label=0) for x in (same, same, same, other)]
    train, _, test = split(records, valid=0.0, test=0.25, seed=0, by="row")
    assert [r.features is same for r in train] == [True] * 3
    assert [r.features is other for r in test] == [True]


def test_by_client_is_sorted_and_complete() -> None:
    found = by_client([Record(client=c, text="x") for c in "cabac"])
    assert {c: rows.tolist() for c, rows in found.items()} == {"a": [1, 3], "b": [2], "c": [0, 4]}
    assert list(found) == ["a", "b", "c"]
