"""The mean of pairs is the mean of what they unfold to, in whole units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import Shared
from lichen.server.kseed import KSeedOptimizer, SeedSums
from support.flat import closed, updated

K = 6


def pairs(rows: Any, weights: Any) -> Any:
    """Messages of clients that went along these ``(direction, units)``."""
    index_Ct, units_Ct = torch.full((len(rows), 4), -1, dtype=torch.int16), torch.zeros(len(rows), 4, dtype=torch.int32)
    for c, row in enumerate(rows):
        for t, (direction, units) in enumerate(row):
            index_Ct[c, t], units_Ct[c, t] = direction, units
    return Message(
        group="kseed",
        client_C=torch.arange(len(rows)),
        version_C=torch.zeros(len(rows), dtype=torch.int64),
        tensors={"kseed.index": index_Ct, "kseed.units": units_Ct},
        weight_C=torch.tensor(weights, dtype=torch.float64),
    )


row = st.lists(st.tuples(st.integers(0, K - 1), st.integers(-(2**24), 2**24)), max_size=4)


@given(rows=st.lists(st.tuples(row, st.integers(1, 50)), min_size=1, max_size=5))
def test_is_the_weighted_mean_of_the_unfolded_slopes(rows: Any) -> None:
    weights = [w for _, w in rows]
    expected = torch.zeros(K, dtype=torch.float64)
    for listed, weight in rows:
        for direction, units in listed:
            expected[direction] += weight / sum(weights) * units
    rule = SeedSums(K)
    change, told = closed(rule, rule.add(rule.zero(), pairs([r for r, _ in rows], weights)), {})
    assert change["kseed.sums"].dtype == torch.int32
    assert float((change["kseed.sums"] - expected).abs().max()) <= 0.5 + 1e-6
    assert told["clients"] == len(rows)
    assert told["weight"] == sum(weights)
    assert told["directions"] == int((change["kseed.sums"] != 0).sum())


def test_a_direction_gone_along_twice_counts_twice() -> None:
    rule = SeedSums(K)
    change, _ = closed(rule, rule.add(rule.zero(), pairs([[(2, 5), (2, 7), (0, 1)]], [3.0])), {})
    assert change["kseed.sums"].tolist() == [1, 0, 12, 0, 0, 0]


def test_units_add_to_units_without_rounding() -> None:
    server, big = KSeedOptimizer(), 2**31 - 10
    shared = {"kseed.sums": torch.tensor([big, -3], dtype=torch.int32), "patch.w": torch.ones(1)}
    new, state = updated(
        server, {"kseed.sums": torch.tensor([9, 1], dtype=torch.int32)}, server.init(Shared.of_flat(shared)), shared
    )
    assert new["kseed.sums"].tolist() == [2**31 - 1, -2]
    assert new["patch.w"] is shared["patch.w"]
    assert state == {}
    with pytest.raises(LichenError, match="more than 32 bits"):
        updated(server, {"kseed.sums": torch.tensor([10, 0], dtype=torch.int32)}, {}, shared)
    with pytest.raises(LichenError, match="does not fit the seed sums"):
        updated(server, {"w": torch.ones(2)}, {}, shared)


def test_refuses_what_are_no_pairs() -> None:
    rule, message = SeedSums(K), pairs([[(1, 2)]], [1.0])
    with pytest.raises(LichenError, match="no direction 9 among 6"):
        rule.add(rule.zero(), pairs([[(9, 2)]], [1.0]))
    for broken in ({}, {"kseed.index": message.tensors["kseed.index"]}, {**message.tensors, "w": torch.ones(1, 4)}):
        with pytest.raises(LichenError, match="of one shape"):
            rule.add(rule.zero(), replace(message, tensors=broken))
    with pytest.raises(LichenError, match="no client contributed"):
        closed(rule, rule.zero(), {})
    with pytest.raises(LichenError, match="directions"):
        closed(rule, rule.add(rule.zero(), message), {"kseed.sums": torch.zeros(K + 1, dtype=torch.int32)})
    for bad in ({"count": 0}, {"count": 3, "weighting": "age"}):
        with pytest.raises(LichenError):
            SeedSums(**bad)
