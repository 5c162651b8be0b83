"""Canaries: in training by secret coins and nowhere else, found again in an open run, and not under noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.recipes.tasks.test_private_recipe import EndError, final

import lichen
from lichen import cli
from lichen.audit.exposure import exposure
from lichen.audit.one_run import bounded, epsilon_at_least
from lichen.core.errors import LichenError
from lichen.core.secret.randomness import SecretRandomness
from lichen.data.batches.shards import ArrayShard, TextShard
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.workload import pooled_experiment
from lichen.recipes.audit.audit import audit
from support.tiny_llama import recipe, save_model, save_rows

KEYS = (
    "data.partition={by: iid, clients: 5}",
    "optimizer={name: sgd, lr: [0.1], momentum: 0.9}",
    "federation={rounds: 3, local_steps: 3, batch_size: 32, aggregate: mean, weighting: uniform}",
    "compare={baselines: [], metric: accuracy}",
    "audit={canaries: 60}",
)
LONG = (
    "model.student.width=16",
    "data.partition.clients=3",
    "optimizer.lr=[0.3]",
    "federation={rounds: 15, local_steps: 8, batch_size: 64, aggregate: mean, weighting: uniform}",
    "audit={canaries: 100, seed: 2}",
)
OF_ROWS = (
    "federation.rounds=1",
    "federation.local_steps=4",
    "privacy={unit: row, sigma: 2.0, delta: 1.0e-5, clip: 0.5}",
)


def run(out: Path, *keys: str, **more: Any) -> dict[str, Any]:
    return lichen.run(lichen.read_recipe("digits", KEYS + keys), out=out, **more).summary


def with_key(out: Path, key: bytes = bytes(range(32))) -> Path:
    (out / "state").mkdir(parents=True)
    (out / "state" / "canaries.key").write_bytes(key)
    (out / "state" / "canaries.key").chmod(0o600)
    return out


def test_one_key_is_one_trajectory_in_any_engine_and_after_a_stop(tmp_path: Path) -> None:
    run(with_key(tmp_path / "local"), resume=True)
    run(with_key(tmp_path / "spawned"), "engine={name: spawned, nodes: 2}", resume=True)
    run(with_key(tmp_path / "ranks"), "engine={name: distributed, nodes: 2}", resume=True)

    def end(event: Any) -> None:
        if event.report.round == 2:
            raise EndError

    with pytest.raises(EndError):
        run(with_key(tmp_path / "stopped"), resume=True, observers=[end])
    run(tmp_path / "stopped", resume=True)
    finals = [final(tmp_path / name) for name in ("local", "spawned", "ranks", "stopped")]
    assert len(set(finals)) == 1
    run(with_key(tmp_path / "other", bytes(32)), resume=True)
    assert final(tmp_path / "other") != finals[0]


def test_nothing_that_others_see_tells_of_them(tmp_path: Path) -> None:
    summary = run(tmp_path / "with", "federation.weighting=rows")
    plain = run(tmp_path / "without", "federation.weighting=rows", "audit=null")
    key = tmp_path / "with" / "state" / "canaries.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "with" / "roster.json").read_bytes() == (tmp_path / "without" / "roster.json").read_bytes()
    assert summary["extra"]["canaries"] == 60
    assert "canaries" not in plain["extra"]
    for one in ("read", "training", "bytes_up", "bytes_down"):
        assert summary[one] == plain[one]
    # Coins follow from the key alone, which nothing but its file holds.
    told = b"".join(file.read_bytes() for file in (tmp_path / "with").rglob("*.json*"))
    assert key.read_bytes() not in told
    assert key.read_bytes().hex().encode() not in told


def loaded_of(keys: Sequence[str] = ()) -> LoadedExperiment:
    return open_recipe(lichen.read_recipe("digits", (*KEYS, *keys)))


def test_they_are_dealt_out_by_coin_and_train_the_federation_alone() -> None:
    loaded = loaded_of(["audit.canaries=400", "audit.scale=3.0"])
    secret = SecretRandomness.of_seed(5)
    canaries, planted = loaded.canaries(secret), loaded.planted(secret).experiment
    assert 160 < sum(canaries.included_M) < 240
    assert np.bincount(canaries.client_M).tolist() == [80] * 5
    assert isinstance(canaries.rows, ArrayShard)
    assert 2.8 < canaries.rows.x.std() < 3.2
    assert set(canaries.rows.labels.tolist()) == set(range(10))
    before = loaded.experiment.clients
    for client, (own, more) in enumerate(zip(before.train, planted.clients.planted, strict=True)):
        mine = [c == client and on for c, on in zip(canaries.client_M, canaries.included_M, strict=True)]
        assert isinstance(own, ArrayShard)
        assert isinstance(more, ArrayShard)
        assert (more.x[: own.size] == own.x).all()
        assert (more.x[own.size :] == canaries.rows.x[np.array(mine)]).all()
    assert planted.clients.valid == before.valid
    assert planted.clients.test == before.test
    assert planted.server.roster == loaded.experiment.server.roster
    tasks, plain = client_tasks(planted), client_tasks(loaded.experiment)
    for name in ("alone lr=0.1", "valid", "test"):
        assert tasks[name].source.shards == plain[name].source.shards  # type: ignore[attr-defined]
    assert tasks["train lr=0.1"].source.shards[0].size > before.train[0].size  # type: ignore[attr-defined]
    (all_rows,) = client_tasks(pooled_experiment(planted))["train lr=0.1"].source.shards  # type: ignore[attr-defined]
    assert all_rows.size == sum(shard.size for shard in before.train)


@pytest.mark.parametrize("form", ["plain", "transcript", "chat", "messages", "stream", "label", "student"])
def test_texts_are_words_in_the_form_of_the_rows(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model")
    shape: Any = "messages" if form == "messages" else "pair" if form not in ("label", "student") else "label"
    save_rows(tmp_path / "rows.jsonl", shape)
    made = recipe(tmp_path / "model", tmp_path / "rows.jsonl", shape, audit={"canaries": 20})
    if shape == "pair":
        made["data"]["form"] = form
    if form == "student":
        made["model"] = {"student": {"kind": "text-cnn", "width": 8}}
        monkeypatch.setattr("lichen.recipes.assemble.loaded_model.STUDENT_TOKENIZER", str(tmp_path / "model"))
    loaded = open_recipe(lichen.read_recipe(made))
    canaries = loaded.canaries(SecretRandomness.of_seed(1))
    assert isinstance(canaries.rows, TextShard)
    assert canaries.rows.size == 20
    texts = [loaded.tokenizer.decode(row.tolist()) for row in canaries.rows.input_ids]
    assert len(set(texts)) == 20
    assert all(text.count("w") >= 8 for text in texts)
    assert any(shard.size for shard in canaries.shards(5))


def test_an_open_run_shows_them_and_noise_hides_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "open", *LONG)
    run(tmp_path / "private", *LONG, *OF_ROWS)
    shown, hidden = (audit(tmp_path / name, rows=100).canaries for name in ("open", "private"))
    assert shown is not None
    assert hidden is not None
    assert shown.included == hidden.included
    assert shown.bound.epsilon > 0.5
    assert shown.exposure > 2 > hidden.exposure
    assert shown.exposure_most <= shown.exposure_full
    assert (shown.promised, shown.delta) == (None, 0.0)
    assert hidden.promised is not None
    assert hidden.bound.epsilon <= hidden.promised
    assert hidden.delta == 1e-5
    assert cli.main(["audit", str(tmp_path / "open"), "--rows", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["canaries"]
    assert found["bound"]["epsilon"] == shown.bound.epsilon
    assert cli.main(["audit", str(tmp_path / "open"), str(tmp_path / "private"), "--rows", "50"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "ε at least" in out
    assert f"{shown.bound.epsilon:.3f} at least for one row" in out
    assert cli.main(["audit", str(tmp_path / "private"), "--rows", "50"]) == 0
    assert "ε promised" in capsys.readouterr().out


def test_what_hides_clients_is_not_held_against_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "privacy={sigma: 4.0, delta: 1e-2, clip: 0.5}")
    assert cli.main(["audit", str(tmp_path / "run"), "--rows", "50"]) == 0
    assert "canaries are rows" in capsys.readouterr().out


def test_a_key_that_is_gone_is_missed_on_resume_and_by_an_audit(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run" / "state" / "canaries.key").unlink()
    for do in (lambda: audit(tmp_path / "run"), lambda: run(tmp_path / "run", resume=True)):
        with pytest.raises(LichenError, match="nobody knows which canaries") as caught:
            do()
        assert caught.value.where.endswith("canaries.key")


WRONG: dict[str, tuple[str, ...]] = {
    "federation.local_epochs": ("federation.local_steps=null", "federation.local_epochs=1"),
    "semi": ("semi={kind: fixmatch}",),
    "attack.kind": ("attack={kind: label_flip, liars: 2}",),
    "audit.canaries": ("audit={canaries: 3}",),
    "audit.scale": ("audit={canaries: 20, scale: 0}",),
    "audit": ("task=oneshot", "model={name: minilm-l6, head: ridge}", "optimizer={}", "federation={}"),
    "audit.canaries: exchange": (
        "exchange={kind: fedmd}",
        "model={students: [{kind: image-mlp, width: 8}, {kind: image-mlp, width: 16}]}",
        "data.public={share: 0.2}",
        "federation={rounds: 2, local_steps: 2}",
    ),
}


@pytest.mark.parametrize("key", WRONG)
def test_where_coins_would_show_or_nobody_could_be_asked_it_is_refused(key: str) -> None:
    with pytest.raises(LichenError) as caught:
        lichen.read_recipe("digits", KEYS + WRONG[key])
    assert str(caught.value).startswith(key.split(": ")[0])
    assert caught.value.fix


def test_words_have_no_scale_and_sites_no_canaries(tmp_path: Path) -> None:
    made = recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", audit={"canaries": 20, "scale": 2.0})
    with pytest.raises(LichenError, match="words"):
        lichen.read_recipe(made)
    keys = (*KEYS, "engine={name: spawned, nodes: 1}")
    with pytest.raises(LichenError, match=r"audit\.canaries"):
        lichen.run(lichen.read_recipe("digits", keys), out=tmp_path / "run", server_alone=True)


def test_exposure_counts_ranks_and_several_numbers_of_guesses_share_the_doubt() -> None:
    import torch

    draw = np.random.default_rng(0)
    assert abs(np.median(exposure(draw.normal(size=4000), draw.normal(size=4000))) - 1) < 0.1
    assert exposure(np.array([1.0]), np.ones(7)).tolist() == [0.0]
    with pytest.raises(LichenError):
        exposure(np.array([np.nan]), np.ones(7))
    included = torch.from_numpy(draw.random(400) < 0.5)
    above = [bounded(torch.from_numpy(draw.normal(size=400)), included).epsilon > 0 for _ in range(200)]
    assert sum(above) <= 20  # 5 % at most, and 3.2 standard deviations
    found = bounded(included.double(), included)
    assert found.right == found.guesses == 320
    assert 0 < found.epsilon < epsilon_at_least(400, 400)
