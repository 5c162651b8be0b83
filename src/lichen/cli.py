"""The command line: list, fetch, init, plan, run, try, report, export.

Nothing heavy is imported until a command needs it, so that ``lichen --help`` answers at once. Results
go to standard output, everything else to standard error. Exit codes: 0 done, 1 a fault of lichen
itself, 2 bad input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from lichen import __version__
from lichen.core.errors import LichenError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["app", "main"]

app = App(
    name="lichen",
    help="Federated learning and foundation models, each making the other better.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=""),
)

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


_TRAINING = ("run", "plan", "node", "rank")
"""Commands whose process is worth setting up for large tensors."""


def _show(table: Table) -> None:
    """Print a table; as wide as its lines need to be where nobody's screen limits it."""
    from rich.console import Console

    # Into a text first, because rich would leave the process when the reader of a pipe is gone.
    text, screen = io.StringIO(), sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if screen else 10_000
    Console(file=text, force_terminal=screen, width=width).print(table)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def _crash(error: BaseException, folder: Path | None) -> int:
    """Keep the traceback in a file and say so in one line."""
    import tempfile
    import traceback

    home = folder if folder is not None and folder.is_dir() else Path(tempfile.gettempdir())
    file = home / ("crash.txt" if home == folder else f"lichen-crash-{os.getpid()}.txt")
    first = (str(error).splitlines() or [""])[0]
    try:
        file.write_text(
            f"lichen {__version__}, Python {sys.version}\n\n{''.join(traceback.format_exception(error))}",
            encoding="utf-8",
        )
        kept = f"the traceback is in {file}"
    except OSError as other:
        kept = f"its traceback could not be kept ({other.strerror})"
    _tell(f"lichen failed: {type(error).__name__}: {first[:200]} ({kept})")
    return 1


@contextmanager
def _crash_in(folder: Path) -> Iterator[None]:
    """Unexpected faults inside leave their traceback in ``folder``."""
    try:
        yield
    except (LichenError, BrokenPipeError):
        raise
    except Exception as error:
        raise SystemExit(_crash(error, folder)) from None


