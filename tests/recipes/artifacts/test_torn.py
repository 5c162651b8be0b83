"""What is damaged, killed or cut off gives the bytes of a run that nothing happened to, or one sentence."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torn

import lichen
from lichen.core.errors import LichenError
from lichen.core.files.lock import one_process
from lichen.recipes.schema.read import recipe_of


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torn.Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torn.running, "curves_png", torn.running.curves_png)
        patch.setattr(torn.running, "clients_png", torn.running.clients_png)
        patch.setattr(torn.reading, "load_yaml", torn.reading.load_yaml)
        yield torn.Bench(tmp_path_factory.mktemp("torn"))


def test_a_damaged_file_changes_nothing_or_is_named(bench: torn.Bench) -> None:
    found = [bench.mutated(seed) for seed in range(24)]
    assert [told for told in found if told[0] not in ("equal", "named")] == []
    assert {kind for kind, _ in found} == {"equal", "named"}


@pytest.mark.parametrize("how", ["write", "power"])
def test_a_kill_within_a_write_or_a_power_cut_loses_nothing(bench: torn.Bench, how: str) -> None:
    assert {bench.killed(seed, how)[0] for seed in range(2)} == {"equal"}


def test_a_damaged_cache_gives_no_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path))
    found = [torn.cache_outcome(tmp_path, seed)[0] for seed in range(40)]
    assert set(found) == {"equal", "named"}


def test_the_newest_private_file_is_missed_and_its_round_trained_again(bench: torn.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bench.whole, folder)
    newest = max((folder / "state" / "alone").rglob("[0-9]*.safetensors"), key=lambda path: int(path.stem))
    newest.unlink()
    said: list[str] = []
    lichen.run(recipe_of(folder), out=folder, resume=True, say=said.append)
    assert bench.told(folder) == bench.after
    assert [line for line in said if str(newest) in line or "trained again" in line]


def test_a_folder_without_a_journal_is_taken_as_it_is(bench: torn.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bench.halves[-1], folder)
    (folder / "state" / "journal.jsonl").unlink()
    said: list[str] = []
    lichen.run(recipe_of(folder), out=folder, resume=True, say=said.append)
    assert bench.told(folder) == bench.after
    assert len([line for line in said if "kept no digests" in line]) == 1


def test_two_processes_do_not_work_on_one_folder(bench: torn.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bench.halves[0], folder)
    refused = pytest.raises(LichenError, match="another process works on it")
    with one_process(folder, "state/lock", say=pytest.fail), refused:
        lichen.run(recipe_of(folder), out=folder, resume=True)
    lichen.run(recipe_of(folder), out=folder, resume=True)
    assert bench.told(folder) == bench.after


def test_every_kind_of_damage_is_tried(tmp_path: Path) -> None:
    kinds = set()
    for seed in range(60):
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        for name in ("a", "b"):
            (tmp_path / name).write_text(name * 9)
        kinds.add(torn.mutate(tmp_path, random.Random(seed)).partition(" ")[0])
    assert kinds == set(torn.CHANGES)
