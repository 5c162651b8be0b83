"""Robust rules give what byzfl gives and what plain loops give, whatever order rows come in and wherever they lie.

Legend: C clients, N numbers.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message, take_client
from lichen.core.tree import Tree, digest
from lichen.core.wire.shared import Shared
from lichen.server.robust import choices, gram
from lichen.server.robust import rows as store
from lichen.server.robust.robust import Robust
from lichen.server.robust.table import ROBUST as EVERY

ROBUST = {name: rule for name, rule in EVERY.items() if rule.looks_at != "reference"}
"""Those that need no change of the server's own."""

BYZFL = json.loads(Path(__file__).with_name("byzfl_vectors.json").read_text(encoding="utf-8"))
STARTS = {"radius": 1.5, "iterations": 4}


def of(x_C: Tree, *, clients: Any = None, versions: Any = None) -> Message:
    count = len(next(iter(x_C.values())))
    return Message(
        group="g",
        client_C=torch.arange(count) if clients is None else torch.tensor(clients),
        version_C=torch.zeros(count, dtype=torch.int64) if versions is None else torch.tensor(versions),
        tensors=x_C,
        weight_C=torch.ones(count, dtype=torch.float64),
    )


def closed(aggregator: Any, message: Message, shared: Tree | None = None) -> tuple[Tree, dict[str, float]]:
    change, metrics = aggregator.close(aggregator.add(aggregator.zero(), message), Shared(shared or {}))
    return change.trainable, metrics


def answer(aggregator: Any, x_CN: Tensor) -> Tensor:
    return closed(aggregator, of({"x": x_CN}))[0]["x"]


def rule(name: str, liars: int = 2, **more: Any) -> Robust:
    options = {key: STARTS[key] for key in ROBUST[name].reads if key in STARTS}
    return Robust(name, **{"liars": liars, **options, **more})


