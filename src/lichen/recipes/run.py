"""Runs a recipe: ``lichen run`` in Python.

>>> import lichen
>>> result = lichen.run("digits", out=tmp_path / "digits")  # doctest: +SKIP
>>> result.summary["columns"]["federated"]["mean"]  # doctest: +SKIP
0.93
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.lock import one_process
from lichen.core.files.manifest import MANIFEST, files_in
from lichen.core.files.record import SIGNED, Signer
from lichen.core.machine import machine_fault
from lichen.engines.node import serve_frames
from lichen.engines.ranks import Ranks, connect, is_rank
from lichen.models.loading.dtypes import slow_dtype
from lichen.present.charts.charts import clients_png, curves_png
from lichen.present.charts.contributions import contributions_png
from lichen.present.clients import clients_csv, read_clients
from lichen.present.measured.energy import Meter, counters
from lichen.present.measured.peak_memory import peak_memory_bytes
from lichen.present.report import compare_table, summary_table
from lichen.present.summary import read_summary
from lichen.present.table import table_text
from lichen.present.trace import Event, Trace
from lichen.recipes.artifacts.contributions import contributions_of
from lichen.recipes.artifacts.former_names import adopt_run
from lichen.recipes.artifacts.model_card import write_adapter_card
from lichen.recipes.artifacts.more_rounds import give_more_rounds
from lichen.recipes.artifacts.moved_inputs import move
from lichen.recipes.artifacts.record import end_record, seal_run
from lichen.recipes.artifacts.use.export import export
from lichen.recipes.artifacts.use.talk import Talker, talk
from lichen.recipes.artifacts.verify import PAYOUT
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.assemble.bases.in_force import with_base_in_force
from lichen.recipes.assemble.run_folder import LOCK, RunFolder
from lichen.recipes.launch import launch, require_processes, telling
from lichen.recipes.schema.read import new_folder, recipe_of, recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.node import node_worker
from lichen.recipes.sites.site_engines import SiteEngines, SiteProcesses
from lichen.recipes.stages.folder import last_stage
from lichen.recipes.stages.read import Staged, read_page
from lichen.recipes.stages.run import run_stages
from lichen.recipes.tasks.exchange import run_exchange
from lichen.recipes.tasks.hosts.pipeline import run_pipeline
from lichen.recipes.tasks.outcome import TaskResult
from lichen.recipes.tasks.replay import replay
from lichen.recipes.tasks.run_summary import summarise, who_gained
from lichen.recipes.tasks.server_alone import run_server_alone
from lichen.recipes.tasks.streams.stream import run_stream
from lichen.tasks.registry import task_of

__all__ = ["Result", "RunReport", "Talker", "export", "replay", "report", "run", "run_node", "run_rank", "talk"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished run.

    Attributes:
        summary: What ``summary.json`` holds.
        folder: Where everything lies.
        adapter: The PEFT adapter, where there is one.
        stages: The runs of all stages, of which this is the last; none where there was one run.
    """

    summary: dict[str, Any]
    folder: Path
    adapter: Path | None
    stages: tuple[Result, ...] = ()

    def clients(self) -> list[dict[str, Any]]:
        """Every client's rows, scores and gain, as ``clients.csv`` holds them.

        Raises:
            LichenError: if the file is not there or damaged.
        """
        return read_clients(self.folder)


@final
@dataclass(frozen=True, slots=True)
class RunReport:
    """Finished runs, as text the table that ``lichen report`` prints.

    Attributes:
        runs: In the order they were asked for.
    """

    runs: tuple[Result, ...]

    def __str__(self) -> str:
        summaries = [run.summary for run in self.runs]
        if len(summaries) == 1:
            return table_text(summary_table(summaries[0]))
        return table_text(compare_table(summaries, folders=[str(run.folder) for run in self.runs]))


