"""A door takes bytes of one user only, no more than a piece, and nothing that it does not understand."""

from __future__ import annotations

import os
import pickle
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lichen.core.errors import LichenError
from lichen.engines.remote.pieces import PIECE
from lichen.federation.door import Door, Head, call, error_of, open_parcel, parcel, refusal, socket_folder


def answer(head: Head, body: bytes) -> tuple[Head, bytes]:
    """Echoes, sleeps, or fails, as it is asked."""
    time.sleep(head.get("sleep", 0.0))
    if head.get("fail"):
        raise LichenError("no")
    return {"threads": threading.active_count()}, body


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    folder = socket_folder(tmp_path)
    door = Door(folder / "door", answer, at_once=8)
    yield folder / "door"
    door.close()
    assert not folder.exists()


def test_only_this_user_can_open_it(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("size", [0, 1, 1 << 20, PIECE])
def test_what_comes_back_is_what_went_in(path: Path, size: int) -> None:
    body = os.urandom(size)
    assert call(path, {}, body, within=20)[1] == body


def test_a_piece_is_the_most(path: Path) -> None:
    with pytest.raises(LichenError, match="more than a question or an answer may have"):
        call(path, {}, bytes(PIECE + 1), within=5)
    with pytest.raises(LichenError, match="more than"):
        parcel({"long": "x" * (1 << 17)}, b"")
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        link.sendall(b"?" + (1 << 35).to_bytes(8, "little") + b"abc")
        assert link.recv(1) == b""
    assert call(path, {}, b"abc", within=5)[1] == b"abc"


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 40, pickle.dumps({"a": 1}), b"\x02\0\0\0[]", b"\x09\0\0\0{}"])
def test_bytes_that_are_no_parcel_are_refused(path: Path, data: bytes) -> None:
    with pytest.raises(LichenError, match="no parcel"):
        open_parcel(data)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        link.sendall(b"?" + len(data).to_bytes(8, "little") + data)
        assert link.recv(1) == b""


def test_who_does_not_answer_in_time_is_not_waited_for(path: Path) -> None:
    with pytest.raises(TimeoutError):
        call(path, {"sleep": 2.0}, within=0.2)
    with pytest.raises(ConnectionResetError):
        call(path, {"fail": True}, within=5)
    with pytest.raises(OSError, match="No such file"):
        call(path.with_name("none"), {}, within=1)


def test_a_door_that_a_kill_has_left_is_opened_anew(tmp_path: Path) -> None:
    folder = socket_folder(tmp_path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "door"))
    door = Door(folder / "door", answer, at_once=1)
    assert call(folder / "door", {}, b"x", within=5)[1] == b"x"
    door.close()


def test_a_long_path_is_no_obstacle(tmp_path: Path) -> None:
    folder = socket_folder(tmp_path / ("long" * 30))
    Door(folder / "door", answer, at_once=1).close()
    assert not folder.exists()
    assert len(str(folder)) < 100


def test_why_there_is_no_answer_survives_the_way_and_nonsense_does_not_break_it() -> None:
    error = LichenError("no", where="there", fix="go")
    head, _ = open_parcel(parcel(refusal("gone", error), b""))
    assert (head["cause"], str(error_of(head))) == ("gone", str(error))
    for nonsense in ({}, {"error": 1}, {"error": ["a"]}):
        assert "does not say why" in str(error_of(nonsense))


def test_nothing_of_the_room_needs_torch() -> None:
    pytest.importorskip("nvflare")
    code = "import sys, lichen.federation.component, lichen.federation.network; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
