"""A change that is far larger than those before it is refused; what it would have done to the sum, it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from tests.transforms.test_totals import made_of

import lichen
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message, concatenate_messages, take_client
from lichen.core.rounds import load_state, run
from lichen.core.tree import Tree, digest
from lichen.core.wire.shared import Shared
from lichen.transforms.bounds.gate import NORM, NormGate
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transform
from lichen.transforms.uplink import Coded
from support.noise import Noise
from support.small_experiment import experiment

LIAR = 1
ANY = Expected(group="", tensors={})


@final
@dataclass(frozen=True, slots=True)
class Louder:
    """One client multiplies its change in rounds from the fourth on: it stands where a liar would."""

    factor: float
    inner: Transform = field(default_factory=lambda: Noise(0.0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    name = "louder"

    def on_client(self, message: Message, own_C: Tree, job: Job, clients: Sequence[int]) -> tuple[Message, Tree]:
        factor_C = torch.tensor([self.factor if c == LIAR and job.version >= 3 else 1.0 for c in clients])
        louder = {n: x * factor_C.view(-1, *[1] * (x.dim() - 1)) for n, x in message.tensors.items()}
        return replace(message, tensors=louder), {}


def message(norms: Sequence[float], weights: Sequence[float] | None = None) -> Message:
    norm_C = torch.tensor(norms)
    count = len(norms)
    return Message(
        group="",
        client_C=torch.arange(count),
        version_C=torch.zeros(count, dtype=torch.int64),
        tensors={"w": norm_C[:, None] * torch.tensor([0.6, 0.8])},
        weight_C=torch.tensor(weights or [1.0] * count, dtype=torch.float64),
    )


def after(gate: NormGate, *rounds: Sequence[float]) -> Tree:
    state = Tree()
    for norms in rounds:
        arrived = gate.on_arrival(message(norms), ANY, state).metrics
        _, _, state = gate.on_total(Shared(), state, dict(arrived), clients=len(norms), seed=0)
    return state


def refused(gate: NormGate, norms: Sequence[float], state: Tree) -> bool:
    try:
        gate.on_arrival(message(norms), ANY, state)
    except LichenError as error:
        return error.reason == "norm"
    return False


def test_it_is_off_until_ten_have_counted_and_then_holds_the_median() -> None:
    gate = NormGate(3.0)
    assert not refused(gate, [1e9], after(gate, [1.0] * 9))
    state = after(gate, [1.0] * 5, [2.0] * 4, [100.0])  # median 1.5
    assert [refused(gate, [norm], state) for norm in (4.4, 4.6)] == [False, True]
    assert refused(gate, [1.0, 4.6, 1.0], state)


def test_a_liar_among_four_moves_the_limit_no_further_than_honest_norms_lie() -> None:
    gate, state = NormGate(3.0), Tree()
    state = after(gate, *[[1.0, 1.1, 0.9, 1.0]] * 3)
    for _ in range(60):
        biggest = 3.0 * float(state["norms_W"].quantile(0.5)) * 0.999
        arrived = gate.on_arrival(message([1.0, 1.1, 0.9, biggest]), ANY, state).metrics
        _, told, state = gate.on_total(Shared(), state, dict(arrived), clients=4, seed=0)
        assert told["norm"] <= 1.1
    assert len(state["norms_W"]) == gate.window
    assert refused(gate, [3.4], state)


def test_who_weighs_nothing_teaches_nothing() -> None:
    gate = NormGate(3.0)
    arrived = gate.on_arrival(message([0.0] * 8 + [1.0] * 12, [0.0] * 8 + [1.0] * 12), ANY, {}).metrics
    _, told, state = gate.on_total(Shared(), {}, dict(arrived), clients=12, seed=0)
    assert state["norms_W"].tolist() == pytest.approx([1.0] * 12)
    assert told == {"norm": pytest.approx(1.0)}


def test_norms_are_the_same_in_any_company() -> None:
    gate, g = NormGate(2.0), torch.Generator().manual_seed(0)
    whole = replace(message([1.0, 2.0, 3.0]), tensors={"w": torch.randn(3, 777, generator=g)})
    together = gate.on_arrival(whole, ANY, {}).metrics[NORM]
    apart = concatenate_messages([gate.on_arrival(take_client(whole, c), ANY, {}) for c in (2, 0, 1)])
    assert torch.equal(together[torch.tensor([2, 0, 1])], apart.metrics[NORM])
    assert torch.allclose(together, whole.tensors["w"].double().norm(dim=1))


def rounds(folder: Path, *transforms: Transform, count: int = 6, block: int = 3) -> tuple[ServerState, list[Report]]:
    made, reports = experiment(), list[Report]()
    algorithm, engine = made_of(made, *transforms, folder=folder / "own", block=block)
    everyone = replace(algorithm.sampler, count=len(made.clients.train))
    run(
        replace(algorithm, rounds=6, sampler=everyone),
        engine,
        lambda: made.start,
        rounds=count,
        seed=2,
        checkpoint=folder / "state",
        observers=[reports.append],
    )
    return load_state(folder / "state"), reports


@pytest.mark.parametrize("coded", [(), (Coded(parse_codecs(["int8~"])),)], ids=["plain", "coded"])
def test_a_loud_client_costs_itself_the_round_and_the_rest_is_as_without_it(
    tmp_path: Path, coded: tuple[Transform, ...]
) -> None:
    state, reports = rounds(tmp_path / "gated", NormGate(4.0), Louder(1000.0), *coded)
    assert [dict(report.attendance.refused) for report in reports] == [{}] * 3 + [{"norm": 1}] * 3
    assert {refusal.client for report in reports for refusal in report.attendance.named} == {LIAR}
    assert float(state.transforms["gate/norms_W"].max()) < 4 * float(state.transforms["gate/norms_W"].median())
    alone, _ = rounds(tmp_path / "alone", NormGate(4.0), Louder(1000.0), *coded, block=1)
    assert digest(state.shared.flat()) == digest(alone.shared.flat())
    open_, _ = rounds(tmp_path / "open", Louder(1000.0), *coded)
    assert largest(open_.shared) > 10 * largest(state.shared)


def largest(shared: Shared) -> float:
    return max(float(x.abs().max()) for x in shared.trainable.values())


def test_it_goes_on_after_a_stop_with_what_it_knew(tmp_path: Path) -> None:
    row = (NormGate(4.0), Louder(1000.0))
    whole, told = rounds(tmp_path / "whole", *row)
    _, first = rounds(tmp_path / "part", *row, count=4)
    again, rest = rounds(tmp_path / "part", *row)
    assert (tmp_path / "part" / "state").read_bytes() == (tmp_path / "whole" / "state").read_bytes()
    assert [dict(report.attendance.refused) for report in (*first, *rest)] == [
        dict(report.attendance.refused) for report in told
    ]
    assert torch.equal(whole.transforms["gate/norms_W"], again.transforms["gate/norms_W"])


def test_a_recipe_has_one_and_not_beside_a_clip(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match=r"wire\.gate: no change is above wire\.clip"):
        lichen.read_recipe("digits", ("wire.gate=5", "wire.clip=1"))
    with pytest.raises(LichenError, match=r"wire\.gate"):
        lichen.read_recipe("digits", ("wire.gate=1",))
    keys = ("wire.gate=1.0001", "federation.rounds=4", "compare.baselines=[]", "optimizer.lr=[0.1]")
    told: list[Any] = []
    lichen.run(lichen.read_recipe("digits", keys), out=tmp_path / "run", observers=[told.append])
    counts = [event.report.attendance.refused.get("norm", 0) for event in told if event.column == "federated"]
    assert counts[0] == 0
    assert sum(counts) > 0
