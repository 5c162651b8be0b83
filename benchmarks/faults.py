"""What becomes of a run over three real sites whose processes are killed, whose links are cut, whose disks fill.

``cells``     runs with three faults each, of all kinds: the seed gives them and their moments
``long``      the same, with rounds of seconds: kills come in the middle of a training
``chat``      the same over a language model, nine people and nine rounds of seconds
``resumes``   runs whose ``lichen submit`` is killed at a seeded moment and resumed
``deadline``  runs with a deadline, in which a site's end stands still behind a live connection
``clocks``    sites whose clock is a day off

Everything runs on this machine: one ``lichen serve``, three ``lichen join``, each behind a relay, NVFlare's four
processes, and a ``lichen submit`` for each run. ``python benchmarks/faults.py --take cells 20`` runs the first twenty
that are not in ``results/faults.json`` yet (it needs the right to mount a small disk); ``python benchmarks/faults.py
cells`` prints their table from there, and so on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faults_course import KINDS, PATIENCE, SAYS, Course, Fault, Length, faults_of, learned, recipe_of
from faults_trial import SITES, EndedError, Trial, wait_until

RESULT = Path(__file__).parent / "results" / "faults.json"
SEEDS = 5
"""Fault-free runs, with which the others' quality is compared, and whose bytes they must have."""

DEADLINE = 5.0


# --- what is taken ---------------------------------------------------------------------------------------------------


def simulated(home: Path, seed: int, length: Length) -> dict[str, Any]:
    """A run of a seed without a network and without faults."""
    import lichen

    recipe = recipe_of(seed, length)
    recipe["data"]["name"] = str(home / "sites")
    run = home / f"simulated-{seed}"
    done = lichen.run(recipe, out=run)
    return {"score": done.summary["columns"]["federated"]["mean"], "learned": learned(run)}


def cell(trial: Trial, run: Path, seed: int, length: Length = "short") -> dict[str, Any]:
    """A run with three faults."""
    faults = faults_of(seed, length)
    course = Course(trial, run, recipe_of(seed % SEEDS, length))
    course.begin()
    hit = [course.apply(fault) for fault in faults]
    course.end()
    return {"faults": [asdict(fault) for fault in faults], "hit": hit, **course.result()}


def long_cell(trial: Trial, run: Path, seed: int) -> dict[str, Any]:
    """A run whose rounds take seconds, with three faults of other seeds."""
    return cell(trial, run, 20 + seed, "long")


def chat_cell(trial: Trial, run: Path, seed: int) -> dict[str, Any]:
    """A run of a language model, with three faults; four of them have each kind once."""
    return cell(trial, run, seed, "chat")


def resumed(trial: Trial, run: Path, seed: int) -> dict[str, Any]:
    """A run whose ``lichen submit`` is killed at any moment, from its first file on."""
    from lichen.core.seeds import numpy_generator

    after = round(float(numpy_generator(seed, "faults, resumes").uniform(0.0, 5.0)), 2)
    course = Course(trial, run, recipe_of(0))
    course.begin()
    wait_until((run / "state" / "run.json").exists, PATIENCE, "submit")
    time.sleep(after)
    before, hit = course.rounds(), trial.kill("submit", "")
    course.resume(before)
    course.end()
    return {"after": after, "hit": hit, "before": before, **course.result()}


def half_open(trial: Trial, run: Path, seed: int) -> dict[str, Any]:
    """A run with a deadline of five seconds; a site's NVFlare process stands still for twelve."""
    recipe = recipe_of(seed % SEEDS, deadline=DEADLINE)
    course = Course(trial, run, recipe)
    course.begin()
    fault = Fault(kind="stop site link", site=SITES[seed % 3], round=3, delay=0.2, seconds=12.0)
    hit = course.apply(fault)
    course.end()
    return {"hit": [hit], "faults": [asdict(fault)], **course.result()}


WHOSE = (("north", -1), ("north", 1), ("serve", -1), ("serve", 1))
"""Whose clock is off, and by how many days."""