def run(
    recipe: Recipe | Staged | Mapping[str, Any] | str | Path,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    server_alone: bool = False,
    sites: Mapping[str, Path | str] | SiteEngines | None = None,
    observers: Sequence[Callable[[Event], None]] = (),
    say: Callable[[str], None] | None = None,
) -> Result:
    """Run a recipe to its end: one run, or its stages one after another.

    Args:
        recipe: A recipe, its mapping, a YAML file, or a gallery name.
        out: The run folder; by default the next free one under ``runs/``.
        resume: Go on with what lies in ``out``; the recipe is that folder's own, or has more rounds.
        server_alone: The nodes of ``engine.name: spawned`` alone open the data; this process holds no row.
        sites: In place of the recipe's data a file or folder for each site, by its name: each is opened by a node that
            has no other, and this process holds no row. Or sites that are there already.
        observers: Called with every finished round; they read and cannot steer.
        say: Called with lines of progress.

    Raises:
        LichenError: what is wrong with the recipe, its files or the folder, and how to mend it.
    """
    say = say or (lambda _: None)
    recipe = recipe if isinstance(recipe, Recipe | Staged) else read_page(recipe)
    path = Path(out) if out is not None else new_folder(recipe.name)
    if isinstance(recipe, Staged):
        if sites is not None:
            raise LichenError(
                "sites run one recipe at a time, and hold each against their policies",
                where="stages",
                fix="give them one stage after another, each as a recipe of its own that begins with what the one "
                "before has given",
            )
        one = partial(run, server_alone=server_alone, observers=observers, say=say)
        run_stages(recipe, path, resume=resume, one=one, merge=partial(export, merge=True), say=say)
        done = tuple(_result_of(path / stage.folder) for stage in recipe.stages)
        return replace(done[-1], stages=done)
    if isinstance(sites, Mapping):
        files = {name: Path(data).absolute() for name, data in sites.items()}
        sites = SiteProcesses(path / "recipe.yaml", files)
    signer = None if sites is None else sites.signer
    alone = partial(run_server_alone, sites=sites) if server_alone or sites is not None else None
    if recipe.stream is not None and alone is not None:
        raise LichenError(
            "periods are cut from rows that this process sees, and here others hold them",
            where="stream",
            fix="leave it out, and give the sites the rows of one period",
        )
    if recipe.offsite is not None and alone is not None:
        raise LichenError(
            "the whole model is scored on rows that this process sees, and here others hold them",
            where="offsite",
            fix="leave it out, and plug what was trained into the model afterwards: lichen plug RUN --into MODEL",
        )
    if recipe.pipeline is not None and alone is not None:
        raise LichenError(
            "tokens and labels come to the hosts of a pipeline from this process, and here others hold the rows",
            where="pipeline",
            fix="leave it out, or run the recipe with its rows here",
        )
    apart = recipe.engine_kind.ranks and not recipe.streams  # each period starts ranks of its own
    if apart and alone is not None:
        raise LichenError("ranks hold the rows of their own clients", where="engine.name", fix="use local or spawned")
    mine = False  # whether this process has filled the folder, so that it may empty it
    there = path.is_dir()  # and whether it is somebody's, so that it stays
    moved_back: list[Callable[[], None]] = []
    if not is_rank():
        require_processes(recipe)
        if slow := slow_dtype(recipe.model.dtype, recipe.model.device):
            say(f"model.dtype: {slow}")
    try:
        if apart and not is_rank():
            with ExitStack() as lock:  # the first rank holds the folder by itself
                mine = _claim(path, recipe, resume, moved_back, say, lock)
            command = [sys.executable, "-m", "lichen", "rank", str(path)]
            launch(command, nodes=recipe.engine.nodes, observers=observers, say=say)
        else:
            with ExitStack() as lock, connect(recipe.model.device) if apart else Ranks() as ranks:
                mine = ranks.ask_first(lambda: _claim(path, recipe, resume, moved_back, say, lock)) and ranks.first
                watching, speaking = (observers, say) if ranks.first else ((), lambda _: None)
                if recipe.streams:
                    alone = partial(_run_periods, observers=watching)
                _go(recipe, path, ranks, watching, speaking, alone, signer)
    except Exception as error:
        if not isinstance(error, LichenError) and machine_fault(error) is None:
            raise  # a fault of ours: what lies there helps to find it
        for give_back in moved_back:
            give_back()  # what lies at the new place may be something else
        if mine and not any(path.glob("trace.jsonl")) and not any(path.glob("periods/*/trace.jsonl")):
            _empty(path)  # nothing was trained: the mended recipe may go where this one failed
        if not there:
            with suppress(OSError):
                path.rmdir()  # unless something lies in it
        raise
    return _result_of(path)


def _run_periods(
    recipe: Recipe,
    folder: RunFolder,
    watch: Callable[[Event], None],
    say: Callable[[str], None],
    *,
    observers: Sequence[Callable[[Event], None]],
) -> TaskResult:
    """A stream, of which each period is a run with a trace of its own."""
    del watch
    return run_stream(recipe, folder, say, run=partial(run, observers=observers))


def _empty(path: Path) -> None:
    """Remove what lies in a folder; what cannot be removed stays."""
    for one in path.iterdir():
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one, ignore_errors=True)
        else:
            with suppress(OSError):
                one.unlink()


def _result_of(folder: Path) -> Result:
    """A finished run, by its folder.

    Raises:
        LichenError: if the run is not finished, or its summary damaged.
    """
    adapter = folder / "adapter" if (folder / "adapter").exists() else None
    return Result(summary=read_summary(folder), folder=folder, adapter=adapter)


def report(*folders: Path | str) -> RunReport:
    """Read finished runs.

    Args:
        folders: Their folders; that of several stages means the last one.

    Raises:
        LichenError: if none is named, or one is not finished or damaged.
    """
    if not folders:
        raise LichenError("no folder", where="lichen.report", fix="name the folders of finished runs")
    return RunReport(tuple(_result_of(last_stage(folder)) for folder in folders))


