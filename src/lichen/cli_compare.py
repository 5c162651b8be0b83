"""The command ``compare``: runs several recipes over several seeds and prints one table.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lichen.core.errors import LichenError
from lichen.shell import crash_in, log, print_json, say, show

if TYPE_CHECKING:
    from lichen.recipes.compare import Compared
    from lichen.recipes.comparison import Comparison

__all__ = ["compare_command"]


def compare_command(
    *recipes: str,
    set_: Annotated[tuple[str, ...], Parameter(name=["-s", "--set"])] = (),
    seeds: str | None = None,
    only: str | None = None,
    minutes: float | None = None,
    out: Path | None = None,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Run several recipes over several seeds, and give one table of them.

    Called again, it goes on where it was stopped; what is finished is not run again.

    Parameters
    ----------
    recipes
        YAML files or recipes of `lichen list`; or one comparison: a YAML file with a base recipe and named methods.
    set_
        Another value for a key of all recipes, as key=value; may be given several times.
    seeds
        Seeds with commas between them; 0,1,2 or the comparison's own if not given.
    only
        Run only these methods, or METHOD@LEVEL, with commas between them; the table shows all that is finished.
    minutes
        Start no new run after so many minutes; the same command goes on.
    out
        The comparison's folder; runs/compare-NAME if not given.
    quiet
        Show no progress.
    json
        Print the table as JSON, and nothing else, on standard output.
    """
    if not recipes:
        raise LichenError("no recipe", where="lichen compare", fix="name YAML files, or recipes of `lichen list`")
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        raise LichenError(
            "was started as several ranks",
            where="lichen compare",
            fix="start one process, with engine.name=distributed",
        )
    if minutes is not None and not 0 < minutes < float("inf"):
        raise LichenError(f"{minutes} is no time to work", where="--minutes", fix="give a positive number")
    requested = _seeds(seeds)

    from lichen.recipes.comparison import read_comparison

    with redirect_stdout(sys.stderr):
        known = read_comparison(recipes, overrides=set_, seeds=requested, note=log)
    chosen = None if only is None else known.named([word.strip() for word in only.split(",")], where="--only")
    folder = out or Path("runs") / f"compare-{known.name}"
    try:
        with crash_in(folder):
            done = _compare(known, folder, chosen, minutes, quiet)
    except KeyboardInterrupt:
        log("\nstopped; what is finished is kept: the same command goes on")
        raise SystemExit(130) from None
    if json:
        print_json(done.table)
    else:
        _show(done)
    if done.left:
        log(f"{done.left} of {done.cells} runs are left: the same command goes on")
    if done.failed:
        raise SystemExit(1)


def _compare(
    known: Comparison, folder: Path, only: tuple[str, ...] | None, minutes: float | None, quiet: bool
) -> Compared:
    from lichen.present.progress import Progress

    # Libraries that print would spoil --json, so that their lines go where progress goes.
    with redirect_stdout(sys.stderr), Progress(quiet=quiet) as progress:
        from lichen.recipes.compare import run_comparison

        return run_comparison(known, folder, only=only, minutes=minutes, observers=(progress,), say=progress.say)


def _show(done: Compared) -> None:
    from lichen.present.compare_table import comparison_table

    if done.question:
        say(done.question)
    show(comparison_table(done.rows))
    for note in done.notes:
        say(f"  {note}")
    for name in ("compare.md", "compare.csv", "compare.json", "frontier.png", "levels.png"):
        if (done.folder / name).is_file():
            say(f"{name.rpartition('.')[2]}: {shlex.quote(str(done.folder / name))}")


def _seeds(text: str | None) -> tuple[int, ...] | None:
    """What ``--seeds`` says.

    Raises:
        LichenError: if it is no list of different seeds.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,10}", word) for word in words):
        raise LichenError(f"{text!r} is no list of seeds", where="--seeds", fix="write it like --seeds 0,1,2")
    return tuple(int(word) for word in words)
