"""What all commands share: tables, lines, JSON, and a crash report in a file.

Results go to standard output, everything else to standard error. Names of strangers pass through here on their way to
the screen, and can steer nothing there. Nothing heavy is imported here.
"""

from __future__ import annotations

import errno
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen import __version__
from lichen.core import private
from lichen.core.errors import LichenError, traceback_text
from lichen.core.visible import visible, visible_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["crash", "crash_in", "free", "has_recipe", "log", "print_json", "say", "show"]


def show(table: Table) -> None:
    """Print a table; as wide as its lines need to be where nobody's screen limits it."""
    from lichen.present.report import WIDE, table_text

    screen = sys.stdout.isatty()
    print(table_text(table, width=shutil.get_terminal_size().columns if screen else WIDE, terminal=screen))


def say(line: str) -> None:
    """Say a line on standard output, where results go."""
    print(visible(line), flush=True)


def log(line: str) -> None:
    """Say a line on standard error."""
    print(visible(line), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a value as JSON, which has no NaN."""
    import json

    print(visible_json(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)))


def crash(error: BaseException, folder: Path | None) -> int:
    """Keep the traceback in a file and say so in one line; a full disk is no fault of ours, and has a fix.

    Args:
        error: What was not foreseen.
        folder: Where the file goes if it is there; else among the temporary files.

    Returns:
        The exit code.
    """
    import tempfile

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        begun = folder is not None and has_recipe(folder)
        then = f"go on with: lichen run --resume {shlex.quote(str(folder))}" if begun else "give the command again"
        log(str(LichenError("the disk is full", where=str(folder or Path.cwd()), fix=f"make room, then {then}")))
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
def crash_in(folder: Path) -> Iterator[None]:
    """Unexpected faults inside leave their traceback in ``folder``."""
    try:
        yield
    except (LichenError, BrokenPipeError):
        raise
    except Exception as error:
        raise SystemExit(crash(error, folder)) from None


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
