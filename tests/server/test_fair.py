"""q-FFL and min-max against their formulas, the projection against its definition, and who gained.

Legend: C clients, N clients of the roster.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.algorithms.agnostic import AFL
from lichen.algorithms.average import Average
from lichen.algorithms.tilted import Tilted
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message
from lichen.core.rounds import load_state, save_state
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, TrainSource
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP
from lichen.server.fairness.gain import per_client_gain
from lichen.server.fairness.minmax import MinMax, MixtureAscent, simplex
from lichen.server.fairness.qffl import QFFL
from lichen.server.fairness.tilted import LEVEL, LevelKeeper, TiltedMean
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Uniform
from support.flat import closed, updated

SHARED = {"w": torch.zeros(3, 4), "b": torch.zeros(4)}


def _message(losses: list[float], weights: list[float] | None = None, *, seed: int = 0) -> Message:
    generator = torch.Generator().manual_seed(seed)
    count = torch.tensor(weights or [1.0] * len(losses), dtype=torch.float64)
    return Message(
        group="g",
        client_C=torch.arange(len(losses)),
        version_C=torch.zeros(len(losses), dtype=torch.int64),
        tensors={name: torch.randn(len(losses), *x.shape, generator=generator) for name, x in SHARED.items()},
        weight_C=count,
        metrics={"loss_sum": torch.tensor(losses, dtype=torch.float64) * count, "count": count},
    )


@pytest.mark.parametrize("q", [0.0, 0.5, 2.0])
def test_qffl_is_the_papers_step(q: float) -> None:
    losses, rate = [0.2, 1.5, 0.7], 0.3
    sent = _message(losses, [4.0, 1.0, 9.0])
    rule = QFFL(q, lr=rate)
    change, metrics = closed(rule, rule.add(rule.zero(), sent), SHARED)
    # As written in the paper: Δw = L (w - w_k), h = q F^(q-1) |Δw|² + L F^q, w - Σ F^q Δw / Σ h.
    steep = 1 / rate
    top = {name: torch.zeros(x.shape, dtype=torch.float64) for name, x in SHARED.items()}
    bottom = 0.0
    for c, loss in enumerate(losses):
        away = {name: -steep * x[c].double() for name, x in sent.tensors.items()}
        square = sum(float(x.square().sum()) for x in away.values())
        bottom += q * loss ** (q - 1) * square + steep * loss**q
        top = {name: x + loss**q * away[name] for name, x in top.items()}
    for name, x in top.items():
        torch.testing.assert_close(change[name].double(), -x / bottom, rtol=1e-5, atol=1e-7)
    assert metrics["clients"] == 3


def test_qffl_at_zero_is_the_uniform_mean_bit_for_bit() -> None:
    sent, rule, mean = _message([0.3, 0.0, 5.0]), QFFL(0.0, lr=0.1), Mean("uniform")
    ours, _ = closed(rule, rule.add(rule.zero(), sent), SHARED)
    assert digest(ours) == digest(closed(mean, mean.add(mean.zero(), sent), SHARED)[0])


def test_a_growing_q_leans_towards_the_worst() -> None:
    sent = _message([0.5, 2.0])
    sent.tensors["w"][:], sent.tensors["b"][:] = 0.0, 0.0
    sent.tensors["b"][0, 0], sent.tensors["b"][1, 1] = 1e-3, 1e-3
    ratios = []
    for q in (0.0, 1.0, 3.0):
        rule = QFFL(q, lr=1.0)
        b = closed(rule, rule.add(rule.zero(), sent), SHARED)[0]["b"]
        ratios.append(float(b[1] / b[0]))
    assert ratios == pytest.approx([1.0, 4.0, 64.0], rel=1e-4)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_the_projection_is_the_nearest_point_of_the_simplex(numbers: list[float]) -> None:
    v = torch.tensor(numbers, dtype=torch.float64)
    p = simplex(v)
    assert float(p.sum()) == pytest.approx(1)
    assert bool((p >= 0).all())
    # Nearest: no other point of the simplex lies on v's side of it (its corners span all of them).
    for corner in torch.eye(len(numbers), dtype=torch.float64):
        assert float((v - p) @ (corner - p)) <= 1e-9


def test_minmax_weighs_by_its_mixture_and_tells_every_loss() -> None:
    sent = _message([0.5, 1.5, 9.0], [2.0, 8.0, 0.0])
    rule = MinMax((0.25, 0.0, 0.5, 0.25))
    change, metrics = closed(rule, rule.add(rule.zero(), sent), SHARED)
    # Client 2 weighs nothing and client 3 did not come; client 1 has no share, but tells its loss.
    assert torch.equal(change["w"], sent.tensors["w"][0])
    assert change["fair.loss"][:2].tolist() == [0.5, 1.5]
    assert change["fair.loss"][2:].isnan().all()
    assert metrics == {"clients": 2.0, "worst": 1.5, "share": 0.5}
    empty = MinMax((0.0, 0.0, 0.5, 0.5))
    assert not closed(empty, empty.add(empty.zero(), sent), SHARED)[0]["w"].any()
    two = MinMax((0.4, 0.6, 0.0, 0.0))
    change, _ = closed(two, two.add(two.zero(), replace(sent, weight_C=torch.ones(3).double())), SHARED)
    expected = 0.4 * sent.tensors["w"][0].double() + 0.6 * sent.tensors["w"][1].double()
    torch.testing.assert_close(change["w"].double(), expected, rtol=1e-6, atol=1e-7)


def test_ascend_climbs_and_passes_the_step_on() -> None:
    inner = ServerSGD(momentum=0.5)
    outer = MixtureAscent(inner, clients=3, rate=0.1)
    shared = {"b": torch.ones(4)}
    state = outer.init(Shared.of_flat(shared))
    assert state["fair.mixture"].tolist() == pytest.approx([1 / 3] * 3)
    change = {"b": torch.full((4,), 0.5), "fair.loss": torch.tensor([0.0, 1.0, math.nan], dtype=torch.float64)}
    new, state = updated(outer, change, state, shared)
    plain, inside = updated(inner, {"b": change["b"]}, inner.init(Shared.of_flat(shared)), shared)
    assert torch.equal(new["b"], plain["b"])
    assert torch.equal(state["m/b"], inside["m/b"])
    assert state["fair.mixture"].tolist() == pytest.approx([0.3, 0.4, 0.3])
    assert "fair.loss" in change


def _unequal(folder: Path, *, work_lr: float = 0.5) -> Any:  # type: ignore[no-untyped-def]
    """Five clients that agree on a border, and one that wants another: it pays for the mean."""
    rng = np.random.default_rng(0)

    def shard(turned: bool) -> ArrayShard:
        x = rng.normal(size=(40, 2)).astype(np.float32)
        y = (x[:, 0] + 0.3 * rng.normal(size=40) > 0) if not turned else (x[:, 1] + 0.3 * rng.normal(size=40) > 0)
        return ArrayShard(x, labels=y.astype(np.int64))

    shards = tuple(shard(c == 5) for c in range(6))
    model = ImageMLP(2, hidden=(), classes=2)
    train = Train(model, optimizer=ClientOptimizer("sgd", lr=work_lr))
    client_tasks = {
        "train": ClientTask(work=train, source=TrainSource(shards, batch_size=20, steps=2)),
        "valid": ClientTask(work=Evaluate(model), source=EvalSource(shards, batch_size=40)),
    }
    average = Average(
        aggregator=Mean("uniform"),
        optimizer=ServerSGD(),
        sampler=Uniform(6),
        weight_N=torch.full((6,), 40.0, dtype=torch.float64),
        rounds=25,
        valid=None,
    )
    return model, average, LocalEngine(client_tasks, ClientStore(folder))


def _losses(engine: Any, shared: Shared) -> torch.Tensor:  # type: ignore[no-untyped-def]
    (message,) = drain(engine, Job(work="valid", shared=shared, version=0, clients=tuple(range(6)), seed=0))
    return message.metrics["loss_sum"] / message.metrics["count"]


def test_fair_rules_raise_the_worst_client_and_a_killed_run_goes_on(tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, average, engine = _unequal(tmp_path / "state")
    ends = {}
    for name, algorithm in {
        "mean": average,
        "minmax": AFL(average, rate=0.1),
        "qffl": replace(average, aggregator=QFFL(3.0, lr=0.5)),
        "tilted": Tilted(average, tilt=2.0, weighting="uniform"),
    }.items():
        state = algorithm.init(Shared(model.init(0)))
        for r in range(25):
            if name in ("minmax", "tilted") and r == 10:  # through a file and back
                save_state(tmp_path / "server", state)
                state = load_state(tmp_path / "server")
            state, report = algorithm.round(state, engine, 1000 + r)
        ends[name] = (_losses(engine, state.shared), state)
    worst = {name: float(loss.max()) for name, (loss, _) in ends.items()}
    assert worst["minmax"] < worst["mean"] - 0.1
    assert worst["qffl"] < worst["mean"] - 0.05
    assert worst["tilted"] < worst["mean"] - 0.05
    assert math.isfinite(float(ends["tilted"][1].optimizer[LEVEL]))
    mixture = ends["minmax"][1].optimizer["fair.mixture"]
    assert int(mixture.argmax()) == 5
    assert float(mixture[5]) > 0.3
    assert report.metrics["loss"] > 0


@given(
    losses=st.lists(st.floats(0.0, 6.0), min_size=1, max_size=8),
    tilt=st.floats(0.1, 1.0),
    levels=st.tuples(st.floats(0.5, 5.5), st.floats(0.5, 5.5)),
)
def test_a_tilted_mean_is_the_papers_from_any_level(
    losses: list[float], tilt: float, levels: tuple[float, float]
) -> None:
    sent = _message(losses, [1.0 + c for c in range(len(losses))])
    weights = [(1.0 + c) * math.exp(tilt * loss) for c, loss in enumerate(losses)]
    shares = [weight / math.fsum(weights) for weight in weights]
    tilted = math.log(math.fsum(weights) / math.fsum(sent.weight_C.tolist())) / tilt
    for level in levels:
        rule = TiltedMean(tilt, level=level, weighting="examples")
        change, metrics = closed(rule, rule.add(rule.zero(), sent), SHARED)
        for name in SHARED:
            expected = sum(share * x.double() for share, x in zip(shares, sent.tensors[name], strict=True))
            torch.testing.assert_close(change[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert float(change[LEVEL]) == pytest.approx(tilted, abs=1e-6) == metrics["tilted"]
        assert metrics["mean"] == pytest.approx(
            math.fsum((1.0 + c) * loss for c, loss in enumerate(losses)) / math.fsum(sent.weight_C.tolist()), abs=1e-6
        )


def test_without_a_level_a_tilted_mean_is_the_mean_and_nobody_counts_without_bound() -> None:
    sent, mean = _message([0.3, 0.0, 5.0], [3.0, 2.0, 1.0]), Mean("examples")
    change, metrics = closed(rule := TiltedMean(4.0, weighting="examples"), rule.add(rule.zero(), sent), SHARED)
    level = change.pop(LEVEL)
    assert digest(change) == digest(closed(mean, mean.add(mean.zero(), sent), SHARED)[0])
    assert float(level) == pytest.approx((0.9 + 5.0) / 6) == metrics["mean"]
    far = TiltedMean(100.0, level=0.3)
    total = far.add(far.zero(), _message([0.3, 50.0]))
    assert total.weight / 2**30 == pytest.approx(1 + 2**10)
    keeper = LevelKeeper(ServerSGD())
    state = keeper.init(Shared(SHARED))
    assert math.isnan(float(state[LEVEL]))
    new, after = keeper.update(Shared({**change, LEVEL: level}), state, Shared(SHARED))
    assert after[LEVEL] == level
    assert new.trainable.keys() == SHARED.keys()


def test_who_gained() -> None:
    before = torch.linspace(0.0, 1.0, 20)
    after = before.clone()
    after[0], after[1], after[19] = 0.5, 0.02, math.nan
    told = per_client_gain(after, before)
    assert told.gain_N[0] == pytest.approx(0.5)
    assert told.least == pytest.approx(0.02 - 1 / 19)
    assert told.worse == pytest.approx(1 / 19)
    assert told.mean == pytest.approx((0.5 + 0.02 - 1 / 19) / 19)
    # 19 clients are known: the lowest of them stands for the tenth.
    assert told.worst_decile == pytest.approx(0.02)
    assert told.worst_decile_before == pytest.approx(0.0)
    with pytest.raises(LichenError, match="both with and without"):
        per_client_gain(torch.tensor([math.nan]), torch.tensor([1.0]))


def test_nonsense_is_refused() -> None:
    bare = replace(_message([1.0]), metrics={})
    for rule in (QFFL(1.0, lr=0.1), MinMax((1.0,)), TiltedMean(1.0)):
        with pytest.raises(LichenError, match="tell no loss"):
            rule.add(rule.zero(), bare)
        with pytest.raises(LichenError, match="not a finite number"):
            rule.add(rule.zero(), _message([math.nan]))
        with pytest.raises(LichenError, match="no client contributed"):
            closed(rule, rule.zero(), SHARED)
        with pytest.raises(LichenError, match="the model's is"):
            closed(rule, rule.add(rule.zero(), _message([1.0])), {"w": torch.zeros(2)})
    with pytest.raises(LichenError, match="no share in a mixture"):
        MinMax((1.0,)).add(MinMax((1.0,)).zero(), _message([1.0, 1.0]))
    for wrong in ((), (0.5, 0.4), (1.5, -0.5)):
        with pytest.raises(LichenError, match="no mixture"):
            MinMax(wrong)
    with pytest.raises(LichenError, match=r"aggregator\.q"):
        QFFL(-1.0, lr=0.1)
    with pytest.raises(LichenError, match=r"aggregator\.tilt"):
        Tilted(Average.__new__(Average), tilt=0.0)
    with pytest.raises(LichenError, match=r"aggregator\.rate"):
        MixtureAscent(ServerSGD(), clients=2, rate=0.0)
