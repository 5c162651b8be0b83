"""States of earlier rounds that stay in a run's folder, with the clients' private state that goes with them.

A column's folder has, beside the newest state, ``checkpoints/ROUND.safetensors`` and ``checkpoints/ROUND/``, in which
lies the private state of each client as it was then. Both are links to files that are never changed, and only replaced,
so that they cost no more than what they hold, and nothing where it is still the newest. The digests of both stand in
the journal's lines of their rounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import link_file
from lichen.core.files.journal import NAME, RoundEntry, client_folder
from lichen.core.files.manifest import file_digest

__all__ = [
    "CHECKPOINTS",
    "checkpoint_files",
    "checkpoint_rounds",
    "entries_of",
    "retain_checkpoint",
    "whole_checkpoint",
]

CHECKPOINTS = "checkpoints"
"""Folder of a column's earlier states."""

_END = ".safetensors"


def retain_checkpoint(server: Path, round_: int) -> None:
    """Let the state that lies there stay, whatever comes later.

    Args:
        server: The column's state, after this round; the newest private state of its clients lies beside it.
        round_: How many rounds are finished.
    """
    folder = server.parent / CHECKPOINTS
    private.make_folders(folder)
    for store in ("clients", "server"):
        for newest in _newest(server.parent / store):
            target = folder / str(round_) / newest.relative_to(server.parent)
            private.make_folders(target.parent)
            link_file(newest, target)
    link_file(server, folder / f"{round_}{_END}")  # last of all: with it, the checkpoint is whole


def checkpoint_rounds(column: Path) -> list[int]:
    """The rounds whose states are there, ascending."""
    found = (column / CHECKPOINTS).glob(f"*{_END}")
    return sorted(int(file.stem) for file in found if file.stem.isdecimal())


def checkpoint_files(column: Path, round_: int) -> Iterator[tuple[Path, Path]]:
    """Each file of private state of a checkpoint, and its place in a column's folder."""
    folder = column / CHECKPOINTS / str(round_)
    for file in sorted(folder.rglob(f"*{_END}")):
        yield file, file.relative_to(folder)


def whole_checkpoint(column: Path, entries: list[RoundEntry], round_: int) -> Path:
    """The file of a state, whose bytes and whose private state are those of the journal.

    Args:
        column: The column's folder.
        entries: Its lines of the journal.
        round_: The round.

    Raises:
        LichenError: naming the file that is missing or damaged.
    """
    path = column / CHECKPOINTS / f"{round_}{_END}"
    known = {entry.round: entry.state for entry in entries}
    staged = {
        (store, client, version): digest
        for entry in entries
        if entry.round <= round_
        for store, files in entry.private.items()
        for client, version, digest in files
    }
    newest: dict[tuple[str, int], int] = {}
    for store, client, version in staged:
        newest[store, client] = max(version, newest.get((store, client), -1))
    needed = {path: known.get(round_)}
    for (store, client), version in newest.items():
        place = client_folder(column / CHECKPOINTS / str(round_) / store, client)
        needed[Path(place, f"{version}{_END}")] = staged[store, client, version]
    for file, digest in needed.items():
        if digest is None or file_digest(file) != digest:
            fix = "delete this checkpoint, so that an earlier one is used"
            raise LichenError("is missing or damaged", where=str(file), fix=fix)
    return path


def entries_of(state: Path) -> dict[str, list[RoundEntry]]:
    """What a finished run's journal says of each round of each column, the newest line of a round alone.

    Args:
        state: The run's folder ``state``, whose journal was read whole before.
    """
    found: dict[str, dict[int, RoundEntry]] = {}
    try:
        for line in (state / NAME).read_bytes().splitlines():
            about = json.loads(line.partition(b" ")[2])
            if "state" in about:
                entry = RoundEntry.of(about)
                found.setdefault(entry.column, {})[entry.round] = entry
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LichenError(f"is missing or damaged: {error}", where=str(state / NAME)) from None
    return {column: [rounds[at] for at in sorted(rounds)] for column, rounds in found.items()}


def _newest(store: Path) -> Iterator[Path]:
    """The newest file of each client of a store."""
    for folder in store.glob("*/*"):
        versions = [int(file.stem) for file in folder.glob(f"*{_END}") if file.stem.isdecimal()]
        if versions:
            yield folder / f"{max(versions)}{_END}"
