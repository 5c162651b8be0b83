"""Stands over a site's worker: starts it, and again when a signal or a fault ends it, after a pause that grows.

The worker has the rows, the model and NVFlare's process, and may be ended at any moment, mostly for want of memory.
This process has none of that and lives on. An end that is meant is passed on: the worker has left, has said what is
wrong, or was stopped. The worker ends with this process, however that ends. A door of its own says how the worker
stands, and stops it also where there is none just now. Nothing here needs torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import final

from lichen.core import private
from lichen.core.children import bound_environment
from lichen.core.errors import LichenError
from lichen.core.files.lock import one_process
from lichen.core.machine import machine_fault
from lichen.federation.door import Door, Head, call, door_of, remove_socket, socket_folder
from lichen.federation.kits.settle import SUPERVISOR, open_site_kit
from lichen.federation.supervision.endings import STOPS, ending, final_code, out_of_memory

__all__ = ["Supervisor", "pauses", "stop_kit", "supervised"]

_PAUSES = (1.0, 60.0)
"""Seconds before a worker is started again: the first time, and at most."""

_HEALTHY = 300.0
"""Seconds that a worker must have run for the pauses to begin anew."""

_UNPROVEN = 10.0
"""Seconds of the first start: a fault in these is the user's to see, as nothing has worked yet."""

_FREE = 1 << 20
"""Bytes that must fit on the disk before a worker is started again."""

_LOOK = 2.0
"""Seconds between two looks at a disk that is full."""

_WITHIN = 3.0
"""Seconds for an answer at a door."""


def pauses(ran: Sequence[float]) -> float:
    """Seconds to wait before the next start.

    Args:
        ran: Seconds that each worker ran so far, in order.

    >>> [pauses(ran) for ran in ([5], [5, 5], [5, 5, 5], [5] * 9, [5, 5, 400], [5, 5, 400, 5])]
    [1.0, 2.0, 4.0, 60.0, 1.0, 2.0]
    """
    first, most = _PAUSES
    pause = 0.0
    for seconds in ran:
        pause = first if seconds >= _HEALTHY or not pause else min(most, 2 * pause)
    return pause


