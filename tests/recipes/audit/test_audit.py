"""A run's audit: text is read off an open run's messages and not above the bound; members of an overfitted one show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_llama import recipe, save_model, save_rows

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.audit.audit import audit
from lichen.recipes.audit.several import audit_several


def run_of(
    folder: Path,
    name: str,
    *,
    rank: int = 40,
    batch: int = 1,
    rounds: int = 2,
    steps: int = 1,
    sections: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    federation = {
        "rounds": rounds,
        "local_steps": steps,
        "batch_size": batch,
        "history": True,
        "weighting": "uniform",
        **more,
    }
    about = {**recipe(folder / "llama", folder / "rows.jsonl", "pair", federation=federation), **(sections or {})}
    model = {**about["model"], "adapter": {"target_modules": ["q_proj", "v_proj"], "rank": rank, "alpha": 2 * rank}}
    optimizer = {"name": "sgd", "lr": 0.3}
    lichen.run({**about, "model": model, "optimizer": optimizer, "compare": {"baselines": []}}, out=folder / name)
    return folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    save_model(folder / "llama")
    save_rows(folder / "rows.jsonl", "pair", clients=3, rows=24)
    return folder


@pytest.fixture(scope="module")
def opened(place: Path) -> Path:
    return run_of(place, "open")


def test_an_open_run_gives_its_text_away_and_the_audit_changes_nothing(opened: Path) -> None:
    before = {file: file.read_bytes() for file in opened.rglob("*") if file.is_file()}
    found = audit(opened, rows=60)
    assert len(found.messages) == 6
    first = [one for one in found.messages if one.round == 1]
    assert all(one.right == one.found > 0 for one in first)
    # The last token of a row teaches nothing.
    assert all(one.right >= 0.6 * one.inputs for one in first)
    assert all(one.inputs < one.bound for one in first)
    assert any("w" in one.example for one in first)
    assert {file: file.read_bytes() for file in opened.rglob("*") if file.is_file()} == before
    verify(opened)


def test_the_sum_of_a_round_is_read_like_one_message_of_all_its_rows(opened: Path) -> None:
    single, sums = audit(opened, rows=60).messages, audit(opened, rows=60, sums=True).messages
    assert [one.round for one in sums] == [1, 2]
    assert {one.client for one in sums} == {"3 clients"}
    of_all, apart = sums[0], [one for one in single if one.round == 1]
    assert max(one.inputs for one in apart) < of_all.inputs <= sum(one.inputs for one in apart)
    assert of_all.right <= of_all.inputs
    if of_all.inputs >= of_all.bound:
        assert of_all.right < sum(one.right for one in apart)


def test_above_the_bound_nothing_is_read(place: Path) -> None:
    found = audit(run_of(place, "above", rank=4, rounds=1), rows=60)
    assert found.messages
    for one in found.messages:
        assert (one.found, one.right, one.example) == (0, 0, "")
        assert one.inputs >= one.bound == 4


def test_members_of_an_overfitted_run_show_and_those_of_a_first_step_do_not(place: Path, opened: Path) -> None:
    long = audit(run_of(place, "long", rounds=12, steps=12, batch=8), rows=60, messages=0)
    short = audit(opened, rows=60, messages=0)
    assert set(long.membership) == {"loss", "loss, reference", "min_k", "min_k, reference"}
    for name, one in long.membership.items():
        assert one.auc > short.membership[name].auc
    assert long.membership["loss, reference"].auc_low > 0.6
    assert short.membership["loss, reference"].auc_low < 0.55


def test_the_command_prints_tables_and_json(opened: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(opened), "--rows", "30", "--messages", "2"]) == 0
    out = capsys.readouterr().out
    assert "AUC" in out
    assert "are read" in out
    assert cli.main(["audit", str(opened), "--rows", "30", "--messages", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["messages"][0]["right"] > 0


@pytest.fixture(scope="module")
def private(place: Path) -> Path:
    sections = {"privacy": {"unit": "row", "sigma": 0.5, "clip": 0.1, "delta": 1e-2}}
    return run_of(place, "private", rounds=1, sections=sections)


def test_several_runs_make_one_table_and_a_list(
    opened: Path, private: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", str(opened), str(private), "--rows", "30", "--messages", "3"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one.pop("folder") for one in found] == [str(opened), str(private)]
    assert [one.pop("epsilon") is None for one in found] == [True, False]
    assert found[0].pop("protected_by") == "none"
    assert "one row" in found[1].pop("protected_by")
    # Each is what it is by itself.
    assert cli.main(["audit", str(opened), *words[3:], "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone.pop("folder") == str(opened)
    assert alone == found[0]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    first, second = ([line for line in out.splitlines() if str(run) in line] for run in (opened, private))
    right, inputs = (sum(message[key] for message in found[0]["messages"]) for key in ("right", "inputs"))
    assert f"{right} of {inputs}" in first[0]
    assert f"{right} of {inputs} tokens are read off 3 messages" in first[1]
    assert "no token is read off 3 messages" in second[1]
    assert len(first) == len(second) == 2


def test_a_fault_of_one_of_several_names_its_folder(place: Path, opened: Path, private: Path, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="is not a run's folder") as fault:
        audit_several([opened, tmp_path])
    assert str(tmp_path) in fault.value.where
    other = run_of(place, "seeded", rounds=1, history=False, sections={"seed": 5})
    with pytest.raises(LichenError, match="its seed differs") as fault:
        audit_several([opened, other])
    assert str(other) in fault.value.where
    key = private / "state" / "privacy.key"
    secret = key.read_bytes()
    key.unlink()
    try:
        with pytest.raises(LichenError, match="nobody knows which rows") as fault:
            audit_several([opened, private], rows=10, messages=1)
    finally:
        key.write_bytes(secret)
        key.chmod(0o600)
    assert str(private) in fault.value.where


def test_what_cannot_be_audited_is_refused_with_a_reason(place: Path, opened: Path, tmp_path: Path) -> None:
    plain = audit(run_of(place, "plain", rounds=1, history=False), rows=30)
    assert not plain.retained
    assert plain.messages == ()
    with pytest.raises(LichenError, match="is not a run's folder"):
        audit(tmp_path)
