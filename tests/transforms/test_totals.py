"""The total half of transforms: what it changes, what it keeps in the server's state, and where it does not run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lichen.algorithms.average import Average
from lichen.core.collecting.admission import Admission
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.rounds import load_state, run
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.server.sampling import Poisson
from lichen.server.schedules import Synchronous
from lichen.transforms.bounds.clip_change import ClipChange
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transform, Transformed
from lichen.transforms.uplink import Coded
from support import compressed_run
from support.compressed_run import WORK
from support.noise import Noise
from support.small_experiment import experiment

ROW = (ClipChange(1.0), Coded(parse_codecs(["int8"])), Noise(0.1))


def made_of(made: Experiment, *transforms: Transform, folder: Path, block: int = 3) -> tuple[Average, LocalEngine]:
    """Rounds whose training goes through these transforms, and their engine."""
    known = client_tasks(made)
    tasks = {**known, WORK: replace(known[WORK], work=Transformed(known[WORK].work, transforms))}
    admission = Admission(works={name: task.work for name, task in tasks.items()})
    return compressed_run.average(made, admission=admission), LocalEngine(tasks, ClientStore(folder), block_size=block)


def finished(folder: Path, *, rounds: int = 4, block: int = 3) -> tuple[bytes, list[float], ServerState]:
    """The state's file, the rounds that the noise has told, and the state."""
    made, told = experiment(), list[Report]()
    algorithm, engine = made_of(made, *ROW, folder=folder / "own", block=block)
    file = folder / "server.safetensors"
    run(
        replace(algorithm, rounds=4),
        engine,
        lambda: made.start,
        rounds=rounds,
        seed=2,
        checkpoint=file,
        observers=[told.append],
    )
    return file.read_bytes(), [report.metrics["noise.rounds"] for report in told], load_state(file)


def test_a_resumed_run_goes_on_with_its_state_to_the_same_bytes(tmp_path: Path) -> None:
    whole, told, state = finished(tmp_path / "whole")
    assert told == [1, 2, 3, 4]
    assert {name: int(x) for name, x in state.transforms.items()} == {"noise/rounds": 4}
    _, first, _ = finished(tmp_path / "part", rounds=2, block=1)
    again, rest, _ = finished(tmp_path / "part")
    assert again == whole
    assert [*first, *rest] == told


def test_the_server_steps_with_what_the_total_half_gives(tmp_path: Path) -> None:
    made = experiment()
    (noisy, there), (bare, here) = (
        made_of(made, ROW[0], *row, folder=tmp_path / str(len(row))) for row in ((Noise(0.1),), ())
    )
    after, report = noisy.round(noisy.init(made.start), there, 5)
    plain, _ = bare.round(bare.init(made.start), here, 5)
    clients = report.attendance.arrived
    nothing = Shared({name: torch.zeros_like(x) for name, x in made.start.trainable.items()})
    drawn, _, _ = Noise(0.1).on_total(nothing, {}, {}, clients=clients, seed=derive(derive(5, "total"), "noise"))
    assert clients == 2
    for name, x in plain.shared.trainable.items():
        assert torch.allclose(after.shared.trainable[name], x + drawn.trainable[name], atol=1e-6)
        assert drawn.trainable[name].std() > 0
    assert plain.transforms == {}
    assert report.metrics["noise.rounds"] == 1


@pytest.mark.parametrize("more", [{"sampler": Poisson(1e-12)}, {"schedule": Synchronous(least=4)}])
def test_a_round_without_a_step_leaves_its_state_as_it_is(tmp_path: Path, more: dict[str, object]) -> None:
    made = experiment()
    algorithm, engine = made_of(made, Noise(0.1), folder=tmp_path)
    state, _ = algorithm.round(algorithm.init(made.start), engine, 5)
    idle, report = replace(algorithm, **more).round(state, engine, 6)  # type: ignore[arg-type]
    assert "noise.rounds" not in report.metrics
    assert digest(idle.transforms) == digest(state.transforms)
    assert digest(idle.shared.flat()) == digest(state.shared.flat())


def test_a_state_without_any_keeps_the_bytes_of_its_file(tmp_path: Path) -> None:
    made = experiment()
    algorithm, engine = made_of(made, *ROW[:2], folder=tmp_path / "own")
    file = tmp_path / "server.safetensors"
    run(algorithm, engine, lambda: made.start, rounds=1, seed=2, checkpoint=file)
    assert b"transforms/" not in file.read_bytes()
    assert load_state(file).transforms == {}
