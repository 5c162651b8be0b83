"""What of a run is whole: a line a round, written last, with the digests of all that the round has left on the disk.

A column of a run (one way of learning at one learning rate) leaves after each round the server's state and the private
state of clients. Its line names both by digest, and holds the round's line of the trace and the time spent so far. Each
line carries a digest of itself and of all before it. What no line names is not whole: :meth:`Journal.mend` goes back to
the newest round whose files are as their line says, of the last two, and the round after it is trained again, to
the same bytes. So the state before the last is kept, too, as ``previous.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import link_file, write_atomic
from lichen.core.files.manifest import file_digest

__all__ = ["Journal", "RoundEntry", "client_folder", "keep_previous"]

NAME, SERVER, PREVIOUS = "journal.jsonl", "server.safetensors", "previous.safetensors"
FORMAT = 1
_SUM = 32
_STAGES = 4
"""Versions of a client that can be asked for at most, but for that of the best round."""

_FAN = 1000
"""Clients of one folder; a million then lie in a thousand folders of a thousand."""

Private = tuple[int, int, str]
"""A client, the version of its private state, and the file's digest."""


def client_folder(folder: Path | str, client: int) -> str:
    """Where a client's private files lie in a store's folder."""
    return f"{folder}/{client // _FAN}/{client % _FAN}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEntry:
    """What a round has left on the disk.

    Attributes:
        column: Its folder within ``state/``.
        round: How many rounds are finished.
        state: Digest of the server's state.
        private: What was staged since the line before, by folder of the store within the column's.
        best: The best round so far, where private state of it is kept; else -1.
        flying: Whether jobs are on their way, whose private state may be ahead.
        traced: The round's line of the trace; empty where it stands there already.
        record: Lines of the run's record (:mod:`lichen.core.files.record`) that come with the round.
    """

    column: str
    round: int
    state: str
    private: Mapping[str, Sequence[Private]] = field(default_factory=dict)
    best: int = -1
    flying: bool = False
    traced: str = ""
    record: str = ""

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> RoundEntry:
        """What a line of the journal says; KeyError if it is none of a round."""
        names = ("column", "round", "state", "private", "best", "flying", "traced")
        return cls(**{name: line[name] for name in names}, record=line.get("record", ""))


@final
class _Column:
    """The rounds of a column that count, and the private state that goes with them."""

    def __init__(self) -> None:
        self.rounds: list[RoundEntry] = []
        self.files: dict[str, dict[int, dict[int, tuple[int, str]]]] = {}
        """By store, client and version: the line (counted in rounds of this column) and the digest."""

    @property
    def pins(self) -> bool:
        """Whether private state of the best round is kept beside the newest."""
        return bool(self.rounds) and self.rounds[-1].best >= 0

    def add(self, entry: RoundEntry) -> None:
        self.rounds.append(entry)
        for store, files in entry.private.items():
            clients = self.files.setdefault(store, {})
            for client, version, digest in files:
                own = clients.setdefault(client, {})
                own[version] = (len(self.rounds), digest)
                pinned = max((v for v in own if v <= entry.best), default=-1)
                for old in sorted(own)[:-_STAGES]:
                    if old != pinned:
                        del own[old]

    def known(self, store: str, client: int, lines: int) -> dict[int, str]:
        """Digest by version of what a client had staged in the first ``lines`` rounds."""
        own = self.files.get(store, {}).get(client, {})
        return {version: digest for version, (line, digest) in own.items() if line <= lines}

    def needed(self, lines: int) -> Iterator[tuple[str, int, int, str]]:
        """Store, client, version and digest of the private state without which so many rounds are not whole."""
        about = self.rounds[lines - 1]
        for store, clients in self.files.items():
            for client in clients:
                known = self.known(store, client, lines)
                newest = max(known, default=-1)
                versions = {newest, max((v for v in known if v <= about.best), default=newest)}
                if about.flying:  # what was staged last may belong to a job that is on its way
                    versions.add(max((v for v in known if v < newest), default=newest))
                yield from (
                    (store, client, version, known[version]) for version in sorted(versions) if version in known
                )

    def back(self, lines: int) -> None:
        """Only so many rounds count."""
        del self.rounds[lines:]
        for clients in self.files.values():
            for client in list(clients):
                clients[client] = {v: one for v, one in clients[client].items() if one[0] <= lines}


