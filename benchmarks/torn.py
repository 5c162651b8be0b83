"""Damages run folders and the cache, kills runs and cuts the power, and counts what comes of it.

    python benchmarks/torn.py mutate 10000     # one damaged file of a run's folder, then read it and go on
    python benchmarks/torn.py cache 1000       # one damaged file of a data set in the cache, then read its rows
    python benchmarks/torn.py kill 85          # SIGKILL at a random moment, then resume
    python benchmarks/torn.py write 50         # SIGKILL at a random write, rename or sync, then resume
    python benchmarks/torn.py power 20         # the same, and what was not forced to the disk is lost

What may come of each: ``equal`` (the bytes of the run that nothing happened to) or ``named`` (one LichenError). What
may not: ``other`` (other numbers, and nothing said) and ``crash`` (anything else than a LichenError).

A power cut is simulated: of every folder, by the toss of a coin, all new names since the folder was last forced to the
disk are taken back, and files that were never forced to it are cut to what was.
"""

from __future__ import annotations

import argparse
import builtins
import copy
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lichen
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.recipes import run as running
from lichen.recipes.artifacts.use.finished import load_finished
from lichen.recipes.schema import read as reading
from lichen.recipes.schema.read import read_recipe, recipe_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["CHANGES", "OUTCOMES", "Bench", "cache_outcome", "mutate"]

