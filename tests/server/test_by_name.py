"""Rules joined by name give what each gives alone, and SCAFFOLD's server can be said with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Message, take_client
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import AroundAggregator
from lichen.server.allow_empty import AllowEmpty
from lichen.server.by_name import by_name
from lichen.server.lowrank.lowrank import FedEx
from lichen.server.mean import Mean
from support.flat import closed

ROSTER = 10
SCAFFOLD = by_name({"extra.": Mean("uniform", divisor=float(ROSTER)), "": Mean("examples")})


def message(clients: int = 3) -> Any:
    g = torch.Generator().manual_seed(1)
    ids = torch.arange(clients)
    tensors = {n: torch.randn(clients, 4, generator=g) for n in ("w", "extra.w", "l.lora_B")}
    return Message(group="g", client_C=ids, version_C=ids, tensors=tensors, weight_C=ids.double() + 1)


def only(sent: Any, *names: str) -> Any:
    return replace(sent, tensors={n: sent.tensors[n] for n in names})


class Twice(AroundAggregator):
    """Writes a tensor that is not its own."""

    def before(self, message: Any) -> Any:
        return message

    def close(self, total: Any, shared: Any) -> Any:
        change, metrics = self.inner.close(total, shared)
        return change | Shared({"w": torch.zeros(4)}), metrics


def test_each_rule_gives_what_it_gives_alone() -> None:
    sent = message()
    rule = by_name({"extra.": Mean("uniform"), "lora_B": Mean(scale=30), "": Mean()})
    change, metrics = closed(rule, rule.add(rule.zero(), sent), {})
    for name, alone in (("extra.w", Mean("uniform")), ("l.lora_B", Mean(scale=30)), ("w", Mean())):
        expected, _ = closed(alone, alone.add(alone.zero(), only(sent, name)), {})
        assert torch.equal(change[name], expected[name])
    assert metrics == {
        "clients": 3.0,
        "weight": 6.0,
        **{"extra.clients": 3.0, "extra.weight": 3.0, "lora_B.clients": 3.0, "lora_B.weight": 6.0},
    }
    assert rule.needs == "sum"
    assert by_name({"lora_B": FedEx(1.0), "": Mean()}).needs == "single"


def test_the_server_of_scaffold() -> None:
    """Karimireddy et al., algorithm 1: c ← c + 1/N Σ_S (c_i⁺ − c_i), x ← x + mean over S."""
    sent = message()
    change, _ = closed(SCAFFOLD, SCAFFOLD.add(SCAFFOLD.zero(), sent), {})
    expected = len(sent.client_C) / ROSTER * sent.tensors["extra.w"].double().mean(0)
    torch.testing.assert_close(change["extra.w"], expected, rtol=0, atol=1e-10)
    weight_C = sent.weight_C / sent.weight_C.sum()
    torch.testing.assert_close(change["w"], weight_C @ sent.tensors["w"].double(), rtol=0, atol=1e-10)


def test_a_rule_that_nothing_came_for_is_not_asked() -> None:
    sent = only(message(), "w")
    total = SCAFFOLD.add(SCAFFOLD.zero(), sent)
    # A client of weight 0 sent extra tensors; it might as well have stayed away.
    none = replace(only(take_client(message(), 0), "w", "extra.w"), weight_C=torch.zeros(1, dtype=torch.float64))
    for one in (total, SCAFFOLD.add(total, none), SCAFFOLD.add(total, SCAFFOLD.lift(none))):
        change, metrics = closed(SCAFFOLD, one, {})
        assert change.keys() == {"w"}
        assert metrics == {"clients": 3.0, "weight": 6.0}


def test_goes_into_a_wrapper_and_into_another() -> None:
    sent, shared = message(), {n: torch.zeros(4) for n in ("w", "extra.w", "l.lora_B")}
    nested = AllowEmpty(by_name({"w": SCAFFOLD, "": Mean("uniform")}))
    expected, _ = closed(nested, nested.add(nested.zero(), sent), shared)
    change, metrics = closed(nested, nested.add(nested.zero(), nested.lift(sent)), shared)
    assert all(torch.equal(change[n], x) for n, x in expected.items())
    assert metrics["w.extra.clients"] == 3.0
    assert closed(nested, nested.zero(), shared)[1] == {"clients": 0.0, "weight": 0.0}


def test_refuses_what_has_no_rule_or_two() -> None:
    with pytest.raises(LichenError, match="no rule"):
        by_name({})
    rule = by_name({"extra.": Mean()})
    with pytest.raises(LichenError, match="no rule matches the tensor 'w'"):
        rule.add(rule.zero(), message())
    with pytest.raises(LichenError, match="no client contributed"):
        closed(rule, rule.zero(), {})
    both = by_name({"extra.": AllowEmpty(Mean()), "": Mean()})
    with pytest.raises(LichenError, match="not a total"):
        both.load({}, {"rules": {"other": {}}})
    one = by_name({"extra.": Twice(Mean()), "": Mean()})
    with pytest.raises(LichenError, match="two rules write 'w'"):
        closed(one, one.add(one.zero(), message()), {})