def clock(trial: Trial, run: Path, seed: int) -> dict[str, Any]:
    """A run in which one clock is a day off, of processes that begin so."""
    name, days = WHOSE[seed]
    process = trial.running.pop(name, None)
    if process is not None:
        process.terminate()
        process.wait()
    trial.clocks = {name: days}
    try:
        course = Course(trial, run, recipe_of(seed % SEEDS))
        course.begin()
        course.end()
        return {"clock": [name, days], **course.result()}
    finally:
        trial.clocks = {}
        trial.running[name].terminate()
        trial.running.pop(name).wait()


FAMILIES: dict[str, Callable[[Trial, Path, int], dict[str, Any]]] = {
    "cells": cell,
    "long": long_cell,
    "chat": chat_cell,
    "resumes": resumed,
    "deadline": half_open,
    "clocks": clock,
}


def take(family: str, count: int) -> None:
    """Run the first so many of a family that have no result yet, and keep each as it comes."""
    known = _known()
    with tempfile.TemporaryDirectory(prefix="lichen-faults-", ignore_cleanup_errors=True) as folder:
        trial = Trial(Path(folder) / "home", chat=family == "chat")
        try:
            fault_free = known.setdefault(_fault_free(family), {})
            for seed in range(SEEDS):
                if str(seed) not in fault_free:
                    fault_free[str(seed)] = simulated(trial.home, seed, _length(family))
                    _keep(known)
            for seed in range(count):
                if str(seed) in known.setdefault(family, {}):
                    continue
                begun = time.monotonic()
                try:
                    found = FAMILIES[family](trial, trial.home / "runs" / f"{family}-{seed}", seed)
                    shutil.rmtree(trial.home / "runs" / f"{family}-{seed}")
                except EndedError as ended:
                    found = {"ended": ended.name, "said": ended.said}
                    trial.kill("submit", "")
                    aside = Path(tempfile.mkdtemp(prefix="lichen-faults-left-"))
                    shutil.copytree(trial.home, aside, dirs_exist_ok=True, symlinks=True, ignore=_no_sockets)
                    print(f"{family} {seed} did not end; its folders are in {aside}", file=sys.stderr, flush=True)
                known = _known()
                known.setdefault(family, {})[str(seed)] = {**found, "wall": round(time.monotonic() - begun, 1)}
                _keep(known)
                print(family, seed, json.dumps({k: v for k, v in found.items() if k != "seconds"}), flush=True)
        finally:
            trial.close()
            subprocess.run(["umount", str(trial.home / "small")], check=False)


def _length(family: str) -> Length:
    return "chat" if family == "chat" else "long" if family == "long" else "short"


def _fault_free(family: str) -> str:
    length = _length(family)
    return "simulated" if length == "short" else f"simulated, {length}"


def _no_sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in ("run", "supervisor")]


def _known() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}


def _keep(known: Mapping[str, Any]) -> None:
    RESULT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


# --- tables ----------------------------------------------------------------------------------------------------------


def _row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def _found(family: str) -> list[tuple[int, dict[str, Any]]]:
    return sorted((int(seed), one) for seed, one in _known().get(family, {}).items())


def _equal(one: Mapping[str, Any], seed: int, family: str = "") -> bool:
    return bool(one["learned"] == _known()[_fault_free(family)][str(seed)]["learned"])


def _missing(one: Mapping[str, Any]) -> str:
    """Answers that did not count, by what the trace says of each."""
    words = {named["what"] for named in one["named"]}
    return ", ".join(f"{count} ({'; '.join(sorted(words)) or why})" for why, count in one["missing"].items()) or "-"


def kinds_table() -> None:
    """Each kind of fault: what it is, and how often it hit a run."""
    _row("fault", "what", "times")
    _row("---", "---", "---:")
    cells = [cell for family in ("cells", "long", "chat") for _, cell in _found(family) if "hit" in cell]
    hit = [one["kind"] for cell in cells for one, did in zip(cell["faults"], cell["hit"], strict=True) if did]
    for kind in KINDS:
        _row(kind, SAYS[kind], hit.count(kind))


