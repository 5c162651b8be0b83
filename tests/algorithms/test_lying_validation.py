"""What one client says of its validation or of its failure chooses neither the round nor the learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.algorithms.scores import center, summed
from lichen.core.collecting.admission import OPEN
from lichen.core.contracts.client import ClientTask
from lichen.core.message import Message
from lichen.core.store import ClientStore
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.parts import client_tasks
from support import compressed_run
from support.small_experiment import experiment

LIAR = 0


class Lies:
    """A work whose client 0 tells another loss: great in the odd rounds, none in the even ones."""

    def __init__(self, inner: Any, **told: float) -> None:
        self.inner, self.told = inner, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def final(self, state: Any) -> tuple[Message, Any]:
        message, own = self.inner.final(state)
        here = message.client_C == LIAR
        odd = message.version_C % 2 == 1
        metrics = dict(message.metrics)
        for name, value in self.told.items():
            metrics[name] = torch.where(here, torch.where(odd, value, 0.0), metrics[name])
        return replace(message, metrics=metrics), own


def best_round(tmp_path: Path, kind: str, lie: bool) -> tuple[int, float]:
    made = experiment()
    known: dict[str, ClientTask] = dict(client_tasks(made))
    if lie:
        known["valid"] = replace(known["valid"], work=Lies(known["valid"].work, loss_sum=1e9))  # type: ignore[arg-type]
    algorithm = replace(compressed_run.average(made, admission=OPEN), rounds=6, valid_average=kind)  # type: ignore[arg-type]
    engine = LocalEngine(known, ClientStore(tmp_path / f"{kind}{lie}"), block_size=3)
    state = algorithm.init(made.start)
    for number in range(6):
        state, _ = algorithm.round(state, engine, number)
    return state.best_round, state.best_value


def test_a_client_that_lies_chooses_the_round_under_a_mean_alone(tmp_path: Path) -> None:
    for kind in ("median", "trimmed_mean"):
        assert best_round(tmp_path, kind, lie=True)[1] < 100
    honest, _ = best_round(tmp_path, "mean", lie=False)
    chosen, value = best_round(tmp_path, "mean", lie=True)
    assert chosen % 2 == 0
    assert value < 100
    assert honest == 6  # it learns in each of them


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_a_center_stays_among_what_the_honest_say(kind: Any) -> None:
    g = torch.Generator().manual_seed(0)
    for count in (3, 4, 10, 11, 25):
        honest = torch.rand(count, generator=g, dtype=torch.float64)
        for lie in (-1e9, 1e9, float(honest[0])):
            whole = torch.cat([honest, torch.tensor([lie], dtype=torch.float64)])
            assert float(honest.min()) <= center(whole, kind) <= float(honest.max())
    assert center(torch.tensor([2.0]), kind) == 2.0
    assert center(torch.tensor([2.0, 4.0]), kind) == 3.0


def test_who_counts_has_not_failed() -> None:
    metrics = {"failed": torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)}
    weight_N = torch.tensor([5.0, 0.0, 1.0], dtype=torch.float64)
    assert summed(metrics, weight_N)[0]["failed"] == 1
    assert summed(metrics)[0]["failed"] == 2
