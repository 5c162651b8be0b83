"""Lifted messages: the plain formula's integers, a limit that the client keeps, and a server that counts.

Legend: C clients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Message, is_lifted, pack_message, take_client, unpack_message
from lichen.server.lowrank.lowrank import FedIT
from lichen.server.mean import Mean
from lichen.server.sums.fixed_point import read_sums
from support.flat import closed


def message(x_C: Any, weights: Any) -> Any:
    ids = torch.arange(len(weights))
    weight_C = torch.tensor(weights, dtype=torch.float64)
    return Message(group="g", client_C=ids, version_C=ids, tensors={"x": torch.tensor(x_C)}, weight_C=weight_C)


def test_is_the_plain_formula_in_integers() -> None:
    sent = message([[0.1, -3.0], [float("nan"), 1.0], [1e-13, 2.5]], [2.0, 0.0, 1 / 3])
    lifted = Mean().lift(sent)
    third = round(2**30 / 3)
    x = sent.tensors["x"].tolist()
    assert lifted.tensors["x"].tolist() == [
        [round(2 * v * 2**40) for v in x[0]],
        [0, 0],
        [round(third / 2**30 * v * 2**40) for v in x[2]],
    ]
    assert lifted.tensors["lifted/40/52"].tolist() == [[2 * 2**30, 1], [0, 0], [third, 1]]
    assert (is_lifted(lifted), is_lifted(sent)) == (True, False)
    again = unpack_message(pack_message(lifted))
    assert all(torch.equal(again.tensors[name], x_C) for name, x_C in lifted.tensors.items())
    assert torch.equal(again.client_C, sent.client_C)


def test_the_server_sees_nothing_of_one_masked_message_and_everything_of_their_sum() -> None:
    mean, g = Mean(), torch.Generator().manual_seed(3)
    sent = message([[1.0, 2.0], [3.0, -5.0]], [1.0, 3.0])
    lifted = mean.lift(sent)
    mask = {n: torch.randint(-(2**63), 2**63 - 1, x.shape[1:], generator=g) for n, x in lifted.tensors.items()}
    masked = replace(
        lifted, tensors={n: torch.stack([x[0] + mask[n], x[1] - mask[n]]) for n, x in lifted.tensors.items()}
    )
    first = mean.add(mean.zero(), take_client(masked, 0))
    assert (first.weight, first.count) != (2**30, 1)
    assert float((read_sums(first)["x"] - sent.tensors["x"][0]).abs().min()) > 1.0
    both = mean.add(first, take_client(masked, 1))
    assert (both.weight, both.count, both.lifted) == (4 * 2**30, 2, 2)
    plain = mean.add(mean.zero(), sent)
    assert torch.equal(both.units_N, plain.units_N)
    assert closed(mean, both, {})[0]["x"].tolist() == [2.5, -3.25]


def test_raw_and_lifted_messages_share_a_sum() -> None:
    mean, sent = Mean(), message([[1.0], [2.0], [4.0]], [1.0, 2.0, 3.0])
    total = mean.add(mean.zero(), mean.lift(take_client(sent, 0)))
    total = mean.add(total, take_client(sent, 1))
    total = mean.merge(mean.add(mean.zero(), take_client(sent, 2)), total)
    assert closed(mean, total, {}) == closed(mean, mean.add(mean.zero(), sent), {})


def test_a_client_refuses_what_is_past_the_limit() -> None:
    mean = Mean(scale=40, lift_bits=42)
    mean.lift(message([[3.99]], [1.0]))
    with pytest.raises(LichenError, match=r"client 1: 'x' is past the limit of 42 bits at 40"):
        mean.lift(message([[1.0], [4.0]], [1.0, 1.0]))
    with pytest.raises(LichenError, match="'weight' is past the limit"):
        mean.lift(message([[0.0]], [2.0**12]))
    with pytest.raises(LichenError, match="'x' is not finite"):
        mean.lift(message([[float("nan")]], [1.0]))
    with pytest.raises(LichenError, match="weight -1"):
        mean.lift(message([[1.0]], [-1.0]))
    with pytest.raises(LichenError, match="weight nan is not"):
        mean.lift(mean.lift(message([[1.0]], [1.0])))


def test_the_server_refuses_more_clients_than_64_bits_hold() -> None:
    mean = Mean(lift_bits=60)
    one = mean.lift(message([[0.5]], [1.0]))
    total = mean.zero()
    for _ in range(8):  # 8 (2^60 - 1) < 2^63
        total = mean.add(total, one)
    with pytest.raises(LichenError, match="past the 64-bit range"):
        mean.add(total, one)
    with pytest.raises(LichenError, match="past the 64-bit range"):
        mean.merge(total, total)


def test_refuses_another_grid_other_numbers_and_rules_that_take_none() -> None:
    lifted = Mean().lift(message([[0.5]], [1.0]))
    for other in (Mean(scale=36), Mean(lift_bits=50)):
        with pytest.raises(LichenError, match="lifted/40/52"):
            other.add(other.zero(), lifted)
    with pytest.raises(LichenError, match="takes int64"):
        Mean().add(Mean().zero(), replace(lifted, tensors={n: x.double() for n, x in lifted.tensors.items()}))
    first = Mean().add(Mean().zero(), lifted)
    with pytest.raises(LichenError, match="differ in tensors"):
        Mean().add(first, replace(lifted, tensors={"y" if n == "x" else n: x for n, x in lifted.tensors.items()}))
    for rule in (FedIT(), FedIT("uniform")):
        with pytest.raises(LichenError, match="weight nan"):
            rule.add(rule.zero(), lifted)
        with pytest.raises(LichenError, match="needs single messages"):
            rule.lift(message([[0.5]], [1.0]))


def test_a_message_without_tensors_adds_nothing() -> None:
    bare = replace(message([[1.0]], [1.0]), tensors={})
    assert Mean().add(Mean().zero(), Mean().lift(bare)).units_N is None
    assert Mean().add(Mean().zero(), bare).units_N is None
