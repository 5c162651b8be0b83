"""A run that goes on beside a server: ``lichen submit --resume``, started again when it dies, until it ends for good.

Nothing here waits: a server that looks at its sites looks at the run, too. Nothing here needs torch.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import final

from lichen.core.children import bound_environment
from lichen.federation.supervision.endings import ending, final_code
from lichen.federation.supervision.supervisor import pauses

__all__ = ["ResumedRun"]

_GOODBYE = 10.0
"""Seconds that the run has to stop after Ctrl-C."""

_DONE = 3
"""Exit code of a run that has come to its end, and has learned nothing."""


@final
class ResumedRun:
    """A run that goes on; its process ends with this one.

    Args:
        command: Goes on with it.
        say: Called with a line when it dies, and when it is over.
        quiet: Its results are not printed.
    """

    def __init__(self, command: Sequence[str], *, say: Callable[[str], None], quiet: bool = False) -> None:
        self._command, self._say, self._quiet = list(command), say, quiet
        self._process: subprocess.Popen[bytes] | None = None
        self._ran, self._begun, self._again = list[float](), 0.0, 0.0
        self.code: int | None = None

    def look(self) -> None:
        """Start it where it is to run and does not; called every now and then from one thread."""
        now = time.monotonic()
        if self.code is not None or (self._process is None and now < self._again):
            return
        if self._process is None:
            self._begun = now
            self._process = subprocess.Popen(
                self._command,
                env=bound_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if self._quiet else None,
                start_new_session=True,  # Ctrl-C is for the server, which passes it on
            )
            return
        code = self._process.poll()
        if code is None:
            return
        self._process = None
        self._ran.append(now - self._begun)
        done = _DONE if code == _DONE else final_code(code)
        if done is None:
            pause = pauses(self._ran)
            self._again = now + pause
            self._say(f"the run {ending(code)}; it goes on in {pause:.0f} second{'s' * (pause != 1)}")
            return
        self.code = done
        self._say("the run is over" if done in (0, _DONE) else f"the run ended with exit code {done}, as it says above")

    def close(self) -> None:
        """Stop it as Ctrl-C does; what it has learned so far is in its folder."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_GOODBYE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
