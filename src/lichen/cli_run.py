"""The commands that train: run, plan, and node, rank and piece, which are started by others.

Nothing heavy is imported until a command needs it.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lichen.core.errors import LichenError
from lichen.shell import crash_in, free, has_recipe, log, print_json, say, show

if TYPE_CHECKING:
    from lichen.recipes.run import Result
    from lichen.recipes.stages.read import Staged

NOTHING_LEARNED = 3
"""Exit code of a run whose numbers are there, but of a model that no client has trained."""

__all__ = ["node_command", "piece_command", "plan_command", "rank_command", "run_command", "run_recipe"]


def run_command(
    recipe: str | None = None,
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name=["-s", "--set"])] = (),
    out: Path | None = None,
    resume: Path | None = None,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Run a recipe, or go on with one that was stopped.

    Parameters
    ----------
    recipe
        A YAML file, or a recipe of `lichen list`.
    set_
        Another value for a key of the recipe, as key=value; may be given several times.
    out
        The run's folder; runs/NAME-N if not given.
    resume
        Go on with the run in this folder, by its own recipe; -s federation.rounds=N gives it more rounds, and
        -s data.name=PATH says where its data lie now. -s stages.NAME.KEY=VALUE speaks to one stage of several.
    quiet
        Show no progress.
    json
        Print the summary as JSON, and nothing else, on standard output.
    """
    run_recipe(recipe, set_, out=out, resume=resume, quiet=quiet, json=json)


def run_recipe(
    recipe: str | None,
    overrides: Sequence[str],
    *,
    out: Path | None,
    resume: Path | None,
    quiet: bool,
    json: bool,
    command: str = "lichen run",
    sites: Callable[[dict[str, str]], AbstractContextManager[Any]] | None = None,
) -> None:
    """Run a recipe and show what came of it, as the commands ``run`` and ``submit`` do.

    Args:
        recipe: A YAML file, or a name of the gallery; None to go on with a run.
        overrides: Other values of its keys.
        out: The run's folder; None: the next free one.
        resume: The folder of a run to go on with.
        quiet: Show no progress.
        json: Print the summary as JSON alone.
        command: What a person types, without the recipe.
        sites: The sites of a federation, for as long as the run takes, given what was left out of the recipe and why;
            None: this machine simulates.

    Raises:
        LichenError: for what is wrong with any of it.
        SystemExit: where nothing was learned, or after Ctrl-C.
    """
    if resume is not None and (recipe is not None or out is not None):
        raise LichenError("goes on with the folder's own recipe", where="--resume", fix="leave out RECIPE and --out")
    if resume is not None and not has_recipe(resume):
        raise LichenError(
            "has no recipe.yaml, so no run to go on with",
            where=f"--resume {resume}",
            fix=f"start one: {command} RECIPE",
        )
    if resume is None and recipe is None:
        raise LichenError("no recipe", where=command, fix="name a YAML file, or one of `lichen list`")

    from lichen.recipes.schema.read import new_folder, read_recipe
    from lichen.recipes.stages.read import Staged, page_of, read_page

    lines = dict[str, None]()

    def note(line: str) -> None:
        if line not in lines:
            log(line)
        lines[line] = None

    if resume is not None:
        known = page_of(resume, overrides, note=note)
    elif sites is not None:
        known = read_recipe(str(recipe), overrides, note=note)
    else:
        known = read_page(str(recipe), overrides, note=note)
    left_out: dict[str, str] = {}
    if sites is not None and resume is None:
        known, left_out = _for_sites(known, str(recipe), overrides, note)
    several = sites is None and _several_ranks(known, resume or out)
    folder = resume or (out if several else free(out) if out is not None else new_folder(known.name))
    assert folder is not None
    if several and os.environ["RANK"] != "0":
        raise SystemExit(_silently(known, folder, resume is not None))
    try:
        with crash_in(folder, command=command), sites(left_out) if sites is not None else nullcontext() as there:
            done = _run(known, folder, resume is not None, quiet, there)
    except KeyboardInterrupt:
        go_on = f"go on with: {command} --resume {shlex.quote(str(folder))}"
        log(f"\nstopped; {go_on if has_recipe(folder) else 'nothing was kept yet'}")
        raise SystemExit(130) from None
    summary = done.summary
    if json:
        print_json(summary)
    else:
        if isinstance(known, Staged):
            _show_stages(known, folder)
        _show_result(summary, done.folder if isinstance(known, Staged) else folder, done.adapter)
    if any(one.summary.get("failures") for one in (done.stages if isinstance(known, Staged) else (done,))):
        raise SystemExit(NOTHING_LEARNED)


def _for_sites(
    known: Any, recipe: str, overrides: Sequence[str], note: Callable[[str], None]
) -> tuple[Any, dict[str, str]]:
    """The recipe without what sites cannot compute, and why each of that is left out."""
    from lichen.recipes.schema.read import read_recipe
    from lichen.recipes.sites.open_server import needs_rows

    found = [need for need in needs_rows(known) if need.change]
    for need in found:
        note(f"{need.key}: left out, since {need.why}")
    changes = [need.change for need in found]
    return read_recipe(recipe, [*overrides, *changes], note=note), {need.key: need.why for need in found}


