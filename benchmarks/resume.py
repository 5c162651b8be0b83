"""Does a run that is killed and resumed end in the bytes of one that was left alone?

A recipe is run once without interruption. Then, again and again, it is started in a process of its
own, killed (SIGKILL) at a random moment drawn from a seed, resumed with ``lichen run --resume``, and
compared: the adapter or model, every checkpoint, every client's private state, every score, and the
trace and the summary except for the seconds and the memory in them. Of a recipe with stages that is so of every stage,
of the whole models between them, and of their table.

Run it: ``python benchmarks/resume.py digits --kills 10``, with ``-s key=value`` for the recipe's keys.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lichen.core.files.record import RECORD, chain
from lichen.core.seeds import numpy_generator
from lichen.recipes.artifacts.verify import MANIFEST
from lichen.recipes.stages.folder import staged_of

MEASURED = ("seconds", "peak_memory_bytes", "energy_joules")
"""Keys of trace and summary that differ from run to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One killed and resumed run.

    Attributes:
        after: Seconds from the run's first file, or first round, to the kill.
        hit: Whether the run was still going.
        rounds: Rounds in the trace at the kill; with stages, in all of their traces.
        differing: Files whose bytes differ from the uninterrupted run's, or that only one of them has.
    """

    after: float
    hit: bool
    rounds: int
    differing: tuple[str, ...]


def result_bytes(folder: Path) -> dict[str, bytes]:
    """What a run must repeat, by file; of a folder of stages, what each of them must, and their table."""
    staged = staged_of(folder)
    if staged is None:
        return _run_bytes(folder)
    found = {}
    for stage in staged.stages:
        for name, content in _run_bytes(folder / stage.folder).items():
            found[f"{stage.folder}/{name}"] = content
    rows = json.loads((folder / "stages.json").read_text())
    found["stages.json"] = json.dumps([_lasting(row) for row in rows], sort_keys=True).encode()
    return found


def _run_bytes(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        learned = name.endswith(".safetensors") or name.startswith(("adapter/", "model/"))
        if learned and file.is_file() and file.name != MANIFEST:  # which a key of the run's own has signed
            found[name] = file.read_bytes()
    lines = (folder / "trace.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    found["trace.jsonl"] = json.dumps([_lasting(json.loads(line)) for line in lines]).encode()
    rounds = [line for line in chain(folder / RECORD)[0] if line["kind"] == "round"]
    lasting = [[line[name] for name in ("column", "round", "asked", "counted", "state")] for line in rounds]
    found[RECORD] = json.dumps(lasting).encode()
    found["summary.json"] = json.dumps(_lasting(summary), sort_keys=True).encode()
    return found


def _lasting(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in MEASURED}


def _start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lichen", "run", *words, "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a run ended with {process.returncode}: {said.decode(errors='replace')}")


def _begun(process: subprocess.Popen[bytes], file: Path) -> float:
    """Wait for a file of the run; the time it appeared."""
    while not file.exists():
        if process.poll() is not None:
            _finish(process)
            break
        time.sleep(0.01)
    return time.monotonic()


def uninterrupted(recipe: str, folder: Path, *, settings: Sequence[str] = ()) -> tuple[dict[str, bytes], float]:
    """``(result, seconds)`` of a run that nobody disturbs, from its first file to its end."""
    process = _start([recipe, "--out", str(folder), *_flags(settings)])
    begun = _begun(process, folder / "recipe.yaml")
    _finish(process)
    return result_bytes(folder), time.monotonic() - begun


def _flags(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("-s", setting)]


def by_command(folder: Path) -> None:
    """Go on with a run in a process of its own."""
    _finish(_start(["--resume", str(folder)]))


def kill_and_resume(
    recipe: str,
    folder: Path,
    wanted: dict[str, bytes],
    *,
    after: float,
    settings: Sequence[str] = (),
    since: str = "recipe.yaml",
    go_on: Callable[[Path], object] = by_command,
) -> Kill:
    """Run, kill ``after`` seconds from when the file ``since`` appears, resume, compare with ``wanted``."""
    process = _start([recipe, "--out", str(folder), *_flags(settings)])
    time.sleep(max(0.0, _begun(process, folder / since) + after - time.monotonic()))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    rounds = sum(trace.read_bytes().count(b"\n") for trace in folder.rglob("trace.jsonl"))
    go_on(folder)
    got = result_bytes(folder)
    differing = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    return Kill(after=after, hit=process.returncode == -signal.SIGKILL, rounds=rounds, differing=tuple(differing))


def kills(
    recipe: str,
    folder: Path,
    *,
    count: int,
    seed: int,
    settings: Sequence[str] = (),
    show: Callable[[Kill], None] = lambda _: None,
) -> list[Kill]:
    """One uninterrupted run, then killed ones until ``count`` of them were hit while they ran.

    Moments are drawn up to the length of the run; one that comes too late (a machine's pace changes)
    is kept in the list, and the next are drawn up to three quarters of it.
    """
    home = folder / "run"  # of all of them, since a stage's recipe and adapter name the folder of the one before
    wanted, horizon = uninterrupted(recipe, home, settings=settings)
    generator, done = numpy_generator(seed, "kills"), []
    while sum(kill.hit for kill in done) < count and len(done) < 4 * count:
        after = float(generator.uniform(0, horizon))
        shutil.rmtree(home)
        done.append(kill_and_resume(recipe, home, wanted, after=after, settings=settings))
        show(done[-1])
        if not done[-1].hit:
            horizon = 0.75 * after
    return done


def _print_row(kill: Kill) -> None:
    equal = "yes" if not kill.differing else f"no: {', '.join(kill.differing[:3])}"
    print(f"| {kill.after:.2f} | {'yes' if kill.hit else 'no'} | {kill.rounds} | {equal} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recipe", help="a YAML file or a gallery name")
    parser.add_argument("--kills", type=int, default=10, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="for the recipe")
    given = parser.parse_args()
    print("| kill after (s) | still running | rounds on disk | bytes equal |")
    print("|---:|---|---:|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="lichen-resume-") as folder:
        done = kills(
            given.recipe, Path(folder), count=given.kills, seed=given.seed, settings=given.set, show=_print_row
        )
    hit = [kill for kill in done if kill.hit]
    print(f"{sum(not kill.differing for kill in hit)} of {len(hit)} killed and resumed runs equal")


if __name__ == "__main__":
    main()