OUTCOMES = ("equal", "named", "other", "crash")
SIGNED_ANEW = ("manifest.json", "record.json", "MANIFEST.json")
"""They hold times, or what a key of the run's own has signed."""
CHANGES = ("flip", "cut", "empty", "delete", "swap", "copy", "append", "twice")
RECIPE = (
    *("federation.rounds=5", "optimizer.lr=0.3", "data.max_rows=100", "data.partition.clients=4", "data.test=0.2"),
    *("federation.local_steps=2", "federation.clients_per_round=2", "federation.valid_every=1"),
    *("wire.up=[topk:8/256]", "engine.clients_per_block=2", "data.partition.alpha=10", "compare.baselines=[alone]"),
)


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one file below a folder, and say what was done."""
    every = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("lock", "crash.txt"))
    others = [p for p in every if "clients" not in p.parts[len(folder.parts) :]]
    path, other = rng.choice(rng.choice((every, others))), rng.choice(every)
    change, data = rng.choice(CHANGES), path.read_bytes()
    if change == "delete":
        path.unlink()
    elif change == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif change == "copy":
        path.write_bytes(other.read_bytes())
    else:
        place = rng.randrange(len(data)) if data else 0
        flipped = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :] if data else b"?"
        made = {
            "flip": flipped,
            "cut": data[:place],
            "empty": b"",
            "append": data + rng.randbytes(9),
            "twice": data * 2,
        }
        path.write_bytes(made[change])
    return f"{change} {path.relative_to(folder)}" + (
        f" {other.relative_to(folder)}" if change in ("swap", "copy") else ""
    )


class Bench:
    """A run that nothing happened to, and the folders that are damaged.

    Args:
        home: A folder for all of it.
        recipe: What is run.
    """

    def __init__(self, home: Path, recipe: Recipe | None = None) -> None:
        for name in ("curves_png", "clients_png"):  # half of the time, and nothing of it is read again
            setattr(running, name, lambda *_, **__: None)
        known = functools.cache(reading.load_yaml)
        reading.load_yaml = lambda text, where="": copy.deepcopy(known(text, where=where))
        self.home, self.recipe = home, recipe or read_recipe("digits", RECIPE)
        self.whole, self.halves = home / "whole", []
        self.events = 0
        lichen.run(self.recipe, out=self.whole, observers=[self._count])
        self.after = self.told(self.whole)
        for stop in sorted({2, 3, self.events // 2 + 1, self.events - 1}):
            self.halves.append(self._half(stop))

    def _count(self, event: Any) -> None:
        self.events += 1

    def _half(self, stop: int) -> Path:
        """A folder as a kill leaves it after so many told rounds, before the last one's state is written."""
        folder, seen = self.home / f"half-{stop}", 0

        def kill(event: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt

        try:
            lichen.run(self.recipe, out=folder, observers=[kill])
        except KeyboardInterrupt:
            return folder
        raise AssertionError("it ended before")

    @staticmethod
    def told(folder: Path) -> dict[str, Any]:
        """All that a finished folder tells, without times."""
        summary = json.loads((folder / "summary.json").read_text())
        for name in ("seconds", "peak_memory_bytes", "energy_joules", "versions"):
            del summary[name]
        lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
        for line in lines:
            del line["seconds"]
        shown = [p for p in sorted(folder.rglob("*")) if p.suffix in (".safetensors", ".csv", ".json")]
        files = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in shown
            if p.name not in (*SIGNED_ANEW, "summary.json") and "state" not in p.relative_to(folder).parts[:1]
        }
        final = (folder / "state" / "final.safetensors").read_bytes()
        return {"summary": summary, "trace": lines, "files": files, "final": final}

    def resumed(self, folder: Path) -> str:
        """What comes of going on."""
        return outcome(
            lambda: lichen.run(recipe_of(folder), out=folder, resume=True), lambda: self.told(folder) == self.after
        )

    def looked_at(self, folder: Path) -> str:
        """What comes of reading a finished run: its summary, its clients and its tensors."""
        found: list[Any] = []

        def look() -> None:
            result = lichen.report(folder).runs[0]
            _, tree = load_finished(folder)
            found.append((result.summary, result.clients(), trees.digest(tree)))

        if not self.__dict__.get("seen"):
            result = lichen.report(self.whole).runs[0]
            self.seen = (result.summary, result.clients(), trees.digest(load_finished(self.whole)[1]))
        return outcome(look, lambda: found[0] == self.seen)

    def mutated(self, seed: int) -> tuple[str, str]:
        """One damaged file, and what comes of it: the worse of reading and going on."""
        rng = random.Random(f"torn {seed}")
        source = rng.choice([self.whole, *self.halves])
        folder = self.home / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        what = f"{source.name}: {mutate(folder, rng)}"
        looked = self.looked_at(folder) if source == self.whole else "equal"
        resumed = self.resumed(folder)
        return max(looked, resumed, key=OUTCOMES.index), what

    def killed(self, seed: int, how: str) -> tuple[str, str]:
        """A run that is killed again and again until it ends, at most three times."""
        rng = random.Random(f"{how} {seed}")
        folder = self.home / f"killed-{how}"
        shutil.rmtree(folder, ignore_errors=True)
        kills = 0
        while kills < 3:
            span = 1.0 if kills == 0 else 0.5
            child = os.fork()
            if not child:
                self._child(folder, rng, how, span)
            if how == "kill":
                time.sleep(rng.random() * span * SECONDS)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                break
            kills += 1
        if not (folder / "recipe.yaml").exists():
            shutil.rmtree(folder, ignore_errors=True)
            lichen.run(self.recipe, out=folder)
            return ("equal" if self.told(folder) == self.after else "other"), f"{kills} kills, nothing kept"
        return self.resumed(folder), f"{kills} kills"

    def _child(self, folder: Path, rng: random.Random, how: str, span: float) -> None:
        try:
            if how != "kill":
                Cut(folder, rng.randrange(1, max(2, int(span * OPERATIONS))), rng if how == "power" else None)
            lichen.run(self.recipe, out=folder, resume=(folder / "recipe.yaml").exists())
            os._exit(0)
        except BaseException as error:
            print(f"  child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)


SECONDS, OPERATIONS = 2.0, 400
"""How long a run takes, and how many writes, renames and syncs it makes; measured before the first kill."""


def outcome(do: Callable[[], object], equal: Callable[[], bool]) -> str:
    """What comes of doing something with what was damaged."""
    try:
        do()
    except LichenError as error:
        return "named" if error.where else "crash"
    except Exception as error:
        if os.environ.get("TORN_TELL"):
            import traceback

            traceback.print_exception(error)
        return "crash"
    try:
        return "equal" if equal() else "other"
    except OSError:  # a file that the run had is gone, and nothing was said
        return "other"


class Cut:
    """Counts operations on files and kills this process at one of them; with a generator, as a power cut does.

    Args:
        top: Where files are looked after.
        at: The operation.
        rng: Tosses the coins of a power cut.
    """

    def __init__(self, top: Path, at: int, rng: random.Random | None) -> None:
        self.top, self.at, self.rng, self.count = str(top), at, rng, 0
        self.pending: list[tuple[str, Callable[[], None]]] = []
        self.synced: dict[int, int] = {}
        self.touched: set[str] = set()
        self.real = {
            name: getattr(os, name) for name in ("replace", "rename", "fsync", "link", "unlink", "mkdir", "open")
        }
        for name in self.real:
            setattr(os, name, getattr(self, f"_{name}"))
        self.builtin = builtins.open
        builtins.open = self._builtin_open  # type: ignore[assignment]
        io.open = self._builtin_open  # type: ignore[assignment]

    def _tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            if self.rng is not None:
                self._lose(self.rng)
            os.kill(os.getpid(), signal.SIGKILL)

    def _mine(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.top)

    def _lose(self, rng: random.Random) -> None:
        for name, real in self.real.items():
            setattr(os, name, real)
        builtins.open = io.open = self.builtin  # type: ignore[assignment]
        for path in self.touched:
            if os.path.isfile(path):
                about = os.stat(path)
                if self.synced.get(about.st_ino, 0) < about.st_size:
                    os.truncate(path, self.synced.get(about.st_ino, 0))
        lost = {folder: rng.random() < 0.5 for folder, _ in self.pending}
        for folder, undo in reversed(self.pending):
            if lost[folder]:
                with suppress(OSError):
                    undo()

    def _name(self, path: Any, undo: Callable[[], None]) -> None:
        self.pending.append((os.path.dirname(os.path.abspath(path)), undo))

    def _replace(self, source: Any, target: Any) -> None:
        self._tick()
        real = self.real
        if self._mine(target):
            target, source = os.path.abspath(target), os.path.abspath(source)
            if os.path.isdir(source):
                undo = lambda: real["rename"](target, source)  # noqa: E731
            else:
                aside = f"{target}.aside{self.count}" if self.rng is not None and os.path.exists(target) else ""
                if aside:
                    real["link"](target, aside)

                def undo() -> None:
                    real["link"](target, source)
                    real["unlink"](target)
                    if aside:
                        real["link"](aside, target)

            real["replace"](source, target)
            self.touched.add(target)
            self._name(target, undo)
        else:
            real["replace"](source, target)
        self._tick()

    _rename = _replace

    def _fsync(self, handle: int) -> None:
        self._tick()
        path = os.readlink(f"/proc/self/fd/{handle}")
        about = os.fstat(handle)
        if os.path.isdir(path):
            self.pending = [one for one in self.pending if one[0] != path]
            for name in os.listdir(path):
                if ".aside" in name:
                    self.real["unlink"](f"{path}/{name}")
        else:
            self.synced[about.st_ino] = about.st_size
        self._tick()

    def _link(self, source: Any, target: Any, **options: Any) -> None:
        self._tick()
        self.real["link"](source, target, **options)
        if self._mine(target):
            self._name(target, lambda: self.real["unlink"](target))

    def _unlink(self, path: Any, **options: Any) -> None:
        self._tick()
        if self._mine(path) and not options and os.path.isfile(path) and not os.path.islink(path):
            data, file = self.builtin(path, "rb").read(), os.path.abspath(path)
            self._name(path, lambda: Path(file).write_bytes(data) and None)
        self.real["unlink"](path, **options)

    def _mkdir(self, path: Any, *args: Any, **options: Any) -> None:
        self._tick()
        self.real["mkdir"](path, *args, **options)
        if self._mine(path):
            self._name(path, lambda: shutil.rmtree(path))

    def _new(self, path: Any) -> None:
        if self._mine(path):
            self.touched.add(os.path.abspath(path))
            self._name(path, lambda: self.real["unlink"](path))

    def _open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        new = flags & os.O_CREAT and not os.path.exists(path)
        if new:
            self._tick()
        handle: int = self.real["open"](path, flags, *args, **options)
        if new:
            self._new(path)
        return handle

    def _builtin_open(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        writes = isinstance(path, (str, os.PathLike)) and set(mode) & set("wax+")
        if writes:
            new = not os.path.exists(path)
            self._tick()
            file = self.builtin(path, mode, *args, **options)
            if self._mine(path):
                about = os.fstat(file.fileno())
                self.touched.add(os.path.abspath(path))
                self.synced.setdefault(about.st_ino, about.st_size)
            if new:
                self._new(path)
            return file
        return self.builtin(path, mode, *args, **options)


def cache_entry(home: Path) -> Path:
    """A data set as it lies in the cache, made up: sixty questions in three files."""
    from lichen.data.sources.entries import CATALOG

    os.environ["LICHEN_CACHE"] = str(home)
    folder = home / f"medmcqa-{CATALOG['medmcqa'].sha256[:12]}"
    folder.mkdir(parents=True)
    for place, name in enumerate(("anatomy", "dental", "surgery")):
        rows = [
            {"question": f"Which is number {i} of {name}?", "options": f"A: {i} B: {place}", "answer": "AB"[i % 2]}
            for i in range(20)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        from lichen.data.sources.sealed import seal_entry
    except ImportError:
        return folder
    seal_entry(folder, folder.name)
    return folder


def cache_outcome(home: Path, seed: int) -> tuple[str, str]:
    """One damaged file of a data set in the cache, and what comes of reading its rows."""
    from lichen.data.sources.records import load_records

    rng, folder = random.Random(f"cache {seed}"), home / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    entry = cache_entry(folder)
    before = load_records("medmcqa", columns={})
    what = mutate(entry, rng)
    found: list[Any] = []
    return outcome(lambda: found.append(load_records("medmcqa", columns={})), lambda: found[0] == before), what


def measure(bench: Bench) -> None:
    """How long a run takes here, and how many operations on files it makes."""
    global SECONDS, OPERATIONS
    folder, start = bench.home / "measured", time.monotonic()
    lichen.run(bench.recipe, out=folder)
    SECONDS = time.monotonic() - start
    read, write = os.pipe()
    child = os.fork()
    if not child:
        cut = Cut(bench.home / "counted", 10**9, None)
        lichen.run(bench.recipe, out=bench.home / "counted")
        os.write(write, str(cut.count).encode())
        os._exit(0)
    os.waitpid(child, 0)
    OPERATIONS = int(os.read(read, 20))
    print(f"a run takes {SECONDS:.2f} s and {OPERATIONS} operations on files")


def tries(what: str, count: int, first: int) -> Iterator[tuple[str, str]]:
    """So many of one kind."""
    with tempfile.TemporaryDirectory() as home:
        if what == "cache":
            yield from (cache_outcome(Path(home), seed) for seed in range(first, first + count))
            return
        bench = Bench(Path(home))
        if what != "mutate":
            measure(bench)
        for seed in range(first, first + count):
            yield bench.mutated(seed) if what == "mutate" else bench.killed(seed, what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mutate", "cache", "kill", "write", "power"])
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    asked = parser.parse_args()
    found: Counter[str] = Counter()
    start = time.monotonic()
    for one, told in tries(asked.what, asked.count, asked.first):
        found[one] += 1
        if found.total() % 500 == 0:
            print(f"  {found.total()}: {dict(found)}", flush=True)
        if one in ("other", "crash"):
            print(f"{one}: {told}", flush=True)
    seconds = time.monotonic() - start
    print(f"{asked.what} {asked.count}: {', '.join(f'{found[one]} {one}' for one in OUTCOMES)}; {seconds:.0f} s")


if __name__ == "__main__":
    main()