def _several_ranks(recipe: Any, folder: Path | None) -> bool:
    """Whether this process is one of several that were started together, as by torchrun.

    Raises:
        LichenError: if it is, and the run is not for several.
    """
    from lichen.recipes.stages.read import Staged

    count = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    if count == "1":
        return False
    if isinstance(recipe, Staged):
        raise LichenError(
            f"{count} ranks were started, and stages start their own",
            where="stages",
            fix="start one process, with -s engine.name=distributed",
        )
    if not recipe.engine_kind.ranks:
        raise LichenError(
            f"{count} ranks were started, and engine {recipe.engine.name} is for one process",
            where="engine.name",
            fix="add -s engine.name=distributed, or start one process",
        )
    if folder is None:
        raise LichenError("ranks cannot each choose a folder", where="--out", fix="name one that all of them see")
    return True


def _silently(recipe: Any, folder: Path, resume: bool) -> int:
    """Run as a rank other than the first, which alone speaks; the exit code."""
    import time

    try:
        _run(recipe, folder, resume, quiet=True)
        return 0
    except KeyboardInterrupt:
        code = 130
    except LichenError:
        code = 2
    except Exception:
        code = 1
    time.sleep(1)  # who started the ranks ends all of them when one has failed: the first is to speak before
    return code


def _run(recipe: Any, folder: Path, resume: bool, quiet: bool, sites: Any = None) -> Result:
    from lichen.present.progress import Progress

    # Libraries that print would spoil --json, so that their lines go where progress goes.
    with redirect_stdout(sys.stderr), Progress(quiet=quiet) as progress:
        progress.say(f"run folder: {folder}")
        from lichen.recipes import run as run_module

        return run_module.run(recipe, out=folder, resume=resume, sites=sites, observers=(progress,), say=progress.say)


def _show_stages(staged: Staged, folder: Path) -> None:
    """A row for each stage; what follows is the last one's."""
    from lichen.recipes.stages.tables import rows_of, stages_table

    show(stages_table(rows_of(staged, folder)))
    say(f"stages: {folder / 'stages.md'}")


def _show_result(summary: dict[str, Any], folder: Path, adapter: Path | None) -> None:
    from lichen.present.report import summary_table
    from lichen.tasks.registry import task_of

    show(summary_table(summary))
    pictures = [folder / name for name in ("curves.png", "periods.png", "clients.png") if (folder / name).is_file()]
    lines = [("summary", folder / "summary.json"), *(("picture", file) for file in pictures)]
    lines += [("by client", folder / "clients.csv")] if (folder / "clients.csv").is_file() else []
    learned = [("adapter", adapter)] if adapter is not None else [("model", folder / "model")]
    lines += [(name, path) for name, path in learned if path.exists()]
    for name, path in lines:
        say(f"{name}: {path}")
    if adapter is not None or not task_of(summary["task"]).procedure.rounds or _reads_text(folder):
        say(f"try it: lichen try {shlex.quote(str(folder))}")
    if "personal" in summary["extra_columns"] and task_of(summary["task"]).procedure.rounds:
        say(f"a client's own model: lichen export {shlex.quote(str(folder))} --client NAME")


def _reads_text(folder: Path) -> bool:
    """Whether what was learned is a student that can be asked in words."""
    import json

    about = folder / "model" / "config.json"
    return about.is_file() and json.loads(about.read_text()).get("tokenizer") is not None


def plan_command(
    recipe: str,
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name=["-s", "--set"])] = (),
    json: bool = False,
) -> None:
    """Say what a recipe will take on this machine: time, bytes, memory, disk, energy; of stages each, and the sum.

    Parameters
    ----------
    recipe
        A YAML file, or a recipe of `lichen list`.
    set_
        Another value for a key of the recipe, as key=value; may be given several times.
    json
        Print the plan as JSON, and nothing else, on standard output.
    """
    from lichen.recipes.stages.read import read_page

    known = read_page(recipe, set_, note=log)
    with redirect_stdout(sys.stderr):
        from lichen.recipes.plan.plan import plan as plan_of

        found = plan_of(known, say=log)
    if json:
        print_json(found.as_dict())
        return
    from lichen.present.planned import plan_table
    from lichen.recipes.stages.plans import StagedPlan, plans_table

    show(plans_table(found) if isinstance(found, StagedPlan) else plan_table(found.as_dict()))


def node_command(*, recipe: Path, state: Path, data: Path | None = None) -> None:
    """Serve jobs over standard input and output; started by the engine itself."""
    from lichen.recipes import run as run_module

    run_module.run_node(recipe, state, data)


def piece_command(folder: Path, /, *, host: int, hosts: int) -> None:
    """Be one of the hosts that write together; started by `lichen try` itself."""
    from lichen.recipes.local.hosts.piece_process import run_piece

    run_piece(folder, host, hosts)


def rank_command(folder: Path, /) -> None:
    """Be one of a run's ranks; started by the engine itself."""
    from lichen.recipes import run as run_module

    run_module.run_rank(folder)