def _claim(
    path: Path,
    recipe: Recipe,
    resume: bool,
    moved_back: list[Callable[[], None]],
    say: Callable[[str], None],
    lock: ExitStack,
) -> bool:
    """Make the folder the recipe's, and this process's alone; whether it is a new one.

    Args:
        path: The folder.
        recipe: The recipe.
        resume: What lies there may be gone on with.
        moved_back: Gets what undoes a change of the folder's recipe.
        say: Called with lines of progress.
        lock: Frees the folder for others when it is closed.

    Raises:
        LichenError: if something lies there that is not to be resumed, or another process works on it.
    """
    if path.exists() and not resume and files_in(path, but=(LOCK,)):
        raise LichenError("is not empty", where=str(path), fix=f"choose another folder, or: lichen run --resume {path}")
    if not path.exists():
        private.make_folder(path)
    refuse_withdrawn(path)
    lock.enter_context(one_process(path, LOCK, say=say))
    if not (path / "recipe.yaml").exists():  # first of all files: with it, whatever is left can be resumed
        write_atomic(path / "recipe.yaml", write_recipe(recipe).encode())
    elif resume:
        adopt_run(path)
        give_more_rounds(path, recipe, say)
        moved_back.append(move(path, recipe))
    return not resume


def _go(
    recipe: Recipe,
    path: Path,
    ranks: Ranks,
    observers: Sequence[Callable[[Event], None]],
    say: Callable[[str], None],
    alone: Callable[..., TaskResult] | None,
    signer: Signer | None,
) -> None:
    """Run a recipe as one of the ranks; the first one writes. ``alone`` runs it without rows in this process."""
    folder = RunFolder(path, recipe_sha256=recipe_sha256(recipe), ranks=ranks, say=say, history=recipe.engine.history)
    trace = Trace(path)
    for file in (MANIFEST, SIGNED, PAYOUT):
        (path / file).unlink(missing_ok=True)  # they are written last, when all that they name is whole

    def watch(event: Event) -> None:
        if ranks.first and not folder.traced(event):
            trace(event)
        for observe in observers:
            observe(event)

    task: Callable[..., TaskResult] = run_exchange if recipe.exchange else task_of(recipe.task).procedure.load("run")
    task = run_pipeline if recipe.pipeline is not None else task
    task = alone or task
    # One process sees its own machine and accelerator only, and a part would look like the whole.
    single = ranks.size == 1
    before = folder.journal.joules if single else None
    with Meter(counters(recipe.model.device) if single else (), before=before) as meter:
        folder.joules = meter.joules
        with closing(folder):
            result = task(recipe, folder, watch, say)
        joules = meter.joules()
    memory = sum(int(peak) for peak in ranks.exchange(str(peak_memory_bytes()).encode(), about="memory"))
    if not ranks.first:
        return
    contributions = contributions_of(recipe, path, result.columns["federated"], result.clients)
    if contributions is not None:
        result = replace(result, extra={**result.extra, **contributions.summary()})
        contributions.write(path)
    summary = summarise(recipe, folder, result, memory, joules)
    for failure in summary["failures"]:
        say(f"NOTHING LEARNED: {failure}")
    folder.write_json("summary.json", summary)
    write_adapter_card(path, with_base_in_force(recipe, path))
    curves_png(path)
    higher = summary["higher_is_better"]
    rows = who_gained(path, result, higher)
    if contributions is not None and not contributions.private:
        totals = contributions.totals
        rows = [{**row, "contribution": total} for row, total in zip(rows, totals, strict=True)]
        contributions_png(path, result.clients, totals, str(summary["extra"]["value"]))
    write_atomic(path / "clients.csv", clients_csv(rows).encode("utf-8", "backslashreplace"))
    named = [{**row, "name": row["client"]} for row in rows]
    clients_png(path, named, metric=summary["metric"], higher_is_better=higher)
    folder.end()
    end_record(path, folder.record, recipe, signer)
    seal_run(path)


def run_node(recipe: Path, state: Path, data: Path | None = None) -> None:
    """Be one node: read questions on stdin, write answers on stdout, until stdin ends.

    Args:
        recipe: The recipe's file.
        state: Where its clients' private state lies.
        data: The rows of the one site that this node is; it saves its place in ``state``. None: all of the recipe's.
    """
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever prints must not reach the wire
    known = recipe_of(recipe)
    serve_frames(source, sink, node_worker(known, state, data))


def run_rank(folder: Path) -> None:
    """Be one rank of the run in ``folder``, started by :func:`run` in another process."""
    with telling() as sender:
        run(recipe_of(folder), out=folder, resume=True, observers=(sender,), say=sender.say)
