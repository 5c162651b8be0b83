"""Atomic safetensors files, and the clients' private state in them.

Private state is versioned. A round that trains version v stages its result as v + 1; loading for
version v takes the newest file not above v. A killed round therefore leaves nothing to undo: its
staged files are newer than the server's version and are overwritten when the round is repeated. Where an
answer did not count, the next job says so, and what was staged with it is deleted before that job begins.

All of it is private unless a caller says otherwise: files of mode 0600 in folders of 0700.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save

from lichen.core import private
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.files.answers import forget_answers
from lichen.core.files.durable import write_all, write_atomic
from lichen.core.files.journal import client_folder
from lichen.core.files.manifest import digest_of, file_digest
from lichen.core.tree import Tree

__all__ = ["ClientStore", "Staged", "load_tree", "save_tree", "take_staged"]


def save_tree(path: Path, tree: Tree, header: dict[str, Any] | None = None, *, shared: bool = False) -> str:
    """Write a tree and a small JSON header by :func:`write_atomic`; equal trees give equal bytes.

    Returns:
        The file's digest.
    """
    data = save(trees.plain(tree), metadata={"lichen": json.dumps(header or {}, sort_keys=True)})
    write_atomic(path, data, shared=shared)
    return digest_of(data)


def load_tree(path: Path) -> tuple[Tree, dict[str, Any]]:
    """Undo :func:`save_tree`.

    Raises:
        LichenError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("lichen", "{}"))
        return load_file(path), header
    except FileNotFoundError:
        raise LichenError("no such file", where=str(path)) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LichenError(
            f"is damaged: {error}", where=str(path), fix="delete it and run again without --resume"
        ) from None


_OPEN = 64
"""Files held open at once while a block's are written."""


_LIST = ".staged."
"""How the name of a list of staged files begins."""


@final
class Staged(NamedTuple):
    """A file of private state that was written.

    Attributes:
        client: Whose.
        version: Of the state.
        digest: Of the file.
        best: Whose version is kept beside the newest; -1: none's.
    """

    client: int
    version: int
    digest: str
    best: int