def cells_table(family: str = "cells") -> None:
    """Each run with faults."""
    scores = [one["score"] for one in _known()[_fault_free(family)].values()]
    mean, sd = statistics.mean(scores), statistics.stdev(scores)
    score = "perplexity" if family == "chat" else "accuracy"
    _row("seed", "faults, and after which round", "submits", "rounds lost", "no answer", score, "sd off", "bytes")
    _row("---:", "---", "---:", "---:", "---", "---:", "---:", "---")
    for seed, one in _found(family):
        if "ended" in one:
            _row(seed, "did not end", *["-"] * 6)
            continue
        faults = ", ".join(
            f"{fault['kind']} {fault['site'] if at_site(fault['kind']) else ''}".strip() + f" {fault['round']}"
            for fault, did in zip(one["faults"], one["hit"], strict=True)
            if did
        )
        equal = "equal" if _equal(one, seed % SEEDS, family) else "other"
        off = f"{(one['score'] - mean) / sd:+.1f}"
        _row(seed, faults, one["commands"], one["lost"], _missing(one), f"{one['score']:.4f}", off, equal)


def at_site(kind: str) -> bool:
    """Whether a kind of fault comes at a site."""
    return kind not in ("kill serve", "kill submit", "kill server link")


def once_table() -> None:
    """How often sites trained one and the same thing."""
    _row("runs", "pairs", "trained", "again, after a kill before it was saved", "again otherwise")
    _row("---", "---:", "---:", "---:", "---:")
    for family in ("cells", "long", "chat", "resumes", "deadline"):
        if not (some := [one for _, one in _found(family) if "pairs" in one]):
            continue
        _row(
            f"{len(some)} {family}",
            *(f"{sum(one[name] for one in some):,}" for name in ("pairs", "trained", "again", "twice")),
        )


def resumes_table() -> None:
    """Each run whose command was killed and resumed."""
    _row("seed", "killed after (s)", "rounds whole", "rounds lost", "trained again", "bytes")
    _row("---:", "---:", "---:", "---:", "---:", "---")
    for seed, one in _found("resumes"):
        if "ended" in one or not one["hit"]:
            _row(seed, one.get("after", "-"), "did not end" if "ended" in one else "too late", *["-"] * 3)
            continue
        _row(seed, one["after"], one["before"], one["lost"], one["again"], "equal" if _equal(one, 0) else "other")


def deadline_table() -> None:
    """Each run in which a site stands still behind a live connection."""
    _row("seed", "site", "longest rounds (s)", "no answer", "accuracy")
    _row("---:", "---", "---", "---", "---:")
    for seed, one in _found("deadline"):
        long = ", ".join(f"{seconds:.2f}" for seconds in one["seconds"] if seconds > 1)
        _row(seed, one["faults"][0]["site"], long, _missing(one), f"{one['score']:.4f}")


def clocks_table() -> None:
    """Each clock that is a day off."""
    _row("clock of", "days", "rounds", "no answer", "bytes")
    _row("---", "---:", "---:", "---", "---")
    for seed, one in _found("clocks"):
        if "ended" in one:
            _row(*WHOSE[seed], "did not end", "-", "-")
        else:
            _row(*one["clock"], one["rounds"], _missing(one), "equal" if _equal(one, seed % SEEDS) else "other")


TABLES: Mapping[str, Callable[[], None]] = {
    "kinds": kinds_table,
    "cells": cells_table,
    "long": lambda: cells_table("long"),
    "chat": lambda: cells_table("chat"),
    "once": once_table,
    "resumes": resumes_table,
    "deadline": deadline_table,
    "clocks": clocks_table,
}


def main() -> None:
    """Take, or print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--take", nargs=2, metavar=("FAMILY", "COUNT"))
    parser.add_argument("table", nargs="?", choices=TABLES)
    given = parser.parse_args()
    if given.table:
        TABLES[given.table]()
    if given.take:
        if "LICHEN_FAULTS" not in os.environ:  # a small disk is mounted: in a namespace of its own
            os.environ["LICHEN_FAULTS"] = "1"
            os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])
        take(given.take[0], int(given.take[1]))


if __name__ == "__main__":
    main()
