"""What a site has answered, on its disk until the server has acknowledged the version that it was trained on.

A server that was killed asks again for what it had not saved. A site that has finished then answers from its disk, and
trains nothing. The files lie beside the clients' private state, ``.answers/<version>/<client>.<job>``, and each names
the private state that was staged with it: where that has gone or is another, the answer counts no more.

A file is not forced to the disk. It holds a digest of itself, and what a power cut has spoilt is trained again, to the
same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import final

from lichen.core import private
from lichen.core.files.durable import PART

__all__ = ["ANSWERS", "SavedAnswers", "forget_answers"]

ANSWERS = ".answers"
"""The folder of them within that of the private state."""

_DIGITS = 64
_BEFORE = 1
"""Versions before the newest that a server may still ask for: it has saved at least every second one."""


@final
class SavedAnswers:
    """The answers of a site's clients, by version, client and job.

    Args:
        folder: That of the clients' private state.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ANSWERS

    def save(self, version: int, client: int, job: str, data: bytes, own: str) -> None:
        """Write an answer, so that a kill leaves all of it or nothing.

        Args:
            version: What it was trained on.
            client: Whose it is.
            job: A digest of what was asked.
            data: The answer.
            own: Digest of the private state that was staged with it; empty where there was none.
        """
        path = self._path(version, client, job)
        private.make_folders(path.parent)
        part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
        head = f"{own:{_DIGITS}}".encode()
        with open(private.create(part), "wb") as file:
            for piece in (_digest(head, data), head, data):
                file.write(piece)
        os.replace(part, path)

    def load(self, version: int, client: int, job: str, own: str | None = None) -> bytes | None:
        """The answer; None where there is none that is whole and goes with this private state, if one is named."""
        try:
            data = self._path(version, client, job).read_bytes()
        except OSError:
            return None
        mark, head, body = data[:_DIGITS], data[_DIGITS : 2 * _DIGITS], data[2 * _DIGITS :]
        if mark != _digest(head, body):
            return None
        return body if own is None or head.decode().strip() == own else None

    def has(self, version: int, client: int, job: str) -> bool:
        """Whether there is a file of this answer."""
        return self._path(version, client, job).exists()

    def acknowledge(self, version: int) -> None:
        """The server has got to this version: what it will not ask for again is deleted."""
        with suppress(OSError):
            for name in os.listdir(self.folder):
                if name.isdigit() and int(name) < version - _BEFORE:
                    shutil.rmtree(self.folder / name, ignore_errors=True)

    def _path(self, version: int, client: int, job: str) -> Path:
        return self.folder / str(version) / f"{client}.{job[:32]}"


def _digest(head: bytes, data: bytes) -> bytes:
    whole = hashlib.sha256(head)
    whole.update(data)
    return whole.hexdigest().encode()


def forget_answers(folder: Path, client: int) -> None:
    """Delete a client's answers in a folder of private state, also what a kill has left half written."""
    for path in folder.glob(f"{ANSWERS}/*/*"):
        if path.name.lstrip(".").split(".")[0] == str(client):
            path.unlink(missing_ok=True)