@final
class Supervisor:
    """A site whose worker is started again when it dies.

    Args:
        kit: The site's kit.
        command: Starts the worker.
        say: Called with a line for every start but the first.

    Attributes:
        restarts: How often the worker was started again.

    Raises:
        LichenError: if it is no site's kit, or another process runs it.
    """

    def __init__(self, kit: Path, command: Sequence[str], *, say: Callable[[str], None]) -> None:
        self.name = open_site_kit(kit).name
        self.restarts, self._doing, self._again = 0, "starts", 0.0
        self._kit, self._command, self._say = kit, list(command), say
        self._over = threading.Event()  # nothing is started any more
        self._signal, self._left = 0, False
        self._process: subprocess.Popen[bytes] | None = None
        with ExitStack() as stack:
            fix = "end that one first; each process needs a kit of its own"
            refusal = LichenError("another process runs this kit", where=str(kit), fix=fix)
            stack.enter_context(one_process(kit, f".{SUPERVISOR}", say=say, refusal=refusal))
            place = socket_folder(kit, SUPERVISOR)
            stack.callback(remove_socket, kit, SUPERVISOR)
            stack.callback(Door(place / "door", self._answer, at_once=4).close)
            self._stack = stack.pop_all()

    def run(self) -> int:
        """Keep a worker running until it ends for good; the site's exit code."""
        ran = list[float]()
        with self._stack, self._passing_signals_on():
            while not self._over.is_set():
                lacked, begun = out_of_memory(), time.monotonic()
                code = self._work()
                ran.append(time.monotonic() - begun)
                done = final_code(code)
                if done is not None or self._over.is_set():
                    return 0 if self._left else self._signal_code() or (done if done is not None else 1)
                if not self.restarts and code > 0 and ran[0] < _UNPROVEN:
                    return code
                self._pause(pauses(ran), ending(code, _risen(lacked, out_of_memory())))
        self._say(f"{self.name} has left" if self._left else "stopped")
        return 0 if self._left else self._signal_code()

    def _work(self) -> int:
        """One worker, from its start to its end; its exit code."""
        self._doing = "runs"
        # Bound to the thread that starts it: the kernel ends it with this process. A session of its own: Ctrl-C at a
        # terminal would reach both, and this process passes it on.
        self._process = subprocess.Popen(
            self._command, env=bound_environment(), stdin=subprocess.DEVNULL, start_new_session=True
        )
        if self._over.is_set():
            self._process.send_signal(self._signal or signal.SIGTERM)
        return self._process.wait()

    def _pause(self, seconds: float, why: str) -> None:
        whole = f"{seconds:.0f} second{'s' * (seconds != 1)}"
        self._say(f"the worker of {self.name} {why}; it is started again in {whole}")
        self._doing, self._again = f"its worker {why}", time.monotonic() + seconds
        self._over.wait(seconds)
        self._wait_for_disk()
        self.restarts += 1

    def _wait_for_disk(self) -> None:
        """A worker that began on a full disk would end with an error, and not go on with its run."""
        shown = ""
        while (lacks := _disk_fault(self._kit)) is not None and not self._over.is_set():
            if lacks != shown:
                self._say(f"the worker of {self.name} waits: {lacks}")
                self._doing, shown = f"its worker waits: {lacks}", lacks
            self._over.wait(_LOOK)

    def _signal_code(self) -> int:
        if not self._signal:
            return 0
        return 130 if self._signal == signal.SIGINT else 128 + self._signal

    @contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        """What is meant to end the site reaches its worker, and no other is started."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._pass_on) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._over.set()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    # --- its door ----------------------------------------------------------------------------------------------------

    def _answer(self, head: Head, body: bytes) -> tuple[Head, bytes]:
        if head.get("op") == "status":
            doing = "" if self._doing == "runs" else self._doing
            if doing and (left := self._again - time.monotonic()) > 0:
                doing += f"; it is started again in {left:.0f} seconds"
            return {"restarts": self.restarts, "doing": doing, "pid": os.getpid()}, b""
        if head.get("op") == "stop":
            self._left = True
            self._over.set()
            threading.Thread(target=self._stop_worker, daemon=True).start()
        return {}, b""

    def _stop_worker(self) -> None:
        """Let the worker say goodbye; one that does not listen yet is ended."""
        try:
            call(door_of(self._kit), {"op": "stop"}, within=_WITHIN)
        except OSError:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()


def _disk_fault(kit: Path) -> str | None:
    """Why nothing can be written into a kit now; None: it can."""
    probe = kit / f".{SUPERVISOR}.probe"
    try:
        with open(private.create(probe), "wb") as file:
            file.write(bytes(_FREE))
        return None
    except OSError as error:
        refused = machine_fault(error)
        return f"{kit}: {refused.what}" if refused is not None else None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _risen(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Who was out of memory in between; empty: nobody."""
    return next((who for who, count in after.items() if count > before.get(who, count)), "")


def supervised(kit: Path) -> Head | None:
    """How the supervisor of a kit on this machine stands; None where there is none.

    Returns:
        ``restarts``, and ``doing``: empty while a worker runs.
    """
    try:
        return call(door_of(kit, SUPERVISOR), {"op": "status"}, within=_WITHIN)[0]
    except OSError:
        return None


def stop_kit(kit: Path) -> bool:
    """End what runs on this machine with a kit: a server, or a site, supervised or not; whether there is any."""
    for name in (SUPERVISOR, ""):
        try:
            call(door_of(kit, name) if name else door_of(kit), {"op": "stop"}, within=_WITHIN)
            return True
        except OSError:
            continue
    return False