def _free(folder: Path) -> Path:
    """``folder``, if a new run may begin there."""
    if folder.exists() and not folder.is_dir():
        raise LichenError("is a file", where=f"--out {folder}", fix="choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        go_on = f"go on with: lichen run --resume {shlex.quote(str(folder))}, or " if _has_recipe(folder) else ""
        raise LichenError("is not empty", where=f"--out {folder}", fix=f"{go_on}choose another folder")
    return folder


def _has_recipe(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file()


@app.command(name="list")
def list_() -> None:
    """Show the models, data and recipes that have a name."""
    from lichen.data.catalog import CATALOG
    from lichen.present.report import new_table
    from lichen.present.units import bytes_text
    from lichen.recipes.read import gallery, read_recipe

    for kind in ("model", "data"):
        heads = [kind, "what", "licence", "size", *(["clients"] if kind == "data" else [])]
        table = new_table(None, *heads, numbers=["size"])
        for name, entry in CATALOG.items():
            if entry.kind == kind:
                size = bytes_text(entry.size_bytes) if entry.size_bytes else "-"
                table.add_row(
                    name, entry.summary, entry.licence, size, *([entry.clients or "-"] if kind == "data" else [])
                )
        _show(table)
    table = new_table(None, "recipe", "task", "model", "data", "question")
    for name in gallery():
        recipe = read_recipe(name)
        student = recipe.model.student
        model = recipe.model.name or (student.kind if student is not None else "-")
        table.add_row(name, recipe.task, model, recipe.data.name, recipe.question)
    if table.row_count:
        _show(table)


@app.command
def fetch(name: str, /) -> None:
    """Download a model or data set of `lichen list` into the cache, checked against its digest.

    Parameters
    ----------
    name
        Its name in `lichen list`.
    """
    from lichen.data.fetch import fetch as fetch_one

    print(fetch_one(name, say=_tell))


@app.command
def init(data: Path, /, *, out: Path = Path("recipe.yaml")) -> None:
    """Look at your data and write a commented recipe for it.

    Parameters
    ----------
    data
        A JSONL, CSV or Parquet file, or a folder with a file a client.
    out
        Where the recipe goes; an existing file is never overwritten.
    """
    from lichen.recipes.init import init_recipe

    if out.exists():
        raise LichenError("exists already", where=str(out), fix="remove it, or choose another name with --out")
    text = init_recipe(data)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LichenError(f"cannot be written: {error.strerror}", where=str(out), fix="choose another --out") from None
    _tell(f"wrote {out}; read it, then: lichen run {shlex.quote(str(out))}")


@app.command
def run(
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
        Go on with the run in this folder, by its own recipe.
    quiet
        Show no progress.
    json
        Print the summary as JSON, and nothing else, on standard output.
    """
    if resume is not None and (recipe is not None or set_ or out is not None):
        raise LichenError(
            "goes on with the folder's own recipe", where="--resume", fix="leave out RECIPE, --set and --out"
        )
    if resume is not None and not _has_recipe(resume):
        raise LichenError(
            "has no recipe.yaml, so no run to go on with",
            where=f"--resume {resume}",
            fix="start one: lichen run RECIPE",
        )
    if resume is None and recipe is None:
        raise LichenError("no recipe", where="lichen run", fix="name a YAML file, or one of `lichen list`")

    from lichen.recipes.read import new_folder, read_recipe

    known = read_recipe(resume / "recipe.yaml" if resume is not None else str(recipe), set_)
    among = _among(known.engine.name, resume or out)
    folder = resume or (out if among else _free(out) if out is not None else new_folder(known.name))
    assert folder is not None
    if among and os.environ["RANK"] != "0":
        raise SystemExit(_silently(known, folder, resume is not None))
    try:
        with _crash_in(folder):
            summary, adapter = _run(known, folder, resume is not None, quiet)
    except KeyboardInterrupt:
        go_on = f"go on with: lichen run --resume {shlex.quote(str(folder))}"
        _tell(f"\nstopped; {go_on if _has_recipe(folder) else 'nothing was kept yet'}")
        raise SystemExit(130) from None
    if json:
        _print_json(summary)
    else:
        _show_result(summary, folder, adapter)


def _among(engine: str, folder: Path | None) -> bool:
    """Whether this process is one of several that were started together, as by torchrun.

    Raises:
        LichenError: if it is, and the run is not for several.
    """
    count = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    if count == "1":
        return False
    if engine != "distributed":
        raise LichenError(
            f"{count} ranks were started, and engine {engine} is for one process",
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


def _run(recipe: Any, folder: Path, resume: bool, quiet: bool) -> tuple[dict[str, Any], Path | None]:
    from lichen.present.progress import Progress

    # Libraries that print would spoil --json, so that their lines go where progress goes.
    with redirect_stdout(sys.stderr), Progress(quiet=quiet) as progress:
        progress.say(f"run folder: {folder}")
        from lichen.recipes import build

        result = build.run(recipe, out=folder, resume=resume, observers=(progress,), say=progress.say)
    return result.summary, result.adapter


def _show_result(summary: dict[str, Any], folder: Path, adapter: Path | None) -> None:
    from lichen.present.report import summary_table

    _show(summary_table(summary))
    pictures = [folder / name for name in ("curves.png", "clients.png") if (folder / name).is_file()]
    lines = [("summary", folder / "summary.json"), *(("picture", file) for file in pictures)]
    learned = [("adapter", adapter)] if adapter is not None else [("model", folder / "model")]
    lines += [(name, path) for name, path in learned if path.exists()]
    for name, path in lines:
        print(f"{name}: {path}")
    if adapter is not None or summary["task"] in ("oneshot", "teach"):
        print(f"try it: lichen try {shlex.quote(str(folder))}")


@app.command
def plan(
    recipe: str,
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name=["-s", "--set"])] = (),
    json: bool = False,
) -> None:
    """Say what a recipe will take on this machine: time, bytes, memory, disk, energy.

    Parameters
    ----------
    recipe
        A YAML file, or a recipe of `lichen list`.
    set_
        Another value for a key of the recipe, as key=value; may be given several times.
    json
        Print the plan as JSON, and nothing else, on standard output.
    """
    from lichen.recipes.read import read_recipe

    known = read_recipe(recipe, set_)
    with redirect_stdout(sys.stderr):
        from lichen.recipes.plan import plan as plan_of

        found = plan_of(known, say=_tell).as_dict()
    if json:
        _print_json(found)
        return
    from lichen.present.planned import plan_table

    _show(plan_table(found))


@app.command(name="try")
def try_(folder: Path, /, *texts: str) -> None:
    """Ask the bare model and the run's own the same thing.

    Parameters
    ----------
    folder
        A finished run.
    texts
        What to ask; without any, lines are read until the input ends.
    """
    with _crash_in(folder), redirect_stdout(sys.stderr):
        from lichen.recipes import build

        talker = build.talk(folder)
    for text in texts or _lines():
        with _crash_in(folder), redirect_stdout(sys.stderr):
            before, after = talker.answer(text)
        print(f"bare model: {before}\nthis run:   {after}\n", flush=True)


def _lines() -> Iterable[str]:
    """What is typed or piped in, line by line, without empty lines."""
    if sys.stdin.isatty():
        _tell("type a text and press Enter; Ctrl-D ends")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


@app.command
def report(*folders: Path, json: bool = False) -> None:
    """Print the results of finished runs, side by side if there are several.

    Parameters
    ----------
    folders
        Their folders.
    json
        Print their summaries as a JSON list instead.
    """
    from lichen.present.report import compare_table, summary_table
    from lichen.present.summary import read_summary

    if not folders:
        raise LichenError("no folder", where="lichen report", fix="name the folders of finished runs")
    summaries = [read_summary(folder) for folder in folders]
    if json:
        _print_json(summaries)
    elif len(summaries) == 1:
        _show(summary_table(summaries[0]))
    else:
        _show(compare_table(summaries, folders=[str(folder) for folder in folders]))


@app.command
def export(folder: Path, /, *, merge: bool = False, out: Path | None = None) -> None:
    """Write what a run learned as files other tools load.

    Parameters
    ----------
    folder
        A finished run.
    merge
        Write one whole model instead of an adapter.
    out
        Where to; a folder inside the run's if not given.
    """
    with _crash_in(folder), redirect_stdout(sys.stderr):
        from lichen.recipes import build

        written = build.export(folder, merge=merge, out=out)
    print(written)


@app.command(show=False)
def node(*, recipe: Path, state: Path) -> None:
    """Serve jobs over standard input and output; started by the engine itself."""
    from lichen.recipes import build

    build.node(recipe, state)


@app.command(show=False)
def rank(folder: Path, /) -> None:
    """Be one of a run's ranks; started by the engine itself."""
    from lichen.recipes import build

    build.rank(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after ``lichen``; those of the process if None.

    Returns:
        The exit code.
    """
    # Libraries read these when they are imported: no bars over our own progress, nothing sent home.
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if arguments is None and sys.argv[1:2] and sys.argv[1] in _TRAINING:
        from lichen.allocator import keep_large_buffers

        keep_large_buffers()
    try:
        app(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
    except LichenError as error:
        _tell(str(error))
        return 2
    except CycloptsError as error:
        _tell(f"{error}\n  fix: see lichen --help")
        return 2
    except KeyboardInterrupt:
        _tell("\nstopped")
        return 130
    except BrokenPipeError:
        # The reader left; nothing more may be written, not even by the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0
    except Exception as error:
        return _crash(error, None)
    return 0
