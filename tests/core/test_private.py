"""What is private is for its owner only, under any umask; what is shared has the usual modes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lichen.core import private
from lichen.core.contracts.algorithm import ServerState
from lichen.core.files.durable import write_atomic
from lichen.core.rounds import save_state
from lichen.core.store import ClientStore, save_tree
from lichen.core.wire.shared import Shared


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o277])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield int(request.param)
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def modes(home: Path) -> dict[str, set[int]]:
    every = list(home.rglob("*"))
    assert every
    return {kind: {mode(p) for p in every if p.is_dir() == (kind == "folders")} for kind in ("files", "folders")}


def test_every_private_file_and_folder(umask: int, tmp_path: Path) -> None:
    home = tmp_path / "run"
    write_atomic(home / "a" / "b" / "recipe.yaml", b"x")
    save_tree(home / "scores" / "x.safetensors", {"x": torch.ones(2)})
    save_state(home / "state" / "server.safetensors", ServerState(round=1, shared=Shared({"x": torch.ones(2)})))
    store = ClientStore(home / "clients")
    for version in (1, 2, 3):
        store.stage((0, 1234567), version, {"w": torch.ones(2, 3)})
    assert modes(home) == {"files": {0o600}, "folders": {0o700}}
    assert mode(home) == 0o700


def test_shared_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    if umask == 0o277:
        pytest.skip("nobody can write into a folder that is made under it")
    save_tree(tmp_path / "model" / "model.safetensors", {"x": torch.ones(2)}, shared=True)
    assert mode(tmp_path / "model") == 0o777 & ~umask
    assert mode(tmp_path / "model" / "model.safetensors") == 0o666 & ~umask


def test_what_is_there_already_keeps_its_mode_and_a_new_file_does_not(tmp_path: Path) -> None:
    home = tmp_path / "mine"
    home.mkdir()
    home.chmod(0o755)
    (home / "recipe.yaml").write_text("old")
    (home / "recipe.yaml").chmod(0o644)
    write_atomic(home / "recipe.yaml", b"new")
    assert (mode(home), mode(home / "recipe.yaml")) == (0o755, 0o600)
    private.make_folder(tmp_path / "runs" / "one")
    assert mode(tmp_path / "runs" / "one") == 0o700
    assert mode(tmp_path / "runs") == mode_of_a_new_folder(tmp_path)


def mode_of_a_new_folder(home: Path) -> int:
    (home / "plain").mkdir()
    return mode(home / "plain")


def test_what_a_kill_left_is_no_door(tmp_path: Path) -> None:
    """A link where the part is going to be written leads nowhere else."""
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "new").symlink_to(other)
    with open(private.create(tmp_path / "new"), "w", encoding="utf-8") as file:
        file.write("private")
    assert other.read_text() == "precious"
    assert not (tmp_path / "new").is_symlink()
    assert mode(tmp_path / "new") == 0o600


def test_tighten_goes_through_a_folder_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("out", "in/a", "in/deep/b"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(0o644)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    private.tighten(tmp_path / "in")
    assert [mode(tmp_path / name) for name in ("in", "in/deep", "in/a", "in/deep/b", "out")] == [
        0o700,
        0o700,
        0o600,
        0o600,
        0o644,
    ]


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="exists"):
        private.make_folders(tmp_path / "file")
