"""Runs under masks: the bytes of a run without them on every engine, and nothing of one client at the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.present.trace import Event, read_trace
from support.tiny_llama import recipe, save_model, save_rows

KEYS = (
    "data.partition={by: dirichlet, alpha: 1.0, clients: 6}",
    "optimizer.lr=[0.1]",
    "federation={rounds: 3, local_steps: 2, batch_size: 4, aggregate: mean, clients_per_round: 5}",
    "compare={baselines: [], metric: accuracy}",
)
MASKED = "privacy={secure: true, clip: 0.5}"


def run(out: Path, *keys: str, **more: Any) -> dict[str, Any]:
    return lichen.run(lichen.read_recipe("digits", KEYS + keys), out=out, **more).summary


def final(out: Path) -> bytes:
    return (out / "state" / "final.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    run(out, "wire.clip=0.5")
    return out


@pytest.mark.parametrize(
    "engine",
    ["engine.clients_per_block=2", "engine={name: spawned, nodes: 2}", "engine={name: distributed, nodes: 2}"],
    ids=["local", "spawned", "ranks"],
)
def test_any_engine_gives_the_bytes_of_a_run_without_masks(tmp_path: Path, plain: Path, engine: str) -> None:
    summary = run(tmp_path / "run", MASKED, engine)
    assert final(tmp_path / "run") == final(plain)
    assert summary["masks"]["least"] == 3
    said = [event.report for event in read_trace(tmp_path / "run")]
    open_ = [event.report for event in read_trace(plain)]
    for masked, clear in zip(said, open_, strict=True):
        assert masked.clients == clear.clients
        assert masked.metrics["loss"] == pytest.approx(clear.metrics["loss"], abs=1e-6)
        assert masked.metrics["valid"] == pytest.approx(clear.metrics["valid"], abs=1e-6)
        assert masked.tokens == clear.tokens


def test_a_round_of_too_few_changes_nothing_and_is_named(tmp_path: Path) -> None:
    run(tmp_path / "run", "privacy={secure: true, dropout: [0, 0, 0.9, 0]}")
    reports = [event.report for event in read_trace(tmp_path / "run")]
    skipped = [report for report in reports if report.metrics.get("skipped")]
    assert skipped
    assert all("masks" in report.attendance.refused or report.attendance.named for report in skipped)


PRIVATE = (
    "federation={rounds: 3, local_steps: 2, batch_size: 4, aggregate: mean, weighting: uniform}",
    "data.valid=0.0",
    "privacy={secure: true, sigma: 0.5, delta: 1e-2, clip: 0.5, dropped: 0.2, seed: 3}",
)


def test_shared_noise_is_at_least_that_of_the_server_and_the_bytes_are_those_of_any_engine(tmp_path: Path) -> None:
    masked = run(tmp_path / "masked", *PRIVATE)
    run(tmp_path / "spawned", *PRIVATE, "engine={name: spawned, nodes: 2}")
    assert final(tmp_path / "masked") == final(tmp_path / "spawned")
    assert masked["masks"]["least"] == 5
    assert masked["privacy"]["charges"] == 3
    for event in read_trace(tmp_path / "masked"):
        assert event.report.metrics.keys() == {"noise"}
        assert event.report.metrics["noise"] == pytest.approx(0.5 * 0.5 / 6, rel=1e-4)


def test_the_server_is_promised_less_than_those_who_see_the_model_where_clients_are_sampled(tmp_path: Path) -> None:
    sampled = "federation={rounds: 3, local_steps: 1, batch_size: 4, aggregate: mean, weighting: uniform, "
    sampled += "clients_per_round: 4, sampling: poisson}"
    summary = run(
        tmp_path / "run", sampled, "data.valid=0.0", "privacy={secure: true, sigma: 2.0, delta: 1e-2, clip: 0.5}"
    )
    assert "it knows who came" in summary["privacy"]["server"]
    assert float(summary["privacy"]["server"].split(",")[0].strip("(")) > summary["privacy"]["epsilon"]


@pytest.mark.parametrize("rule", ["fedit", "ffa", "fedsvd"])
def test_rules_of_lora_learn_the_same_under_masks(rule: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl", "pair", clients=4, rows=48)
    whole = recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", federation={"aggregate": rule})
    lichen.run(whole, out=tmp_path / "open")
    lichen.run({**whole, "privacy": {"secure": True}}, out=tmp_path / "masked")
    assert final(tmp_path / "masked") == final(tmp_path / "open")


def test_a_run_that_goes_on_has_the_bytes_of_one_that_was_not_stopped(tmp_path: Path, plain: Path) -> None:
    def stop(event: Event) -> None:
        if event.report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", MASKED, observers=[stop])
    run(tmp_path / "run", MASKED, resume=True)
    assert final(tmp_path / "run") == final(plain)


def test_columns_of_one_client_have_no_masks(tmp_path: Path) -> None:
    columns = run(tmp_path / "run", MASKED, "compare={baselines: [alone, pooled], metric: accuracy}")["columns"]
    assert all(columns[name] is not None for name in ("alone", "federated", "pooled"))
