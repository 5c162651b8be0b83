"""Child processes that end with their parent, however it dies.

A parent that is killed cannot end anybody. So each child asks the kernel to be killed when its parent dies, where the
kernel knows how (Linux); elsewhere it looks every half second whether its parent is still there. A program that
knows nothing of this, such as pip, is started through this file, which asks first and then becomes the program: the
wish survives ``exec``. Nothing but the standard library is imported, because the file is also run by its path.

References:
    prctl(2), PR_SET_PDEATHSIG. Linux manual pages. https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

__all__ = ["MISSING", "bound_command", "bound_environment", "end_with_parent"]

PARENT = "LICHEN_PARENT"
"""Environment variable with the process whose end is ours."""

MISSING = 127
"""Exit code of a bound command whose program is not there, as a shell has it."""

PR_SET_PDEATHSIG = 1
EVERY = 0.5
"""Seconds between two looks at the parent."""


def bound_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a child of this process that calls :func:`end_with_parent`."""
    return {**environment, PARENT: str(os.getpid())}


def bound_command(command: Sequence[str]) -> list[str]:
    """What starts any program so that it ends with this process; needs :func:`bound_environment`, too."""
    return [sys.executable, "-S", "-P", __file__, *command]


def end_with_parent() -> None:
    """Be killed when the process dies that started this one bound to itself, or torchrun; nothing for others."""
    if parent := os.environ.pop(PARENT, ""):
        if bound_by_kernel():
            if os.getppid() != int(parent):  # it died before
                os._exit(1)
            return
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # it starts ranks from a thread of its own choice, so it is looked at
        parent = str(os.getppid())
    else:
        return
    threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def bound_by_kernel() -> bool:
    """Ask to be killed when the thread that started this process ends; whether the kernel knows how."""
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        return bool(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _watch(parent: int, child: subprocess.Popen[bytes] | None = None) -> None:
    """Until the child, if any, has ended; when the parent is gone, all end."""
    while child is None or child.poll() is None:
        if os.getppid() != parent:
            if child is not None:
                child.kill()
            os._exit(1)
        time.sleep(EVERY)


def _main(command: list[str]) -> int:
    """Become the command, or stand over it where the kernel watches nobody's parent."""
    parent = int(os.environ.pop(PARENT))
    if bound_by_kernel():
        if os.getppid() != parent:
            return 1
        os.execvp(command[0], command)
    child = subprocess.Popen(command)
    _watch(parent, child)
    return child.wait()


if __name__ == "__main__":
    try:
        sys.exit(_main(sys.argv[1:]))
    except FileNotFoundError:
        sys.exit(MISSING)
