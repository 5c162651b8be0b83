"""A door between NVFlare's process and Lichen's own: questions and answers as bytes, over a unix socket of one user.

What passes is a head, which is JSON, and a body, which is bytes: nothing is unpickled, and no more is taken in than a
piece. NVFlare's process holds no model and no rows, and Lichen's none of NVFlare's objects. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast, final

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.wire.frames import read_body, read_head, write_frame
from lichen.engines.remote.pieces import PIECE

__all__ = [
    "LOOK",
    "Answer",
    "Bytes",
    "Door",
    "Head",
    "call",
    "door_of",
    "error_of",
    "open_parcel",
    "parcel",
    "refusal",
    "remove_socket",
    "socket_folder",
]

LOOK = 600.0
"""Seconds that a process waits at most at a door for what may come at any time; then it asks again."""

_HEAD = 1 << 16
"""Bytes of a head at most."""

RUN = "run"
"""In a kit: the folder of its socket, or a link to it."""

_LONGEST = 100
"""Bytes of a socket's path; systems have 104 and more."""

Head = dict[str, Any]
"""What is asked, or what came of it; JSON."""

Bytes = bytes | memoryview
Answer = Callable[[Head, bytes], tuple[Head, Bytes]]


def parcel(head: Head, body: Bytes) -> bytes:
    """A head and a body as bytes.

    >>> head, body = open_parcel(parcel({"kind": "echo"}, b"abc"))
    >>> head, bytes(body)
    ({'kind': 'echo'}, b'abc')
    """
    return b"".join([_front(head, body), body])


def _front(head: Head, body: Bytes) -> bytes:
    """What stands before a body."""
    front = json.dumps(head).encode()
    if len(front) > _HEAD or len(body) > PIECE:
        what = f"{len(body):,} bytes are more than a question or an answer may have"
        raise LichenError(what, where="federation", fix=f"send pieces of at most {PIECE:,} bytes")
    return len(front).to_bytes(4, "little") + front


def open_parcel(data: bytes) -> tuple[Head, memoryview]:
    """What :func:`parcel` made; the body is not copied.

    Raises:
        LichenError: if it is none.
    """
    length = int.from_bytes(data[:4], "little")
    if 4 <= 4 + length <= len(data) and length <= _HEAD and len(data) <= 4 + length + PIECE:
        return _head(data[4 : 4 + length]), memoryview(data)[4 + length :]
    raise _nonsense()


def _head(front: bytes) -> Head:
    with suppress(ValueError, RecursionError):
        head = json.loads(front)
        if isinstance(head, dict):
            return head
    raise _nonsense()


def _nonsense() -> LichenError:
    return LichenError("bytes that are no parcel", where="federation", fix="both ends must run the same version")


def _read_parcel(stream: BinaryIO) -> tuple[Head, bytes] | None:
    """A head and a body, each read by itself, so that neither is copied."""
    frame = read_head(stream, most=4 + _HEAD + PIECE)
    if frame is None:
        return None
    if frame[1] < 4 or (length := int.from_bytes(read_body(stream, 4), "little")) > min(_HEAD, frame[1] - 4):
        raise _nonsense()
    return _head(read_body(stream, length)), read_body(stream, frame[1] - 4 - length)


def refusal(cause: str, error: LichenError) -> Head:
    """The head of an answer that is none."""
    return {"cause": cause, "error": [error.what, error.where, error.fix]}


def error_of(head: Head) -> LichenError:
    """What :func:`refusal` holds, whatever a stranger wrote there."""
    try:
        what, where, fix = head["error"]
        return LichenError(str(what), where=str(where), fix=str(fix))
    except (KeyError, TypeError, ValueError):
        return LichenError("it does not say why", where="site")


def socket_folder(kit: Path, name: str = RUN) -> Path:
    """A folder for a socket, new and empty; whoever asks for it removes it.

    Args:
        kit: Where it lies, unless that makes the socket's path longer than one can be: then among the temporary files.
        name: Of the folder.
    """
    folder = kit.absolute() / name
    if folder.is_symlink():  # left by a process that was killed
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    if len(os.fsencode(folder / "door")) <= _LONGEST:
        private.make_folders(folder)
        return folder
    made = Path(tempfile.mkdtemp(prefix="lichen-"))
    private.make_folders(folder.parent)
    folder.symlink_to(made)
    return made


def door_of(kit: Path, name: str = RUN) -> Path:
    """The socket of the process that runs a kit, whether there is one or not; ``name`` as in :func:`socket_folder`."""
    return (kit.absolute() / name).resolve() / "door"


def remove_socket(kit: Path, name: str) -> None:
    """Remove the folder that :func:`socket_folder` made, and the link to it."""
    folder = kit.absolute() / name
    shutil.rmtree(folder.resolve(), ignore_errors=True)
    folder.unlink(missing_ok=True)


def _stream(link: socket.socket) -> BinaryIO:
    return cast(BinaryIO, link.makefile("rwb"))


@final
class Door:
    """Where one process listens and answers; a thread for each question.

    Args:
        path: The socket's, in a folder that only this user can open.
        answer: Gives the answer to a question; what it raises ends that question only.
        at_once: Questions that are answered at a time; others wait.
    """

    def __init__(self, path: Path, answer: Answer, *, at_once: int) -> None:
        self._answer = answer
        self._free = threading.BoundedSemaphore(at_once)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path
        self._closed = False
        path.unlink(missing_ok=True)
        self._socket.bind(str(path))
        os.chmod(path, 0o600)
        self._socket.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            self._free.acquire()
            try:
                link, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        try:
            with suppress(OSError, LichenError), link, _stream(link) as stream:
                question = _read_parcel(stream)
                if question is not None:
                    head, body = self._answer(*question)
                    del question
                    write_frame(stream, b"!", _front(head, body), body)
        finally:
            self._free.release()

    def close(self) -> None:
        """Answer nobody any more."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        shutil.rmtree(self._path.parent, ignore_errors=True)


def call(path: Path, head: Head, body: Bytes = b"", *, within: float) -> tuple[Head, bytes]:
    """Ask one question at a door.

    Args:
        path: The socket's.
        head: What is asked.
        body: With it.
        within: Seconds to wait.

    Raises:
        TimeoutError: if no answer came in time.
        OSError: if nobody is there, or went.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(within)
        link.connect(str(path))
        with _stream(link) as stream:
            write_frame(stream, b"?", _front(head, body), body)
            try:
                answer = _read_parcel(stream)
            except LichenError as error:
                raise ConnectionResetError(str(error)) from None
    if answer is None:
        raise ConnectionResetError("no answer")
    return answer