def rows(clients: int, numbers: int, seed: int, liars: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x_CN = torch.randn(clients, numbers, generator=g, dtype=torch.float64)
    x_CN[:liars] = 4 * x_CN[:liars] + 2
    return x_CN


def near(one: Any, other: Any) -> bool:
    return torch.allclose(torch.as_tensor(one).double(), torch.as_tensor(other).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", range(len(BYZFL["rounds"])))
def test_gives_what_byzfl_gives(place: int) -> None:
    there = BYZFL["rounds"][place]
    x_CN, liars = torch.tensor(there["rows"], dtype=torch.float64), BYZFL["liars"]
    inner = x_CN @ x_CN.T
    assert near(answer(rule("median"), x_CN), there["median"])
    assert near(answer(rule("trimmed_mean"), x_CN), there["trimmed_mean"])
    assert near(answer(rule("geometric_median", iterations=3, smoothing=0.1), x_CN), there["geometric_median"])
    assert near(answer(rule("centred_clipping"), x_CN), there["centred_clipping"])
    assert near(choices.mixing_CC(inner, liars) @ x_CN, there["nnm"])
    # byzfl sums over the n - f - 1 nearest others where Krum's paper has n - f - 2: that is the paper's rule at f - 1.
    assert near(answer(rule("krum", liars - 1), x_CN), there["krum"])
    best = choices.scores_C(inner, len(x_CN) - liars - 1).argsort()[: len(x_CN) - liars]
    assert near(x_CN[best].mean(0), there["multi_krum"])


def slow(name: str, x: list[list[float]], f: int) -> list[float]:
    """Every rule in plain loops."""
    n = len(x)

    def distance(a: list[float], b: list[float]) -> float:
        return math.sqrt(sum((u - v) ** 2 for u, v in zip(a, b, strict=True)))

    def mean(some: list[list[float]]) -> list[float]:
        return [sum(column) / len(some) for column in zip(*some, strict=True)]

    def brought(a: list[float], radius: float) -> list[float]:
        norm = math.sqrt(sum(u * u for u in a))
        return [u * min(1.0, radius / norm) for u in a]

    scores = [sum(sorted(distance(x[i], x[j]) ** 2 for j in range(n) if j != i)[: n - f - 2]) for i in range(n)]
    by_score = sorted(range(n), key=lambda i: scores[i])
    if name == "krum":
        return x[by_score[0]]
    if name == "multi_krum":
        return mean([x[i] for i in by_score[: n - f]])
    if name == "median":
        middle = [sorted(column) for column in zip(*x, strict=True)]
        return [(column[(n - 1) // 2] + column[n // 2]) / 2 for column in middle]
    if name == "trimmed_mean":
        return [sum(sorted(column)[f : n - f]) / (n - 2 * f) for column in zip(*x, strict=True)]
    if name == "norm_bound":
        return mean([brought(row, STARTS["radius"]) for row in x])
    point = [0.0] * len(x[0])
    for _ in range(int(STARTS["iterations"])):
        if name == "centred_clipping":
            off = [brought([u - v for u, v in zip(row, point, strict=True)], STARTS["radius"]) for row in x]
            point = [u + v for u, v in zip(point, mean(off), strict=True)]
        else:
            pull = [1 / max(distance(row, point), 1e-6) for row in x]
            point = [
                sum(p * u for p, u in zip(pull, column, strict=True)) / sum(pull) for column in zip(*x, strict=True)
            ]
    return point


def slow_mixed(x: list[list[float]], f: int) -> list[list[float]]:
    mixed = []
    for row in x:
        nearest = sorted(x, key=lambda other: sum((u - v) ** 2 for u, v in zip(row, other, strict=True)))
        mixed.append([sum(column) / (len(x) - f) for column in zip(*nearest[: len(x) - f], strict=True)])
    return mixed


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize(("name", "clients"), itertools.product(ROBUST, (8, 11)))
def test_gives_what_plain_loops_give(name: str, clients: int, mixing: bool) -> None:
    x_CN = rows(clients, 5, seed=clients)
    x = slow_mixed(x_CN.tolist(), 2) if mixing else x_CN.tolist()
    assert near(answer(rule(name, mixing=mixing), x_CN), slow(name, x, 2))


def test_norm_bound_without_a_radius_takes_the_median_norm() -> None:
    x_CN = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-8.0, 0.0]])
    change, metrics = closed(Robust("norm_bound", liars=1), of({"x": x_CN}))
    assert near(change["x"], torch.tensor([1 / 3 - 2 / 3, 2 / 3]))
    assert metrics == {"clients": 3.0, "shortened": 1.0}


@pytest.mark.parametrize("name", [name for name in ROBUST if name != "norm_bound"])
@pytest.mark.parametrize("mixing", [False, True])
def test_a_row_of_a_billion_times_the_norm_leads_nowhere(name: str, mixing: bool) -> None:
    honest_CN = rows(9, 40, seed=1, liars=0) * 1e-3 + 1
    far_CN = honest_CN.clone()
    far_CN[4] *= -1e9
    member = rule(name, 1, mixing=mixing)
    moved = answer(member, far_CN) - honest_CN.mean(0)
    assert float(moved.abs().max()) < (2.0 if name == "centred_clipping" else 0.01)
    without = torch.cat([honest_CN[:4], honest_CN[5:]])
    if name == "krum" and not mixing:
        scores = [float((without - row).square().sum(1).sort().values[1:7].sum()) for row in without]
        assert torch.equal(answer(member, far_CN), without[scores.index(min(scores))])


def test_who_is_chosen_does_not_depend_on_how_far_a_liar_is() -> None:
    x_CN = rows(9, 300, seed=3, liars=0)
    x_CN[1:] = x_CN[1:] * 1e-4 + 5
    chosen = []
    for far in (1e2, 1e9):
        x_CN[0] = far * torch.ones(300, dtype=torch.float64)
        inner = x_CN @ x_CN.T
        chosen.append((choices.krum(inner, 1), choices.multi_krum(inner, 1) > 0, choices.mixing_CC(inner, 1)[1:]))
    assert all(torch.equal(one, other) for one, other in zip(*chosen, strict=True))
    assert not bool(chosen[0][1][0])


def test_weights_are_not_believed_and_late_rows_count_by_their_discount() -> None:
    x_CN = rows(5, 3, seed=4).float()
    message = of({"x": x_CN})
    plain = closed(Robust("median"), message)[0]
    loud = Message(
        group="g",
        client_C=message.client_C,
        version_C=message.version_C,
        tensors=message.tensors,
        weight_C=torch.tensor([1e6, 1, 1, 1, 1]).double(),
    )
    assert digest(closed(Robust("median"), loud)[0]) == digest(plain)
    member = Robust("median")
    late = member.add(member.zero(), message, torch.tensor([1.0, 0.5, 0.25, 1.0, 1.0]))
    rows_C = x_CN * torch.tensor([[1.0], [0.5], [0.25], [1.0], [1.0]])
    assert near(member.close(late, Shared())[0].trainable["x"], rows_C.median(0).values)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("memory", [0, 900])
def test_rows_in_a_file_give_the_same_bytes(name: str, memory: int) -> None:
    message = of({"a": rows(9, 30, 5).float().view(9, 5, 6), "b": rows(9, 7, 6)}, clients=[8, 1, 5, 2, 7, 0, 3, 6, 4])
    shared = {"a": torch.zeros(5, 6), "b": torch.zeros(7)}
    inside, outside = rule(name), rule(name, memory=memory)
    whole = closed(inside, message, shared)
    left, right = outside.zero(), outside.zero()
    for k in range(9):
        left, right = (outside.add(left, take_client(message, k)), right) if k % 2 else (
            left, outside.add(right, take_client(message, k))
        )  # fmt: skip
    early = outside.merge(right, left)
    before = outside.close(early, Shared(shared))
    more = outside.add(early, of({"a": torch.ones(1, 5, 6), "b": torch.ones(1, 7).double()}, clients=[50]))
    assert early.resident <= memory
    assert outside.merge(left, right).resident <= memory
    assert outside.clients(more) == 10
    for change, metrics in (before, outside.close(early, Shared(shared))):
        assert (digest(change.trainable), metrics) == (digest(whole[0]), whole[1])
    crossed = outside.load(*outside.dump(early))
    assert digest(outside.close(crossed, Shared(shared))[0].trainable) == digest(whole[0])


def test_columns_in_several_stretches_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x_CN = rows(9, 1000, 8)
    for name in ROBUST:
        monkeypatch.setattr(store, "_BLOCK", 2**22)
        whole = answer(rule(name), x_CN)
        monkeypatch.setattr(store, "_BLOCK", 9 * 130)
        assert near(answer(rule(name), x_CN), whole)


def test_too_few_clients_make_no_step() -> None:
    for name, known in ROBUST.items():
        member = rule(name, 1)
        least = known.least(1)
        change, metrics = closed(member, of({"x": rows(least - 1, 3, 0)}))
        assert (change, metrics) == ({}, {"clients": least - 1.0, "too_few": 1.0})
        change, metrics = closed(member, of({"x": rows(least, 3, 0)}))
        assert change.keys() == {"x"}
        assert "too_few" not in metrics


def test_refuses_what_is_no_round() -> None:
    member = Robust("median")
    x = {"x": torch.ones(3, 2)}
    with pytest.raises(LichenError, match="no client contributed"):
        member.close(member.zero(), Shared())
    with pytest.raises(LichenError, match="client 4 answered version 2 twice"):
        closed(member, of(x, clients=[4, 1, 4], versions=[2, 2, 2]))
    closed(member, of(x, clients=[4, 1, 4], versions=[2, 2, 1]))
    with pytest.raises(LichenError, match="tensor 'x' is not finite"):
        closed(member, of({"x": torch.tensor([[1.0], [math.nan], [2.0]])}))
    total = member.add(member.zero(), of(x))
    with pytest.raises(LichenError, match="messages differ in tensors"):
        member.add(total, of({"y": torch.ones(1, 2)}))
    with pytest.raises(LichenError, match="comes as"):
        member.merge(total, member.add(member.zero(), of({"x": torch.ones(1, 3)}, clients=[9])))
    with pytest.raises(LichenError, match="the model's is"):
        closed(member, of(x), {"x": torch.zeros(3)})
    bad = of(x)
    bad.weight_C[1] = -1
    with pytest.raises(LichenError, match="weight -1"):
        closed(member, bad)
    tensors, header = member.dump(total)
    for wrong in ({**header, "answers": [(0, 0)] * 9}, {"rows": 3}, {**header, "layout": [("x", (7,))]}):
        with pytest.raises(LichenError, match="row"):
            member.load(tensors, wrong)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "mode"}, "unknown rule"),
        ({"rule": "fltrust"}, "unknown rule"),
        ({"rule": "krum", "liars": -1}, "-1 liars"),
        ({"rule": "median", "of": "products"}, "each number by itself"),
        ({"rule": "krum", "of": "words"}, "no distances"),
        ({"rule": "centred_clipping"}, "needs a radius"),
        ({"rule": "norm_bound", "radius": 0.0}, "no radius"),
        ({"rule": "krum", "iterations": 0}, "out of range"),
    ],
)
def test_refuses_what_is_no_rule(options: dict[str, Any], match: str) -> None:
    with pytest.raises(LichenError, match=match):
        Robust(**options)


