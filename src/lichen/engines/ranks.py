"""Communication among the ranks of a run: bytes, and the first error of any.

Every rank runs the same program, so all come to the same places in the same order. At each such place
they first meet: each says whether it is well, how many bytes it brings, and what it came for. So a
fault of one ends all of them with that fault, at the next meeting, and nobody waits for a rank that
has left. Nothing but bytes crosses, over gloo, whatever the device: never an object to be unpickled.

References:
    Frederica Darema, David George, V. Alan Norton and Gregory Pfister. "A single-program-multiple-data
    computational model for EPEX/FORTRAN." Parallel Computing 7(1), 1988 (every rank the same program).
"""

from __future__ import annotations

import json
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, final

import torch
from torch.distributed.rendezvous import rendezvous

from lichen.core.errors import LichenError, traceback_text
from lichen.core.machine import machine_fault

__all__ = ["RENDEZVOUS", "RankError", "Ranks", "connect", "is_rank", "ranks_here", "threads_for"]

RENDEZVOUS = "LICHEN_RENDEZVOUS"
"""Environment variable with the address where ranks find one another; without it, as torchrun says."""

WAIT = timedelta(hours=12)
"""How long a rank waits for the slowest; one that has died is noticed at once, by its closed socket."""

START = timedelta(minutes=10)
"""How long ranks wait until all of them have started."""

WELL, FAULT, STOPPED = 0, 1, 2


@final
class RankError(RuntimeError):
    """A fault of lichen itself in another rank; its traceback is in the notes."""


def is_rank() -> bool:
    """Whether this process was started as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_here() -> tuple[int, int]:
    """``(this rank, how many)``, by the environment that torchrun makes; (0, 1) without it.

    Raises:
        LichenError: if that environment is not two numbers.
    """
    if not is_rank():
        return 0, 1
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        fields = f"RANK={os.environ['RANK']!r} and WORLD_SIZE={os.environ['WORLD_SIZE']!r} name no rank"
        raise LichenError(fields, where="environment", fix="unset them, or start the ranks with torchrun")
    return rank, size


def threads_for(ranks: int) -> int:
    """Threads of each of so many ranks on this machine: the cores, shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


@final
class Ranks:
    """Who takes part, and their meetings. One rank alone meets nobody, and everything is free.

    A context manager: leaving it tells the others of an error, or waits until all have come to the end.

    Args:
        rank: This process, from 0.
        size: How many there are; above 1, the default group of ``torch.distributed`` must be theirs.
    """

    __slots__ = ("_separated", "rank", "size")

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._separated = False

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, data: bytes = b"", *, source: int = 0, about: str = "share") -> bytes:
        """The bytes of rank ``source``, on every rank; what the others bring is not looked at.

        Args:
            data: What ``source`` has to say.
            source: Whose bytes they are.
            about: What the ranks meet for; all must mean the same.

        Raises:
            LichenError: the fault of another rank, or that one is lost.
            RankError: for a fault of lichen itself in another rank.
            KeyboardInterrupt: if another rank was stopped.
        """
        if self.size == 1:
            return data
        with _whole():
            lengths = self._meet(WELL, data if self.rank == source else b"", about)
            return self._broadcast(data, lengths[source], source)

    def exchange(self, data: bytes, *, about: str = "exchange") -> list[bytes]:
        """Everybody's bytes, by rank; raises as :meth:`share`."""
        return [self.share(data, source=rank, about=f"{about} {rank}") for rank in range(self.size)]

    def ask_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives on the first rank, which alone calls it: a value that JSON can write."""
        return json.loads(self.share(json.dumps(make()).encode() if self.first else b"", about="ask first"))

    def wait(self) -> None:
        """Go on when all have come here; raises as :meth:`share`."""
        self.share(about="wait")

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """The first rank goes through the block alone, then the others: they find what it has fetched."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        try:
            if error is None:
                self.wait()
            elif not self._separated:
                # Whatever this rank hears from others now, its own error is the one to tell.
                with suppress(LichenError, RankError, KeyboardInterrupt), _whole():
                    stopped = isinstance(error, KeyboardInterrupt)
                    self._meet(STOPPED if stopped else FAULT, _error_bytes(error), "")
        finally:
            torch.distributed.destroy_process_group()

    def _meet(self, state: int, data: bytes, about: str) -> list[int]:
        """Everybody's number of bytes, if all are well and came for the same."""
        mine = torch.tensor([state, len(data), zlib.crc32(about.encode())], dtype=torch.int64)
        heads = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(lambda: torch.distributed.all_gather(heads, mine))
        states, lengths, tags = (column.tolist() for column in torch.stack(heads).T)
        for rank, other in enumerate(states):
            if other != WELL:
                details = self._broadcast(data, lengths[rank], rank)
                self._separated = True
                raise _error(other, details, rank)
        if len(set(tags)) > 1:
            self._separated = True
            raise LichenError(
                "the ranks are not at the same place of the run",
                where="engine",
                fix="start all of them with one version of lichen, one recipe and one run folder that all of them see",
            )
        return list(lengths)

    def _broadcast(self, data: bytes, length: int, source: int) -> bytes:
        if not length:
            return b""
        buffer = torch.empty(length, dtype=torch.uint8)
        if self.rank == source:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._call(lambda: torch.distributed.broadcast(buffer, source))
        return data if self.rank == source else buffer.numpy().tobytes()

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            self._separated = True
            first = (str(error).splitlines() or [""])[0]
            raise LichenError(
                f"rank {self.rank} lost the others: {first[:160]}",
                where="engine",
                fix="see what the other ranks said; then go on with: lichen run --resume",
            ) from None


def connect(device: str = "cpu") -> Ranks:
    """The ranks this process was started among; alone where it was not.

    Threads are shared out among the ranks of a machine unless ``OMP_NUM_THREADS`` says how many;
    on CUDA each takes a device of its own, as far as there are any.

    Args:
        device: Where the model will be.

    Raises:
        LichenError: if the others do not come.
    """
    rank, size = ranks_here()
    if size == 1:
        return Ranks()
    local, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_for(local_size))
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    where = os.environ.get(RENDEZVOUS, "env://")
    try:
        # Found within minutes, then waited for as long as a round may take.
        store, _, _ = next(rendezvous(where, rank, size, timeout=START))
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=WAIT)
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise LichenError(
            f"rank {rank} did not find the other {size - 1}: {first[:160]}",
            where="engine",
            fix="start all ranks together, with torchrun or with: lichen run RECIPE -s engine.name=distributed",
        ) from None
    return Ranks(rank, size)


@contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C waits until the ranks have parted: half a meeting would leave the others in it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _error_bytes(error: BaseException) -> bytes:
    error = machine_fault(error) or error
    if isinstance(error, LichenError):
        details = {"what": error.what, "where": error.where, "fix": error.fix}
    else:
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        details = {"fault": text, "trace": traceback_text(error)}
    return json.dumps(details).encode()


def _error(state: int, details: bytes, rank: int) -> BaseException:
    if state == STOPPED:
        return KeyboardInterrupt()
    fields: dict[str, str] = json.loads(details)
    if "what" in fields:
        return LichenError(fields["what"], where=fields["where"], fix=fields["fix"])
    fault = RankError(f"{fields['fault']} (in rank {rank})")
    fault.add_note(fields["trace"])
    return fault
