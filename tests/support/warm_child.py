"""Stands in the place of a child process that :mod:`warm` forks: its files, its place in the tree, its end.

``python -S -P warm_child.py SOCKET ARGUMENT...`` says to the process behind the socket what Python was to do, gives
it the files that are open here, passes signals on, and ends as the other ended. Where this one is killed, the socket
closes and the other is killed.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(place: str, arguments: list[str]) -> None:
    if parent := os.environ.pop("LICHEN_PARENT", ""):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):
            os._exit(1)
    open_files = [int(name) for name in os.listdir("/proc/self/fd")]
    open_files = [number for number in open_files if is_passed_on(number)]
    ignored = [int(number) for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    wanted: list[int] = []
    child = 0

    def forward(number: int, frame: FrameType | None) -> None:
        if child:
            os.kill(child, number)
        else:
            wanted.append(number)

    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, forward)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect(place)
    order = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": open_files,
        "ignored": ignored,
        "mask": os.umask(0),
    }
    body = json.dumps(order).encode("utf-8", "surrogateescape")
    files = array.array("i", open_files)
    line.sendmsg([len(body).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    line.sendall(body)
    for number in open_files:
        os.close(number)  # who reads at the other end waits until all have closed it
    answers = line.makefile("rb")
    child = int(answers.readline() or 0)
    for number in wanted:
        os.kill(child, number)
    status = int(answers.readline() or signal.SIGKILL)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def is_passed_on(number: int) -> bool:
    """Whether a file is open here because who started this process handed it down."""
    try:
        return number < 3 or not fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
