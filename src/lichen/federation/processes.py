"""Starts NVFlare's process of a kit, starts it again when it dies, and says why it does not.

It ends with the process that started it, however that ends. What it prints is in ``output.txt`` of the kit, and its log
in ``log.txt``. Nothing here needs torch.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, final

from lichen.core import private
from lichen.core.children import bound_command, bound_environment
from lichen.core.errors import LichenError
from lichen.core.files.lock import one_process
from lichen.core.machine import machine_fault
from lichen.federation.kits.settle import ENDED, Kit, settle
from lichen.federation.kits.tool import needs_grpc, needs_nvflare
from lichen.federation.reach import obstacle

__all__ = ["Parent", "check_port", "hold_kit"]

_MODULES = {
    "server": ("nvflare.private.fed.app.server.server_train", "fed_server.json"),
    "site": ("nvflare.private.fed.app.client.client_train", "fed_client.json"),
}
_MEMORY = {"NVFLARE_STREAMING_MAX_BLOB_SIZE": str(17 << 20), "MALLOC_ARENA_MAX": "2"}
"""Bytes that NVFlare takes in of one message, which is a piece and its head; and freed memory goes back sooner."""

_AGAIN, _QUICK = 2.0, 20.0
"""Seconds before it is started again, and how long it must have run for that to be no failure."""

_TAIL = 1 << 16
"""Bytes of a log that are read for a reason."""

_REASONS = (
    (
        "registration rejected: register_client unauthenticated",
        "another process is connected with this kit, perhaps on another machine",
        "end that one first; each process needs a kit of its own",
    ),
    ("is disabled", "the coordinator has barred this site", "speak with the coordinator"),
    ("does not match the current server task", "the server is of another federation", "speak with the coordinator"),
    (
        "registration rejected: no registration session",
        "the server does not accept this site's name",
        "make the kit again, from the answer file",
    ),
)
_ENDS = {
    ENDED["barred"]: ("the coordinator has barred this site", "speak with the coordinator"),
    ENDED["replaced"]: (
        "another process has connected with this kit while this one was silent",
        "end one of the two; each process needs a kit of its own",
    ),
}


@contextmanager
def hold_kit(folder: Path, *, say: Callable[[str], None]) -> Iterator[Kit]:
    """A kit for this process alone, its settings written anew.

    Raises:
        LichenError: if another process of this machine has it, or it is none.
    """
    kit = settle(folder)
    if kit.transport == "nvflare":
        needs_nvflare()
    else:
        needs_grpc()
    fix = "end that one first; each process needs a kit of its own"
    refusal = LichenError("another process runs this kit", where=str(folder), fix=fix)
    with one_process(folder, ".lock", say=say, refusal=refusal):
        yield kit


def check_port(kit: Kit) -> None:
    """Nothing, where the server's port is free.

    Raises:
        LichenError: if it is taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", kit.port))
        except OSError as error:
            fix = "end what listens there; the port is part of every kit"
            what = f"the port cannot be used: {error.strerror}"
            raise LichenError(what, where=f"port {kit.port}", fix=fix) from None


