"""Runs a comparison: every method with every seed, resumable.

``DIR/<method>-<digest of its recipe>/seed-<s>`` is an ordinary run's folder. A finished one is never run
again, a killed one is resumed, and a method whose recipe has changed has another folder, so the same
command always goes on. Seeds are the outer loop: a table of all methods is there after the first one.

What depends on neither adapter nor federation is worked out once: the scores of the bare model, and
the features of a frozen encoder, are linked from run to run through ``DIR/shared``.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lichen.allocator import give_back
from lichen.core import private
from lichen.core.errors import LichenError, traceback_text
from lichen.core.files.durable import write_atomic
from lichen.core.files.lock import one_process
from lichen.core.machine import machine_fault
from lichen.engines.ranks import ranks_here
from lichen.present.charts.fonts import drawing
from lichen.present.charts.frontier import frontier_png
from lichen.present.charts.levels import levels_png
from lichen.present.compare import ComparisonRow
from lichen.present.compare_table import comparison_table, notes
from lichen.present.table import table_text
from lichen.present.trace import Event
from lichen.present.units import seconds_text
from lichen.recipes.artifacts.inputs import require_rows
from lichen.recipes.artifacts.shared_scores import link_shared, shared_key
from lichen.recipes.assemble.experiment import metric_of
from lichen.recipes.cells import Cell, adopt_cells, cells_of, memory_file, write_tables
from lichen.recipes.comparison import Comparison, Method, read_comparison
from lichen.recipes.plan.footprint import footprint
from lichen.recipes.schema.read import write_recipe
from lichen.recipes.schema.recipe import Recipe

__all__ = ["Compared", "compare", "run_comparison"]

Say = Callable[[str], None]

LOCK = ".lock"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A comparison as far as it has come.

    Attributes:
        question: What it answers.
        rows: A row a method.
        notes: What the columns mean.
        table: All of it, as JSON can write it.
        folder: Where everything lies.
        cells: Runs that were asked for.
        left: Those that were not started, for want of time.
        failed: Those that failed, or learned nothing.
    """

    question: str
    rows: tuple[ComparisonRow, ...]
    notes: tuple[str, ...]
    table: dict[str, Any]
    folder: Path
    cells: int
    left: int
    failed: int

    def __str__(self) -> str:
        """The question, the table and the notes that ``lichen compare`` prints."""
        parts = [self.question, table_text(comparison_table(self.rows)), *(f"  {note}" for note in self.notes)]
        return "\n".join(filter(None, parts))


def compare(
    *recipes: str | Path,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    minutes: float | None = None,
    out: Path | str | None = None,
    observers: Sequence[Callable[[Event], None]] = (),
    say: Callable[[str], None] | None = None,
) -> Compared:
    """Run several recipes over several seeds; called again, it goes on, and what is finished is not run again.

    Args:
        recipes: YAML files or gallery names; or one comparison, by file or name.
        overrides: ``key.sub=value`` for all recipes.
        seeds: Each method runs with each of them; 0, 1, 2 or the comparison's own by default.
        only: Methods to run, or ``method@level``; the table shows all that is finished.
        minutes: Start no new run after so many minutes.
        out: The comparison's folder; by default ``runs/compare-NAME``.
        observers: Called with every finished round; they read and cannot steer.
        say: Called with lines of progress.

    Raises:
        LichenError: for the first fault of the recipes, their files or the folder. A run that fails is told
            in its row instead, and counted in ``failed``.
    """
    if ranks_here()[1] > 1:
        raise LichenError(
            "was started as several ranks",
            where="lichen.compare",
            fix="start one process, with engine.name=distributed",
        )
    if minutes is not None and not 0 < minutes < float("inf"):
        raise LichenError(f"{minutes} is no time to work", where="minutes", fix="give a positive number")
    known = read_comparison(recipes, overrides=overrides, seeds=seeds, note=say)
    return run_comparison(
        known,
        Path(out) if out is not None else Path("runs") / f"compare-{known.name}",
        only=None if only is None else known.named(only, where="only"),
        minutes=minutes,
        observers=observers,
        say=say or (lambda _: None),
    )


