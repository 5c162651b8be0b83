"""Children that need not import torch again: a process that has imported it forks them.

A child that starts Python, torch, transformers and Lichen takes three to eight seconds of a processor before it does
anything, and the suite starts some hundreds. Where what counts is what a child computes, :func:`warm_children` lets
the children of a test, and theirs, be forked from one process that has imported all of it. Each is a process of its
own with its own environment, folder and files, and ends with its parent; what stands in its place in the tree is
:mod:`warm_child`. Children whose environment decides about imports or threads, and those that are no plain
``python -m``, ``-c`` or script, start as ever.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).absolute()
CHILD = str(HERE.with_name("warm_child.py"))
MODULES = (
    "torch",
    "torch.distributed",
    "transformers.modeling_utils",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "lichen.cli_run",
    "lichen.cli_serve",
    "lichen.recipes.run",
    "lichen.recipes.assemble.column",
    "lichen.engines.spawned",
    "lichen.engines.distributed",
)
MAY_DIFFER = ("LICHEN_", "PYTEST_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "GLOO_", "COLUMNS", "HOME", "TMPDIR")
MAY_DIFFER += ("TORCHINDUCTOR_CACHE_DIR",)  # torch sets it where it is imported
MAY_DIFFER += ("PYTHONPATH",)  # a child looks there first, and has what a sitecustomize there does
MAY_DIFFER += ("TQDM_", "HF_HUB_DISABLE_", "TRANSFORMERS_VERBOSITY")  # the command sets them, in tests' process too
MAY_DIFFER += ("GOMP_SPINCOUNT",)  # it sets this for its children, each of which has one thread here
"""Beginnings of variables that say nothing to imports or threads."""

_start = subprocess.Popen.__init__
_active: list[str] = []
"""The socket of the process that forks, while children are to be warm."""
_served: dict[str, subprocess.Popen[bytes] | None] = {}
"""Processes that fork, by socket; none where this one is a child of it."""
_of_server = dict(os.environ)


@contextlib.contextmanager
def warm_children(folder: Path) -> Iterator[None]:
    """Within, plain Python children are forked from a process that is started for the first of them."""
    if sys.platform != "linux":
        yield
        return
    _active[:] = [str(folder / "warm")]
    subprocess.Popen.__init__ = _popen  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        subprocess.Popen.__init__ = _start  # type: ignore[method-assign]
        _active.clear()


def end() -> None:
    """End the process that forks, and all its children."""
    for server in filter(None, _served.values()):
        server.kill()
        server.wait()
    _served.clear()


def _popen(self: subprocess.Popen[Any], args: Any, *rest: Any, **more: Any) -> None:
    arguments = plain_python(args)
    environment = more.get("env") or os.environ
    # A process that forks ends with the thread that started it.
    may_start = _active[0] in _served or threading.current_thread() is threading.main_thread()
    if arguments is not None and not rest and not more.get("shell") and may_start and alike(environment):
        args = [sys.executable, "-S", "-P", CHILD, _socket(), *arguments]
    _start(self, args, *rest, **more)


def plain_python(args: Any) -> list[str] | None:
    """What follows the interpreter, where it is one of the forms that a fork can do."""
    if isinstance(args, str | bytes | os.PathLike):
        return None
    words = [os.fspath(word) for word in args]
    bound = [sys.executable, "-S", "-P"]
    if words[:3] == bound and words[3].endswith("core/children.py"):
        words = words[4:]
    if len(words) < 2 or words[0] != sys.executable:
        return None
    rest = words[1:]
    first, *more = rest[2:] if rest[:2] == ["-W", "ignore"] else rest
    if first == "-c":
        return None if "sys.modules" in more[0] else rest  # it asks what was imported
    known = more[:1] == ["lichen"] if first == "-m" else first.endswith(".py") and Path(first).is_absolute()
    return rest if known else None


def alike(environment: Any) -> bool:
    """Whether an environment differs from that of the process that forks in nothing that it has used."""
    names = {name for name in {*environment, *_of_server} if environment.get(name) != _of_server.get(name)}
    return all(name.startswith(MAY_DIFFER) for name in names)


def _socket() -> str:
    (place,) = _active
    if place not in _served:
        ready, told = os.pipe()
        _served[place] = _serve_in_a_process(place, told)
        os.close(told)
        with open(ready, "rb") as lines:
            if lines.readline() != b"ready\n":
                raise RuntimeError("the process that forks children has ended")
    return place


def _serve_in_a_process(place: str, told: int) -> subprocess.Popen[bytes]:
    server: subprocess.Popen[bytes] = subprocess.Popen.__new__(subprocess.Popen)
    words = [sys.executable, str(HERE), place, str(told), str(os.getpid())]
    _start(server, words, env=dict(_of_server), pass_fds=[told])
    return server


def serve(place: str, told: int, parent: int) -> dict[str, Any]:
    """Fork a child for every order; it returns in the children alone, with the order."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    for name in MODULES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(place)
    listener.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is said to those who stand in the children's places
    lines: dict[socket.socket, int] = {}
    watched = selectors.DefaultSelector()
    watched.register(listener, selectors.EVENT_READ)
    watched.register(woken, selectors.EVENT_READ)
    gc.collect()
    gc.freeze()
    os.write(told, b"ready\n")
    os.close(told)
    while True:
        events = [key.fileobj for key, _ in watched.select()]
        for line in [line for line in events if isinstance(line, socket.socket) and line in lines]:
            os.kill(lines[line], signal.SIGKILL)  # who stood in its place is gone
            _ended(lines, watched, os.waitpid(lines[line], 0))
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                _ended(lines, watched, found)
        if listener in events:
            line = listener.accept()[0]
            order, files = _received(line)
            own = os.getpid()
            child = os.fork()
            if child == 0:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != own:
                    os._exit(1)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for held in (line, listener, *lines):
                    held.close()
                watched.close()
                os.close(woken)
                os.close(wake)
                _become(order, files)
                return order
            for number in files:
                os.close(number)
            with contextlib.suppress(OSError):
                line.sendall(f"{child}\n".encode())
            lines[line] = child
            watched.register(line, selectors.EVENT_READ)