@final
class ClientStore:
    """Private state of many clients in a folder, one small file a client and version.

    The file of client 1234567 at version 3 is ``1234/567/3.safetensors``. Nothing is remembered between
    calls, so that several processes may serve different clients of one folder.

    Args:
        folder: Where the files lie; made when first needed.
        listed: Whether what is staged goes on a list of this process in the folder, for :func:`take_staged`.
    """

    def __init__(self, folder: Path, *, listed: bool = False) -> None:
        self.folder = folder
        self._list = f"{folder}/{_LIST}{os.getpid()}.{os.urandom(4).hex()}" if listed else None

    def _folder_of(self, client: int) -> str:
        return client_folder(self.folder, client)

    def split_by_state(self, clients: Sequence[int], version: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(clients that have state at ``version``, clients that have none): only equals stand side by side."""
        if not self.folder.is_dir():  # nobody has kept anything yet: no need to ask for each client
            return (), tuple(clients)
        known = {c for c in clients if any(v <= version for v in _versions(self._folder_of(c)))}
        return tuple(c for c in clients if c in known), tuple(c for c in clients if c not in known)

    def load(self, clients: Sequence[int], version: int) -> Tree | None:
        """Stacked private state of these clients at ``version``; None if none of them has any.

        Raises:
            LichenError: if only some of them have state, so that they cannot stack, or a file is damaged.
        """
        if not self.folder.is_dir():
            return None
        folders = [self._folder_of(c) for c in clients]
        newest = [
            max((v for v in _versions(folder_of_client) if v <= version), default=None) for folder_of_client in folders
        ]
        if all(v is None for v in newest):
            return None
        if any(v is None for v in newest):
            missing = [c for c, v in zip(clients, newest, strict=True) if v is None]
            raise LichenError(
                f"clients {missing[:4]} have no private state beside others that do", where=str(self.folder)
            )
        return trees.stack(
            [_read(f"{folder_of_client}/{v}.safetensors") for folder_of_client, v in zip(folders, newest, strict=True)]
        )

    def stage(self, clients: Sequence[int], version: int, own_C: Tree, *, best: int = -1) -> None:
        """Write the state these clients will have at ``version``.

        What a server that acknowledges at least every second version may still ask for is kept: the
        newest state not above ``version - 2`` and all after it; and the state they had at version ``best``.
        """
        plain_C = {name: x.detach().cpu() for name, x in own_C.items()}
        folders = [self._folder_of(c) for c in clients]
        for start in range(0, len(folders), _OPEN):
            some = range(start, min(start + _OPEN, len(folders)))
            data = {i: save(trees.plain(trees.take(plain_C, i))) for i in some}
            write_all({f"{folders[i]}/{version}.safetensors": one for i, one in data.items()})
            if self._list is not None:
                lines = [f"{clients[i]} {version} {digest_of(one)} {best}\n" for i, one in data.items()]
                with open(os.open(self._list, os.O_WRONLY | os.O_CREAT | os.O_APPEND, private.FILE), "ab") as file:
                    file.write("".join(lines).encode())
        for folder_of_client in folders:
            versions = _versions(folder_of_client)
            needed = max((v for v in versions if v <= version - 2), default=0)
            pinned = max((v for v in versions if v <= best), default=-1)
            for old in versions:
                if old < needed and old != pinned:
                    os.unlink(f"{folder_of_client}/{old}.safetensors")

    def roll_back(self, before: Mapping[int, int], version: int) -> None:
        """Delete what clients have staged since their last answer that counted, as a job says; twice is as once.

        Args:
            before: By client, the version of the first of its answers that did not count: states above it go.
            version: Of the job; what was staged above that belongs to it or to a later one, and stays.
        """
        for client, first in before.items():
            folder = self._folder_of(client)
            for staged in _versions(folder):
                if first < staged <= version:
                    with suppress(FileNotFoundError):
                        os.unlink(f"{folder}/{staged}.safetensors")

    def digest(self, client: int, version: int) -> str:
        """Digest of the state that a client was staged under this very version; empty where there is none."""
        return file_digest(f"{self._folder_of(client)}/{version}.safetensors") or ""

    def forget(self, client: int) -> None:
        """Delete all private state of a client, of every version; the next job finds it as at its first time.

        Its saved answers go, too. What the file system had on its disk before is not overwritten.
        """
        forget_answers(self.folder, client)
        folder = self._folder_of(client)
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return
        for name in names:  # also what a kill has left half written
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)
        with suppress(OSError):  # other clients lie there
            os.rmdir(os.path.dirname(folder))


def take_staged(folder: Path, read: dict[str, int]) -> list[Staged]:
    """What all processes have staged in a store's folder since the last call.

    Args:
        folder: The store's.
        read: Bytes of each list that were taken before; changed in place.
    """
    found: list[Staged] = []
    for path in sorted(folder.glob(f"{_LIST}*")):
        with open(path, "rb") as file:
            file.seek(read.get(path.name, 0))
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        read[path.name] = read.get(path.name, 0) + len(data)
        rows = (line.split() for line in data.decode().splitlines())
        found += [Staged(int(client), int(version), digest, int(best)) for client, version, digest, best in rows]
    return found


def _versions(folder_of_client: str) -> list[int]:
    """The versions that lie there; a file that a kill has left half written has another name."""
    try:
        names = os.listdir(folder_of_client)
    except FileNotFoundError:
        return []
    return [int(stem) for stem, dot, _ in (name.partition(".safetensors") for name in names) if dot and stem.isdigit()]


def _read(path: str) -> Tree:
    try:
        with open(path, "rb") as file:
            return load(file.read())
    except (SafetensorError, OSError, ValueError) as error:
        raise LichenError(f"is damaged: {error}", where=path, fix="delete it and run again without --resume") from None
