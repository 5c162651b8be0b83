"""The run folder: atomic files, locks, and what is already done.

``recipe.yaml`` · ``roster.json`` · ``trace.jsonl`` · ``summary.json`` · ``curves.png`` · ``clients.png`` · ``adapter/``
or ``model/`` · ``record.jsonl`` and ``record.json`` (who took part, and who has signed that) · ``manifest.json``
(digests of all that is finished) · ``state/`` (checkpoints of every column, private
client state, scores already taken, and the journal of what of them is whole).

All of it is private, files of mode 0600 in folders of 0700, but ``adapter/``, ``merged/`` and ``model/``, which are
there to be handed on.

Of several ranks only the first writes here; what many ranks make and keep for later, such as their
clients' private state, is said where it is made. All ranks see one folder.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lichen.core import private
from lichen.core.collecting.run_record import beginning, round_entry
from lichen.core.contracts.algorithm import ServerState
from lichen.core.errors import LichenError
from lichen.core.files.answers import ANSWERS
from lichen.core.files.checkpoints import retain_checkpoint
from lichen.core.files.durable import sweep, write_atomic
from lichen.core.files.journal import Journal, RoundEntry, keep_previous
from lichen.core.files.manifest import file_digest
from lichen.core.files.record import RECORD, START, Record
from lichen.core.roster import Roster
from lichen.core.rounds import load_state, save_state
from lichen.core.store import Staged, load_tree, save_tree, take_staged
from lichen.core.tree import Tree, digest
from lichen.engines.pipe_sites import PipeSites
from lichen.engines.ranks import Ranks
from lichen.present.trace import Event, event_line, read_trace
from lichen.recipes.rows.checked_cards import Cards

__all__ = ["LOCK", "RunFolder", "save_roster"]

LOCK = "state/lock"
"""Held by whoever works on a run."""


@final
class RunFolder:
    """Paths of one run and what it already knows.

    Args:
        path: The folder; made when missing.
        recipe_sha256: What the folder must belong to.
        ranks: Who works on it together; all of them make and ask the same things in the same order.
        say: Told what was mended.
        history: Rounds after which the state of the federated column stays; 0: the newest states alone.

    Attributes:
        journal: What of the run is whole; the first rank's alone.
        record: Who took part in each round, and with which message; the first rank's alone.
        joules: Energy spent so far; None: not known.

    Raises:
        LichenError: if it was made by another recipe.
    """

    def __init__(
        self,
        path: Path,
        *,
        recipe_sha256: str,
        ranks: Ranks | None = None,
        say: Callable[[str], None] = lambda _: None,
        history: int = 0,
    ) -> None:
        self.path, self.ranks, self._say, self._history = path, ranks or Ranks(), say, history
        self._strict: bool = self.ranks.ask_first(lambda: self._claim(recipe_sha256))
        self._start = time.monotonic()
        self._events: dict[tuple[str, int], Event] = {}
        self._lists: dict[Path, dict[str, int]] = {}
        self.joules: Callable[[], float | None] = lambda: 0.0
        self._children: PipeSites | None = None

    def _claim(self, recipe_sha256: str) -> bool:
        """Mark the folder as the recipe's, and bring it to what is whole; whether all in it must bear its digest."""
        digest_file = self.path / "state" / "recipe.sha256"
        if digest_file.exists():
            marks = digest_file.read_text(errors="replace").split()
            if not marks or not all(re.fullmatch("[0-9a-f]{64}", mark) for mark in marks):
                raise LichenError("is damaged", where=str(digest_file), fix="delete it, and go on")
            if recipe_sha256 not in marks:
                raise LichenError(
                    "was made by another recipe",
                    where=str(self.path),
                    fix="resume with the folder's own recipe, or choose another --out",
                )
        private.make_folders(digest_file.parent)
        with suppress(OSError):  # an older run's may be open to others
            digest_file.parent.chmod(private.FOLDER)
        sweep([self.path])
        write_atomic(digest_file, recipe_sha256.encode())
        self.journal = Journal(digest_file.parent, say=self._say)
        if not self.journal.path.exists() and (self.finished() or read_trace(self.path)):
            self._adopt()
        self.journal.mend(lambda file: load_state(file).round)
        self.record = Record(self.path / RECORD, self.journal.record, say=self._say)
        self._restore_trace()
        return not self.journal.adopted

    def _adopt(self) -> None:
        """Begin the journal of a folder that an earlier version has made, and take what lies there as it is."""
        self._say(
            f"{self.path}: was begun by a version of lichen that kept no digests; its files are taken as they are"
        )
        rounds, state = [], self.path / "state"
        done = self.finished()
        for (column, grid), count in done.items():
            folder = state / column / grid
            every = {store: _private_files(folder / store) for store in ("clients", "server")}
            digest = file_digest(folder / "server.safetensors") or ""
            rounds.append(RoundEntry(column=f"{column}/{grid}", round=count, state=digest, private=every))
        whole = [e for e in read_trace(self.path) if e.report.round <= done.get((e.column, e.grid), 0)]
        traced = [(f"{e.column}/{e.grid}", e.report.round, event_line(e).decode()) for e in whole]
        seconds, joules = (_former_number(state / name) for name in ("seconds", "joules"))
        if seconds is None:
            self._say(f"{state / 'seconds'}: is damaged or missing; the time spent until now is not counted")
        self.journal.adopt(rounds, traced, seconds=seconds or 0.0, joules=joules)

    def _restore_trace(self) -> None:
        """Let the trace be that of all rounds that are whole."""
        file, lines = self.path / "trace.jsonl", [line.encode() for line in self.journal.trace()]
        there = file.read_bytes() if file.exists() else b""
        if there == b"".join(lines):
            return
        if set(lines) - set(there.splitlines(keepends=True)):
            self._say(f"{file}: was damaged, and is written again from {self.journal.path}")
        write_atomic(file, b"".join(lines))

    def seconds(self) -> float:
        """Wall time spent on this run so far, over all its sessions."""
        return self.journal.seconds + time.monotonic() - self._start

    def end(self) -> None:
        """The run is finished: its time is remembered; lists of what clients have staged, and saved answers, go."""
        now = self.seconds()
        self._start = time.monotonic()
        self.journal.spend(now, self.joules())
        for path in (self.path / "state").glob("*/*/*/.staged.*"):
            path.unlink()
        for path in (self.path / "state").glob(f"*/*/*/{ANSWERS}"):
            shutil.rmtree(path, ignore_errors=True)

    def children(self, make: Callable[[], PipeSites]) -> PipeSites:
        """The processes that serve all columns of the run, made once."""
        if self._children is None:
            self._children = make()
        return self._children

    def close(self) -> None:
        """End the processes that serve the run, if there are any."""
        if self._children is not None:
            self._children.close()
            self._children = None

    def traced(self, event: Event) -> bool:
        """Whether the trace has this round already; else it is remembered until the round is whole."""
        key = f"{event.column}/{event.grid}", event.report.round
        self._events[key] = event
        return key in self.journal.traced

    def save(self, path: Path, state: ServerState) -> None:
        """Write a column's state to its file from :meth:`checkpoint`: it counts once its line is in the journal."""
        keep_previous(path)
        digest = save_state(path, state)
        column = path.parent.relative_to(self.path / "state").as_posix()
        staged = {store: self._staged(path.parent / store) for store in ("clients", "server")}
        before = self.journal.columns.get(column)
        pins = any(one.best >= 0 for files in staged.values() for one in files) or (before is not None and before.pins)
        event, traced, recorded = self._events.pop((column, state.round), None), "", ""
        # A round that is trained again, to the same bytes, is traced and on record already.
        if event is not None and (column, state.round) not in self.journal.traced:
            traced = event_line(event).decode()
            if self.record.head == START:
                recorded = self.record.append(beginning(self.path, late=bool(self.journal.columns)))
            recorded += self.record.append(round_entry(column, event.report, digest))
        entry = RoundEntry(
            column=column,
            round=state.round,
            state=digest,
            private={store: [one[:3] for one in files] for store, files in staged.items() if files},
            best=state.best_round if pins else -1,
            flying=bool(state.in_flight),
            traced=traced,
            record=recorded,
        )
        if self._history and state.round % self._history == 0 and column.startswith("federated/"):
            retain_checkpoint(path, state.round)
        now = self.seconds()
        self._start = time.monotonic()
        self.journal.commit(entry, seconds=now, joules=self.joules())

    def _staged(self, store: Path) -> list[Staged]:
        return take_staged(store, self._lists.setdefault(store, {}))

    def checkpoint(self, column: str, grid: str) -> Path:
        """File of a column's server state, as the first rank has left it: all ranks meet here."""
        self.ranks.wait()
        return self.path / "state" / column / grid / "server.safetensors"

    def clients(self, column: str, grid: str) -> Path:
        """Folder of a column's private client state."""
        return self.path / "state" / column / grid / "clients"

    def finished(self) -> dict[tuple[str, str], int]:
        """Rounds on disk, by (column, grid)."""
        found = sorted((self.path / "state").glob("*/*/server.safetensors"))
        return {(f.parent.parent.name, f.parent.name): load_state(f).round for f in found}

    def tree(self, name: str, make: Callable[[], Tree], *, alone: bool = False) -> Tree:
        """A tree made once and read back ever after; one that is damaged is made again.

        Args:
            name: What it is called.
            make: Makes it, with all ranks together.
            alone: The first rank makes it by itself, and the others wait.
        """
        if self.ranks.ask_first(lambda: not self._whole(name)):
            made = make() if self.ranks.first or not alone else {}
            if self.ranks.first:
                self._store_tree(name, made)
            self.ranks.wait()
        return load_tree(self._score(name))[0]

    def trees(self, makes: Mapping[str, Callable[[], Tree]]) -> list[Tree]:
        """Trees of those names, each made once by one of the ranks, which take turns, and read back ever after."""
        missing: list[str] = self.ranks.ask_first(lambda: [name for name in makes if not self._whole(name)])
        for name in missing[self.ranks.rank :: self.ranks.size]:
            self._store_tree(name, makes[name]())
        self.ranks.wait()
        return [load_tree(self._score(name))[0] for name in makes]

    def _store_tree(self, name: str, tree: Tree) -> None:
        save_tree(self._score(name), tree, {"name": name, "sha256": digest(tree)})

    def _whole(self, name: str) -> bool:
        """Whether a tree is there, and is what was written under this name."""
        file = self._score(name)
        if not file.exists():
            return False
        try:
            tree, header = load_tree(file)
            if (not self._strict and not header) or header == {"name": name, "sha256": digest(tree)}:
                return True
        except LichenError:
            pass
        self._say(f"{file}: is damaged, and is made again")
        return False

    def _score(self, name: str) -> Path:
        return self.path / "state" / "scores" / f"{name}.safetensors"

    def number(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that the first rank makes once, read back ever after."""
        return self.tree(name, lambda: {"value": make()}, alone=True)["value"]

    def write_json(self, name: str, value: Any, *, shared: bool = False) -> Path:
        """Write JSON atomically, on the first rank; NaN is refused."""
        file = self.path / name
        if self.ranks.first:
            write_atomic(file, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), shared=shared)
        return file


def _private_files(store: Path) -> list[tuple[int, int, str]]:
    """Client, version and digest of all that lies in a store's folder."""
    found = []
    for path in sorted(store.glob("*/*/*.safetensors")):
        with suppress(ValueError):
            client = 1000 * int(path.parts[-3]) + int(path.parts[-2])
            found.append((client, int(path.stem), file_digest(path) or ""))
    return sorted(found, key=lambda one: one[1])


def _former_number(file: Path) -> float | None:
    try:
        found = float(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if 0 <= found < float("inf") else None


def save_roster(folder: RunFolder, roster: Roster, cards: Cards) -> None:
    """Write down who takes part, as each has declared itself, and the data cards of their rows where there are any."""
    folder.write_json("roster.json", roster.dump())
    about = cards.summary(roster.names)
    if about["cards"] or about["cards_left"]:
        folder.write_json("cards.json", about)