@final
class Parent:
    """NVFlare's process of a kit, kept running until it is told why not, or closed.

    Args:
        kit: The kit, held by this process.
        environment: What its component is told, beside the environment of this process.
        say: Told what keeps it, once for each reason.
    """

    def __init__(self, kit: Kit, environment: Mapping[str, str], *, say: Callable[[str], None]) -> None:
        self.fault: LichenError | None = None
        self.ended = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self._kit, self._say, self._refused = kit, say, ""
        self._environment = {**environment, **_MEMORY}
        self._closing = threading.Event()
        # The thread lives as long as the processes that it starts: the kernel ends those with it.
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _supervise(self) -> None:
        try:
            failures = 0
            while self._may_start():
                begun = time.monotonic()
                try:
                    code, mark = self._run()
                except OSError as error:
                    self._wait_for_machine(error)
                    continue
                if self._closing.is_set() or code == ENDED["stopped"]:
                    return
                failures = failures + 1 if time.monotonic() - begun < _QUICK else 0
                self.fault = _end_fault(self._kit, code) or _log_fault(self._kit, mark)
                if self.fault is None and failures > 2:
                    self.fault = _last_words(self._kit, code)
                if self.fault is not None:
                    return
                unheard = code == ENDED["unheard"]
                died = f"NVFlare's process ended with code {code}, and is started again"
                self._say(f"{self._kit.name}: {'the server is unheard; connects anew' if unheard else died}")
                self._closing.wait(_AGAIN)
        except LichenError as error:
            self.fault = error
        except Exception as error:  # an end without a reason would be one that is meant
            self.fault = LichenError(f"NVFlare's process is lost: {type(error).__name__}", where=str(self._kit.folder))
        finally:
            self.ended.set()

    def _wait_for_machine(self, error: OSError) -> None:
        """What the machine refuses, such as a full disk, passes; what it is, is said once."""
        refused = machine_fault(error, where=str(self._kit.folder))
        if refused is None:
            raise error
        if str(refused) != self._refused:
            self._refused = str(refused)
            self._say(f"NVFlare's process cannot be started yet: {refused}")
        self._closing.wait(_AGAIN)

    def _may_start(self) -> bool:
        """Wait until the server can be reached; False if this is over before."""
        shown, times = "", 0
        while not self._closing.is_set():
            if self._kit.kind == "server":
                return True
            found = obstacle(self._kit)
            if found is None:
                return True
            times = times + 1 if str(found.error) == shown else 1
            if times == found.tries:
                self.fault = found.error
                return False
            if str(found.error) != shown:
                shown = str(found.error)
                self._say(shown)
            self._closing.wait(_AGAIN)
        return False

    def _run(self) -> tuple[int, int]:
        """Run it to its end: its exit code, and where its part of the log begins."""
        kit, (module, config) = self._kit, _MODULES[self._kit.kind]
        log = kit.folder / "log.txt"
        mark = log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-u", "-m", module, "-m", str(kit.folder.absolute()), "-s", config, "--set"]
        command += ["secure_train=true", "config_folder=config"]
        command += ["org=lichen"] if kit.kind == "server" else [f"uid={kit.name}", "org=lichen"]
        environment = bound_environment() | self._environment
        with open(private.create(kit.folder / "output.txt"), "wb") as output:
            self.process = _start(bound_command(command), environment, kit.folder, output)
        if self._closing.is_set():
            self.process.kill()
        return self.process.wait(), mark

    def close(self, grace: float = 0.0) -> None:
        """End it.

        Args:
            grace: Seconds that it has to end by itself.
        """
        self._closing.set()
        if grace:
            self._thread.join(grace)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        self._thread.join()


def _start(command: list[str], environment: dict[str, str], folder: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        umask=0o077,
        start_new_session=True,  # Ctrl-C is for the process that stands over it
    )


def _end_fault(kit: Kit, code: int) -> LichenError | None:
    if code not in _ENDS:
        return None
    what, fix = _ENDS[code]
    return LichenError(what, where=f"site {kit.name}", fix=fix)


def _log_fault(kit: Kit, mark: int) -> LichenError | None:
    """What the log says since a mark, where that is something that a person can mend."""
    log = _tail(kit.folder / "log.txt", mark) + _tail(kit.folder / "output.txt", 0)
    for needle, what, fix in _REASONS:
        if needle in log:
            return LichenError(what, where=f"site {kit.name}", fix=fix)
    return None


def _last_words(kit: Kit, code: int) -> LichenError:
    lines = _tail(kit.folder / "output.txt", 0).splitlines() or ["nothing"]
    last = "\n    ".join(lines[-6:])
    what = f"NVFlare's process ended with code {code} again and again; it said last:\n    {last}"
    return LichenError(what, where=str(kit.folder), fix=f"read {kit.folder / 'log.txt'}")


def _tail(file: Path, mark: int) -> str:
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(mark if mark <= size else 0, size - _TAIL))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""
