"""Under masks each client finds its own value: that of a server with single messages, and nobody else has it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.cli import main
from lichen.clients.evaluation.value_notes import ValueNotes, read_notes
from lichen.core.errors import LichenError
from lichen.present.trace import Event, read_trace
from lichen.recipes.artifacts.contributions import read_contributions
from lichen.recipes.artifacts.verify import verify

KEYS = (
    "data.partition={by: dirichlet, alpha: 1.0, clients: 5}",
    "optimizer={name: sgd, lr: [0.1]}",
    "federation={rounds: 2, local_steps: 2, batch_size: 4, aggregate: mean, clients_per_round: 4, server: {lr: 0.5}}",
    "compare={baselines: [], metric: accuracy}",
    "value={kind: first}",
)
MASKED = "privacy={secure: true, clip: 0.5}"


def run(out: Path, *keys: str, **more: Any) -> Path:
    lichen.run(lichen.read_recipe("digits", KEYS + keys), out=out, **more)
    return out


def notes(out: Path) -> dict[tuple[int, int], float]:
    """By round and client."""
    files = sorted((out / "state" / "own_values" / "lr=0.1").glob("*.csv"))
    return {(at, int(file.stem)): x for file in files for at, x in read_notes(file).items()}


@pytest.fixture(scope="module")
def open_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("open") / "run", "wire.clip=0.5")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("masked") / "run", MASKED)


def test_a_client_finds_the_value_that_a_server_with_single_messages_finds(open_: Path, masked: Path) -> None:
    told = {
        (event.report.round, client): x
        for event in read_trace(open_)
        if event.report.value is not None
        for client, x in event.report.value.value.items()
    }
    home = notes(masked)
    assert len(told) == 2 * 4
    assert home.keys() == told.keys()
    for key, value in told.items():
        assert home[key] == pytest.approx(value, rel=1e-12, abs=1e-12)
    for event in read_trace(masked):
        value = event.report.value
        assert value is not None
        assert (value.value, value.before, value.after, value.gap) == ({}, None, None, None)
        own = math.fsum(x for (at, _), x in home.items() if at == event.report.round)
        assert value.total == pytest.approx(own, rel=1e-5)


def test_nothing_of_a_single_client_is_in_the_files_of_the_run(
    masked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.loads((masked / "contributions.json").read_text())
    assert body["lines"] == []
    assert all(one.keys() == {"client"} for one in body["totals"])
    assert not (masked / "contributions.png").exists()
    assert "contribution" not in (masked / "clients.csv").read_text().splitlines()[0]
    assert verify(masked).values == 0
    assert main(["pay", str(masked), "--budget", "10"]) == 2
    assert "each client alone knows its value" in capsys.readouterr().err
    assert main(["pay", str(masked), "--budget", "10", "--by", "rows"]) == 0
    assert (masked / "state" / "own_values" / "lr=0.1" / "000000.csv").stat().st_mode & 0o77 == 0


def test_clients_one_by_one_and_a_run_that_goes_on_have_the_same_bytes(masked: Path, tmp_path: Path) -> None:
    def killed(event: Event) -> None:
        if event.report.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", MASKED, "engine.clients_per_block=1", observers=[killed])
    run(tmp_path / "killed", MASKED, "engine.clients_per_block=1", resume=True)
    assert notes(tmp_path / "killed") == notes(masked)
    assert (tmp_path / "killed" / "contributions.json").read_bytes() == (masked / "contributions.json").read_bytes()


def test_who_falls_silent_has_no_value_and_nobody_else_loses_one(tmp_path: Path) -> None:
    seen: list[Event] = []
    dropout = "privacy={secure: true, clip: 0.5, dropout: [0, 0, 0.3, 0]}"
    home = notes(run(tmp_path / "run", dropout, "seed=4", observers=[seen.append]))
    for report in (event.report for event in seen):
        there = {one.client for one in report.attendance.receipts if one.version == report.round - 1}
        assert {client for at, client in home if at == report.round} == (there if report.value else set())
    assert len(home) < 2 * 4


def test_by_public_rows_no_client_is_asked_for_a_gradient_and_the_sum_comes_near_what_was_gained(
    tmp_path: Path,
) -> None:
    public = ("data.public={share: 0.2, labelled: 100, unlabelled: 1}", "value={kind: first, rows: public}")
    out = run(tmp_path / "run", MASKED, *public, "federation.server.lr=0.05")
    found = read_contributions(out)
    assert found.private
    for value in found.rounds.values():
        assert value.gap is not None
        assert value.total == pytest.approx((value.after or 0.0) - (value.before or 0.0), rel=0.1)
    assert math.fsum(notes(out).values()) == pytest.approx(sum(x.sum for x in found.rounds.values()), rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("value={kind: gtg}",), "each client finds for itself"),
        (("federation.server.name=adam",), "first order holds for small steps"),
    ],
)
def test_what_needs_single_messages_is_refused_beside_masks(keys: tuple[str, ...], said: str) -> None:
    with pytest.raises(LichenError, match=said):
        lichen.read_recipe("digits", (*KEYS, MASKED, *keys))


def test_notes_go_on_from_where_a_run_does_and_damage_is_named(tmp_path: Path) -> None:
    kept = ValueNotes(tmp_path / "own")
    for at, value in ((1, 0.5), (2, -0.25), (3, 1e-9), (2, 0.125)):
        kept.note(7, at, value)
    path = tmp_path / "own" / "000007.csv"
    assert read_notes(path) == {1: 0.5, 2: 0.125}
    path.write_text("round,value\n1,nan\n")
    with pytest.raises(LichenError, match="is damaged"):
        read_notes(path)
