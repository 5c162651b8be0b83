"""A job on its way: what was asked, who has not answered yet, and since when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lichen.core.message import Job

__all__ = ["Flight"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A job that somebody has yet to answer; an answer counts by this job, whatever round it comes in.

    Attributes:
        job: What was asked.
        waiting: Clients of it that have not answered.
        sent: When it was sent, on the engine's clock.
        number: By which the engine knows it; None before it is submitted, and after a stop, as it is never saved.
    """

    job: Job
    waiting: tuple[int, ...]
    sent: float = 0.0
    number: int | None = None