def run_comparison(
    comparison: Comparison,
    out: Path,
    *,
    only: Sequence[str] | None = None,
    minutes: float | None = None,
    observers: Sequence[Callable[[Event], None]] = (),
    say: Say = lambda _: None,
) -> Compared:
    """Run what is not finished, and write ``compare.md``, ``.csv``, ``.json``, ``frontier.png`` and ``levels.png``.

    A method that fails is told in its row and does not stop the others. The tables are written anew
    after every run, so that whatever ends this leaves those of all that is finished.

    Args:
        comparison: What to run.
        out: The comparison's folder.
        only: Methods to run, at all of their levels or at one; none: all. The tables show all.
        minutes: Start no run after so many minutes.
        observers: Called with every finished round.
        say: Called with lines of progress.

    Raises:
        LichenError: if the methods have several metrics, or the folder is something else's or another process's.
    """
    start = time.monotonic()
    _one_metric(comparison)
    _claim(out)
    with one_process(out, LOCK, say=say):
        return _run_cells(comparison, out, start, only=only, minutes=minutes, observers=observers, say=say)


def _run_cells(
    comparison: Comparison,
    out: Path,
    start: float,
    *,
    only: Sequence[str] | None,
    minutes: float | None,
    observers: Sequence[Callable[[Event], None]],
    say: Say,
) -> Compared:
    adopt_cells(comparison, out)
    requested = [cell for cell in cells_of(comparison, out) if only is None or _named(cell.method, only)]
    faults: dict[str, list[str]] = {}
    open_cells = [cell for cell in requested if cell.summary() is None]
    say(f"comparison folder: {out}; {len(requested) - len(open_cells)} of {len(requested)} runs are finished")
    write_tables(comparison, out, faults)
    started = 0
    for position, cell in enumerate(open_cells):
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            break
        every = cells_of(comparison, out)
        left = _left(every, open_cells[position:])
        remaining = f"; about {seconds_text(left)} left" if left is not None else ""
        say(f"run {len(requested) - len(open_cells) + position + 1} of {len(requested)}: {_name(cell)}{remaining}")
        done = next((one for one in every if one.summary() is not None and _same_rows(one.recipe, cell.recipe)), None)
        fault = _run(cell, out, observers, say, like=done.folder if done is not None else None)
        started += 1
        if fault is None:
            _measure(cell.method, out, say)
        else:
            faults.setdefault(cell.method.name, []).append(f"seed {cell.recipe.seed}: {fault}")
            say(f"failed: {_name(cell)}: {fault}")
        write_tables(comparison, out, faults)
    rows, table = write_tables(comparison, out, faults)
    title = comparison.question or comparison.name
    with drawing([title, *(row.method for row in rows)]):
        frontier_png(rows, out / "frontier.png", title=title)
    if comparison.levels:
        with drawing([title, *comparison.levels, *(row.method for row in rows)]):
            levels_png(rows, comparison.levels, out / "levels.png", title=title)
    return Compared(
        question=comparison.question,
        rows=rows,
        notes=notes(rows),
        table=table,
        folder=out,
        cells=len(requested),
        left=len(open_cells) - started,
        failed=sum(len(row.faults) for row in rows),
    )


def _name(cell: Cell) -> str:
    return f"{cell.method.name}, seed {cell.recipe.seed}"


def _named(method: Method, names: Sequence[str]) -> bool:
    return method.name in names or method.name.partition("@")[0] in names


def _one_metric(comparison: Comparison) -> None:
    first, *others = comparison.methods
    for method in others:
        mine, theirs = metric_of(method.recipe).name, metric_of(first.recipe).name
        if mine != theirs:
            raise LichenError(
                f"{mine} cannot be compared with {theirs} of {first.name}",
                where=f"{method.name}: compare.metric",
                fix="let all methods have one metric",
            )