def _ended(lines: dict[socket.socket, int], watched: selectors.BaseSelector, found: tuple[int, int]) -> None:
    for line in [line for line, child in lines.items() if child == found[0]]:
        with contextlib.suppress(OSError):
            line.sendall(f"{found[1]}\n".encode())
        watched.unregister(line)
        del lines[line]
        line.close()


def _received(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size = array.array("i").itemsize
    head, ancillary, _, _ = line.recvmsg(8, socket.CMSG_SPACE(size * 250))
    files = array.array("i")
    for _, kind, data in ancillary:
        if kind == socket.SCM_RIGHTS:
            files.frombytes(data[: len(data) - len(data) % size])
    left, body = int.from_bytes(head, "little"), b""
    while len(body) < left:
        if not (part := line.recv(left - len(body))):
            raise RuntimeError("an order was cut off")
        body += part
    return json.loads(body.decode("utf-8", "surrogateescape")), list(files)


def _become(order: dict[str, Any], files: Sequence[int]) -> None:
    """Take over files, folder, environment and signals."""
    import fcntl

    import numpy as np

    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 600) for number in files]
    for number in files:
        os.close(number)
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.close(number)
    for number, target in zip(high, order["files"], strict=True):
        os.dup2(number, target, inheritable=True)
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if number in order["files"]:
            errors = "backslashreplace" if number == 2 else "strict"
            raw = os.fdopen(number, mode + "b", -1 if number < 2 else 0, closefd=False)
            stream = io.TextIOWrapper(raw, "utf-8", errors, line_buffering=number == 2, write_through=number == 2)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    os.chdir(order["folder"])
    os.umask(order["mask"])
    os.environ.clear()
    os.environ.update(order["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in order["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    random.seed()
    np.random.seed()


def run(order: dict[str, Any]) -> NoReturn:
    """Do what Python was to do, as the main program of this process."""
    words: list[str] = order["arguments"]
    sys.orig_argv = [sys.executable, *words]
    for place in reversed(order["environment"].get("PYTHONPATH", "").split(os.pathsep)):
        if place and place not in sys.path:
            sys.path.insert(0, place)
            if (start := Path(place, "sitecustomize.py")).exists():
                runpy.run_path(str(start))
    if words[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        words = words[2:]
    sys.path.remove(str(HERE.parent))
    first = words[0]
    if first == "-c":
        program = types.ModuleType("__main__")
        sys.modules["__main__"] = program
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), program.__dict__)
    elif first == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    place = sys.argv[1]
    found = serve(place, int(sys.argv[2]), int(sys.argv[3]))
    import warm  # the same file, whose functions children of this child meet

    warm._of_server.clear()
    warm._of_server.update({**found["environment"]})
    warm._active[:] = [place]
    warm._served[place] = None
    subprocess.Popen.__init__ = warm._popen  # type: ignore[method-assign, assignment]
    run(found)