@final
class Journal:
    """The journal of a run; one process writes it.

    Args:
        state: The folder it lies in, with a folder for each column.
        say: Told what was mended.

    Attributes:
        adopted: The folder was begun by a version that kept no journal.
        seconds: Time spent so far.
        joules: Energy so far; None: not known.
        record: The run's record, line by line, as far as rounds are whole, or were.

    Raises:
        LichenError: if a line other than the last is damaged.
    """

    def __init__(self, state: Path, *, say: Callable[[str], None]) -> None:
        self.state, self._say = state, say
        self.path = state / NAME
        self.adopted, self.seconds = False, 0.0
        self.joules: float | None = 0.0
        self.record = ""
        self.columns: dict[str, _Column] = {}
        self.traced: dict[tuple[str, int], str] = {}
        self._sum = ""
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        lines = data.splitlines(keepends=True)
        good = 0
        for number, line in enumerate(lines, start=1):
            mark, body = line[:_SUM], line[_SUM + 1 : -1]
            whole = line == self._line(body) and mark != b""
            if not whole and (number < len(lines) or number == 1):
                raise LichenError(
                    f"line {number} is damaged",
                    where=str(self.path),
                    fix="put the file back from a copy; or delete it, and the run goes on with its files unchecked",
                )
            if whole:
                self._apply(json.loads(body))
                self._sum = mark.decode()
                good += len(line)
        if not lines:
            raise LichenError(
                "is empty", where=str(self.path), fix="delete it, and the run goes on with its files unchecked"
            )
        if good < len(data):
            if data.endswith(b"\n"):
                self._say(f"{self.path}: its last line was damaged and is left out")
            write_atomic(self.path, data[:good])

    def _line(self, body: bytes) -> bytes:
        return hashlib.sha256(self._sum.encode() + body).hexdigest()[:_SUM].encode() + b" " + body + b"\n"

    def _apply(self, record: dict[str, Any]) -> None:
        self.adopted = bool(record.get("adopted", self.adopted))
        self.seconds, self.joules = record.get("seconds", self.seconds), record.get("joules", self.joules)
        self.record += record.get("record", "")
        if "back" in record:
            self.columns[record["back"]].back(record["rounds"])
        if "state" in record:
            entry = RoundEntry.of(record)
            self.columns.setdefault(entry.column, _Column()).add(entry)
            if entry.traced:
                self.traced.setdefault((entry.column, entry.round), entry.traced)
        for column, number, line in record.get("traced before", ()):
            self.traced.setdefault((column, number), line)

    def _append(self, record: dict[str, Any]) -> None:
        body = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
        if not self._sum:
            first = json.dumps({"format": FORMAT, "adopted": self.adopted}).encode()
            line = self._line(first)
            self._sum = line[:_SUM].decode()
            write_atomic(self.path, line)
        line = self._line(body)
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._sum = line[:_SUM].decode()
        self._apply(json.loads(body))

    def commit(self, entry: RoundEntry, *, seconds: float, joules: float | None) -> None:
        """A round is whole: all that ``entry`` names is on the disk."""
        self._append(
            {
                "column": entry.column,
                "round": entry.round,
                "state": entry.state,
                "private": {store: [list(one) for one in files] for store, files in entry.private.items()},
                "best": entry.best,
                "flying": entry.flying,
                "traced": entry.traced,
                "record": entry.record,
                "seconds": seconds,
                "joules": joules,
            }
        )

    def spend(self, seconds: float, joules: float | None) -> None:
        """So much time and energy were spent until now."""
        self._append({"seconds": seconds, "joules": joules})

    def adopt(
        self,
        rounds: Sequence[RoundEntry],
        traced: Sequence[tuple[str, int, str]],
        *,
        seconds: float,
        joules: float | None,
    ) -> None:
        """Begin the journal of a folder that has none, with what lies there and its trace."""
        self.adopted = True
        self._append({"traced before": [list(one) for one in traced], "seconds": seconds, "joules": joules})
        for entry in rounds:
            self.commit(entry, seconds=seconds, joules=joules)

    def trace(self) -> list[str]:
        """The lines of the trace of all rounds that are whole, or were, as they were told."""
        return list(self.traced.values())

    def mend(self, round_of: Callable[[Path], int]) -> None:
        """Bring every column to the newest round that is whole.

        Args:
            round_of: Rounds in a server's state, by its file.

        Raises:
            LichenError: naming the file for want of which neither of the last two rounds is.
        """
        lying = {path.parent.relative_to(self.state).as_posix() for path in self.state.glob(f"*/*/{SERVER}")}
        for name in sorted(lying - self.columns.keys()):
            self._drop_first(name, round_of)
        for name, column in self.columns.items():
            if column.rounds:
                self._mend(name, column)
            elif name in lying:
                self._drop_first(name, round_of)

    def _drop_first(self, name: str, round_of: Callable[[Path], int]) -> None:
        """A first round that a kill kept from being whole is trained again."""
        path = self.state / name / SERVER
        try:
            rounds = round_of(path)
        except LichenError:
            rounds = 0
        if rounds > 1:
            raise LichenError(
                f"is in round {rounds}, of which {NAME} knows nothing: that file was cut or changed",
                where=str(path),
                fix=f"put {NAME} back from a copy; or delete the folder {path.parent}, which is then trained again",
            )
        path.unlink()

    def _mend(self, name: str, column: _Column) -> None:
        folder, count = self.state / name, len(column.rounds)
        if not folder.is_dir():
            self._back(name, 0)
            self._say(f"{folder}: is gone, and is trained again from its first round")
            return
        digests: dict[str, str | None] = {}
        first = ""
        for lines in (count, count - 1):
            fault = self._fault(folder, column, lines, digests) if lines else ""
            if not fault:
                break
            first = first or fault
        else:
            raise LichenError(
                "is missing or damaged, and so is what would be needed to train its round again",
                where=first,
                fix=f"put it back from a copy; or delete the folder {folder}, which is then trained again",
            )
        if lines < count:
            self._say(f"{first}: is missing or damaged; round {column.rounds[lines].round} of {name} is trained again")
            self._back(name, lines)
        if lines == 0:
            (folder / SERVER).unlink(missing_ok=True)
        elif digests[SERVER] != column.rounds[lines - 1].state:
            write_atomic(folder / SERVER, (folder / PREVIOUS).read_bytes())
        self._clear(folder, column, lines)

    def _back(self, name: str, rounds: int) -> None:
        self._append({"back": name, "rounds": rounds})

    def _fault(self, folder: Path, column: _Column, lines: int, digests: dict[str, str | None]) -> str:
        """The file for want of which so many rounds are not whole; empty if they are."""

        def digest(path: str) -> str | None:
            if path not in digests:
                digests[path] = file_digest(f"{folder}/{path}")
            return digests[path]

        if column.rounds[lines - 1].state not in (digest(SERVER), digest(PREVIOUS)):
            return f"{folder}/{SERVER}"
        for store, client, version, known in column.needed(lines):
            path = f"{client_folder(store, client)}/{version}.safetensors"
            if digest(path) != known:
                return f"{folder}/{path}"
        return ""

    def _clear(self, folder: Path, column: _Column, lines: int) -> None:
        """Remove lists and private state that belong to no whole round."""
        for store in column.files or ("clients", "server"):
            for path in (folder / store).glob(".staged.*"):
                path.unlink()
            for path in (folder / store).glob("*/*/*.safetensors"):
                with suppress(ValueError):
                    client, version = int(path.parts[-3]) * _FAN + int(path.parts[-2]), int(path.stem)
                    known = column.known(store, client, lines)
                    if version not in known and version > min(known, default=-1):
                        path.unlink()


def keep_previous(path: Path) -> None:
    """Let a state that is going to be replaced stay beside the new one."""
    if not path.exists():
        return
    link_file(path, path.with_name(PREVIOUS))