def adapters(clients: int, seed: int) -> tuple[Tree, Tree]:
    g = torch.Generator().manual_seed(seed)
    shared = {
        "q.lora_A": torch.randn(2, 5, generator=g),
        "q.lora_B": torch.randn(4, 2, generator=g),
        "v.lora_A": torch.randn(2, 3, generator=g),
        "v.lora_B": torch.randn(6, 2, generator=g),
        "head.bias": torch.zeros(3),
    }
    return shared, {n: torch.randn(clients, *x.shape, generator=g) for n, x in shared.items()}


def test_inner_products_of_products_are_those_of_whole_products(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, change_C = adapters(7, 2)
    member = Robust("krum")
    total = member.add(member.zero(), of(change_C))
    came, spans = store.ordered(total), store.spans_of(total.layout)
    for block in (2**21, 1, 100):
        monkeypatch.setattr(gram, "_BLOCK", block)
        for layer in ("q", "v"):
            A, B = shared[f"{layer}.lora_A"].double(), shared[f"{layer}.lora_B"].double()
            dA, dB = (change_C[f"{layer}.lora_{half}"].double() for half in "AB")
            product_CN = ((B + dB) @ (A + dA) - B @ A).flatten(1)
            assert near(gram.product_gram_CC(came, spans, layer, shared), product_CN @ product_CN.T)


def test_each_layer_chooses_by_its_own_products() -> None:
    shared, change_C = adapters(7, 3)
    change_C["q.lora_A"][2] += 40
    change_C["v.lora_B"][5] += 40
    change, metrics = closed(Robust("multi_krum", of="products"), of(change_C), shared)
    assert metrics == {"clients": 7.0, "dropped": 0.0}
    for layer, names in (("q", ("q.lora_A", "q.lora_B")), ("v", ("v.lora_A", "v.lora_B"))):
        A, B = shared[f"{layer}.lora_A"].double(), shared[f"{layer}.lora_B"].double()
        dA, dB = (change_C[f"{layer}.lora_{half}"].double() for half in "AB")
        product_CN = ((B + dB) @ (A + dA) - B @ A).flatten(1)
        weight_C = choices.multi_krum(product_CN @ product_CN.T, 1)
        assert float(weight_C[2 if layer == "q" else 5]) == 0
        for name in names:
            expected = torch.einsum("c,c...->...", weight_C, change_C[name].double())
            assert near(change[name], expected)
    bias_CN = change_C["head.bias"].double()
    assert near(change["head.bias"], choices.multi_krum(bias_CN @ bias_CN.T, 1) @ bias_CN)


def test_products_see_through_factors_that_only_turn() -> None:
    shared, _ = adapters(5, 4)
    A, B = shared["q.lora_A"].double(), shared["q.lora_B"].double()
    turns = torch.linalg.qr(torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(1)).double())[0]
    only = {"q.lora_A": turns @ A - A, "q.lora_B": B @ turns.mT - B}
    total = Robust("krum").add(Robust("krum").zero(), of(only))
    inner = gram.product_gram_CC(store.ordered(total), store.spans_of(total.layout), "q", {**shared})
    assert float(inner.abs().max()) < 1e-10
    assert float(gram.gram_CC(store.ordered(total), [(0, 18)]).diagonal().max()) > 1
    with pytest.raises(LichenError, match="no factors of layer 'q'"):
        closed(Robust("krum", of="products"), of(only))
    with pytest.raises(LichenError, match="do not fit"):
        closed(Robust("krum", of="products"), of(only), {**shared, "q.lora_A": torch.zeros(3, 5)})
