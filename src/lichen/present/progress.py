"""Shows progress: one live line on a terminal, plain lines in a file.

An observer: it reads events and cannot steer. What it writes goes to standard error by default, so
that standard output stays free for results.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING, final

from lichen.core.visible import visible
from lichen.present.column_names import column_title
from lichen.present.trace import came_to_nothing
from lichen.present.units import bytes_text, count_text, score_text, seconds_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from lichen.present.trace import Event

__all__ = ["Progress", "event_text"]

FIRST = 4
"""Clients of each cause that a line names."""


def event_text(event: Event, mean_seconds: float) -> str:
    """One round as one line.

    Args:
        event: The round.
        mean_seconds: Seconds a round took on average so far, for the time left of this column.
    """
    report = event.report
    parts = [column_title(event.column), event.grid, f"round {report.round}/{event.total_rounds}"]
    parts += [f"{name} {score_text(report.metrics[name])}" for name in ("loss", "valid") if name in report.metrics]
    if report.seconds > 0 and report.tokens is not None:
        parts.append(f"{count_text(report.tokens / report.seconds)} tokens/s")
    parts += [
        f"{way} {bytes_text(whole - valid)}" + (f" + {bytes_text(valid)} validation" if valid else "")
        for way, whole, valid in (
            ("up", report.bytes_up, report.valid_up),
            ("down", report.bytes_down, report.valid_down),
        )
    ]
    if came_to_nothing(report):
        parts.append("NOTHING LEARNED: no client's training counts")
    left = max(0, event.total_rounds - report.round)
    if left and math.isfinite(mean_seconds):
        parts.append(f"ETA {seconds_text(left * mean_seconds)}")
    return "  ".join(part for part in parts if part)


def attendance_text(event: Event) -> str:
    """Who did not come in a round, by cause, and what was refused, as one line; empty where all is well."""
    attendance = event.report.attendance
    if not attendance.summary():
        return ""
    first = attendance.named[0] if attendance.named else None
    why = f": client {first.client}: {first.what}" if first is not None else ""
    causes = attendance.causes_text(FIRST)
    who = f"{attendance.arrived} of {attendance.invited} count; {causes}" if causes else attendance.summary()
    return f"{column_title(event.column)}  round {event.report.round}  {who}{why}"


@final
class Progress:
    """Shows a run's rounds.

    Holds the terminal's live line, hence a context manager: leaving it gives the terminal back.

    Args:
        console: Where to write; standard error if None.
        quiet: Show nothing at all.
    """

    __slots__ = ("_console", "_key", "_live", "_rounds", "_seconds", "quiet")

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        from rich.console import Console

        self._console = console if console is not None else Console(stderr=True)
        self.quiet = quiet
        self._live: Live | None = None
        self._key = ("", "")
        self._seconds, self._rounds = 0.0, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Show one finished round."""
        if self.quiet:
            return
        if (event.column, event.grid) != self._key:
            self.close()
            self._key, self._seconds, self._rounds = (event.column, event.grid), 0.0, 0
        self._seconds, self._rounds = self._seconds + event.report.seconds, self._rounds + 1
        if missed := attendance_text(event):
            self._plain(missed)
        text = event_text(event, self._seconds / self._rounds)
        if not self._console.is_terminal:
            self._plain(text)
            return
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(Text(visible(text)), refresh=True)

    def say(self, line: str) -> None:
        """Write one line of its own, above the live one."""
        if not self.quiet:
            self._plain(line)

    def _plain(self, line: str) -> None:
        self._console.print(visible(line), markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the live line as it stands and give the terminal back; may be called again."""
        if self._live is not None:
            self._live.stop()
            self._live = None
