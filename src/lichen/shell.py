"""What all commands share: tables, lines, JSON, and a crash report in a file.

Results go to standard output, everything else to standard error. Names of strangers pass through here on their way to
the screen, and can steer nothing there. Nothing heavy is imported here.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lichen import __version__
from lichen.core import private
from lichen.core.errors import LichenError, traceback_text
from lichen.core.machine import machine_fault
from lichen.core.visible import PLAIN, visible, visible_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "crash",
    "crash_in",
    "forget_output",
    "free",
    "has_recipe",
    "log",
    "prepare_streams",
    "print_json",
    "say",
    "show",
    "writing",
]


def show(table: Table) -> None:
    """Print a table; as wide as its lines need to be where nobody's screen limits it."""
    from lichen.present.table import WIDE, table_text

    screen = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if screen else WIDE
    _write(table_text(table, width=width, terminal=screen, encoding=sys.stdout.encoding or "utf-8"))


def say(line: str) -> None:
    """Say a line on standard output, where results go."""
    _write(visible(line))


def _write(text: str) -> None:
    with writing():
        print(text, flush=True)


@contextmanager
def writing() -> Iterator[None]:
    """Standard output that takes no more is told as what it is; nothing more is written there.

    Raises:
        LichenError: naming what the system says.
    """
    try:
        yield
    except BrokenPipeError:  # whoever reads has left, and knows
        raise
    except OSError as error:
        forget_output()
        fix = "give the command again, to another place; what a run has learned is in its folder"
        raise LichenError(f"cannot be written: {error.strerror}", where="standard output", fix=fix) from None


def forget_output() -> None:
    """Write nothing more to standard output, not even at the interpreter's last flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@final
class _Lost(io.FileIO):
    """A stream whose writes never fail: there is nobody left to tell."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def prepare_streams() -> None:
    """Make standard streams that can be written to: closed ones lead nowhere, letters that they lack become plain.

    A run does not end because nobody can be told of its progress, so that standard error takes everything.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or a file of the run would be opened under this number
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=PLAIN)
    encoding = sys.stderr.encoding if sys.stderr is not None else "utf-8"
    raw = io.BufferedWriter(_Lost(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, errors=PLAIN, line_buffering=True)


def log(line: str) -> None:
    """Say a line on standard error."""
    print(visible(line), file=sys.stderr, flush=True)


def print_json(value: Any, *, line: bool = False) -> None:
    """Print a value as JSON, which has no NaN.

    Args:
        value: The value.
        line: On one line, as one of many.
    """
    import json

    indent = None if line else 2
    text = visible_json(json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # an escape of JSON's own, which means the same
        text = json.dumps(value, indent=indent, allow_nan=False)
    _write(text)


def crash(error: BaseException, folder: Path | None, *, command: str = "lichen run") -> int:
    """Keep the traceback in a file and say so in one line; what the machine refuses is no fault of ours, and has a fix.

    Args:
        error: What was not foreseen.
        folder: Where the file goes if it is there; else among the temporary files.
        command: What goes on with a run in the folder, with ``--resume``.

    Returns:
        The exit code.
    """
    import tempfile

    refused = machine_fault(error, where="" if folder is None else str(folder))
    if refused is not None:
        if folder is not None and has_recipe(folder):
            then = f"then go on with: {command} --resume {shlex.quote(str(folder))}"
            refused = LichenError(refused.what, where=refused.where, fix=", ".join(filter(None, (refused.fix, then))))
        log(str(refused))
        return 2
    first = (str(error).splitlines() or [""])[0]
    try:
        if folder is not None and folder.is_dir():
            handle, file = private.create(folder / "crash.txt"), str(folder / "crash.txt")
        else:  # a name that nobody can have prepared, in a folder that all may share
            handle, file = tempfile.mkstemp(prefix="lichen-crash-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"lichen {__version__}, Python {sys.version}\n\n{traceback_text(error)}")
        where = f"the traceback is in {file}"
    except OSError as other:
        where = f"its traceback could not be kept ({other.strerror})"
    log(f"lichen failed: {type(error).__name__}: {first[:200]} ({where})")
    return 1


@contextmanager
def crash_in(folder: Path, *, command: str = "lichen run") -> Iterator[None]:
    """Unexpected faults inside leave their traceback in ``folder``; ``command`` goes on with a run in it."""
    try:
        yield
    except (LichenError, BrokenPipeError):
        raise
    except Exception as error:
        raise SystemExit(crash(error, folder, command=command)) from None


def free(folder: Path) -> Path:
    """``folder``, if a new run may begin there.

    Raises:
        LichenError: if it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise LichenError("is a file", where=f"--out {folder}", fix="choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        go_on = f"go on with: lichen run --resume {shlex.quote(str(folder))}, or " if has_recipe(folder) else ""
        raise LichenError("is not empty", where=f"--out {folder}", fix=f"{go_on}choose another folder")
    return folder


def has_recipe(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return (folder / "recipe.yaml").is_file()