def _claim(out: Path) -> None:
    """Refuse a folder that is not this or another comparison's."""
    if out.exists() and not out.is_dir():
        raise LichenError("is a file", where=str(out), fix="choose a folder")
    strange = out.is_dir() and any(path.name != LOCK for path in out.iterdir())
    if strange and not (out / "compare.json").is_file():
        raise LichenError("is not empty, and no comparison's", where=str(out), fix="choose another folder")


def _left(every: Sequence[Cell], open_cells: Sequence[Cell]) -> float | None:
    """Seconds that the open runs will take, by the finished ones: of the same method where there are any."""
    seconds: dict[str, list[float]] = {}
    for cell in every:
        found = cell.summary()
        if found is not None:
            seconds.setdefault(cell.method.name, []).append(found["seconds"])
    known = [value for values in seconds.values() for value in values]
    if not known:
        return None
    return sum((sum(s) / len(s)) for s in (seconds.get(cell.method.name, known) for cell in open_cells))


def _same_rows(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes read the same rows, whatever they do with them."""
    keys = ("name", "columns", "classes")
    return all(getattr(one.data, key) == getattr(other.data, key) for key in keys)


def _run(
    cell: Cell, out: Path, observers: Sequence[Callable[[Event], None]], say: Say, *, like: Path | None = None
) -> str | None:
    """Run a cell, or go on with it; why it failed, if it did.

    Args:
        cell: What to run.
        out: The comparison's folder.
        observers: Called with every finished round.
        say: Called with lines of progress.
        like: A finished run's folder, whose rows this one's must be.
    """
    from lichen.recipes import run as run_module

    if not out.exists():
        private.make_folder(out)
    shared = out / "shared" / shared_key(cell.recipe)
    if not (cell.folder / "recipe.yaml").exists():
        write_atomic(cell.folder / "recipe.yaml", write_recipe(cell.recipe).encode())
    if like is not None:
        require_rows(cell.folder, like)
    scores = cell.folder / "state" / "scores"
    link_shared(shared, scores)
    _forget_peak()
    try:
        run_module.run(cell.recipe, out=cell.folder, resume=True, observers=observers, say=say)
    except LichenError as error:
        if not (cell.folder / "trace.jsonl").exists():
            shutil.rmtree(cell.folder, ignore_errors=True)  # nothing was trained
        return f"{error.where}: {error.what}" if error.where else error.what
    except Exception as error:
        # Hours of other methods' work do not depend on this one.
        if (refused := machine_fault(error)) is not None:
            return f"{refused.where}: {refused.what}" if refused.where else refused.what
        crash = cell.folder / "crash.txt"
        write_atomic(crash, traceback_text(error).encode("utf-8", "backslashreplace"))
        first = (str(error).splitlines() or [""])[0][:120]
        return f"crashed: {type(error).__name__}: {first} ({crash.relative_to(out)})"
    link_shared(scores, shared)
    return None


def _forget_peak() -> None:
    """Let the process's highest memory be this run's; where the system cannot, it stays that of all so far.

    What large methods have freed goes back to the system, or a later, smaller one would hold it to its end.
    """
    gc.collect()
    give_back()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _measure(method: Method, out: Path, say: Say) -> None:
    """Measure what a client of a method needs, once, and keep it beside the method's runs."""
    if memory_file(method, out).exists():
        return
    gc.collect()  # the run's model, before another is loaded
    try:
        found = footprint(method.recipe)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:120]
        say(f"client memory of {method.name} could not be measured: {type(error).__name__}: {first}")
        return
    peaks = None if found is None else {"frozen": found.frozen, "training": found.training}
    write_atomic(memory_file(method, out), json.dumps(peaks).encode())
