"""What a site knows of one server's engine: what it has ordered, and what came of it that it has not fetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from lichen.engines.remote.requests import Request

__all__ = ["Order", "Session"]


@final
@dataclass(frozen=True, slots=True)
class Done:
    """An outcome; frames that lie on the disk are read when they are fetched."""

    place: int
    order: int
    client: int
    version: int
    frames: Callable[[], bytes]


@final
@dataclass(slots=True, eq=False)
class Session:
    """What one engine has ordered, and what came of it that it has not fetched."""

    request: Request
    orders: set[int] = field(default_factory=set)
    cancelled: set[int] = field(default_factory=set)
    outcomes: deque[Done] = field(default_factory=deque)
    count: int = 0
    over: bool = False
    fresh: bool = True

    def put(self, order: int, client: int, version: int, frames: Callable[[], bytes]) -> None:
        if not self.over and order not in self.cancelled:
            self.count += 1
            self.outcomes.append(Done(self.count, order, client, version, frames))


@final
@dataclass(frozen=True, slots=True)
class Order:
    session: Session
    number: int
    clients: tuple[int, ...]
    kind: bytes
    body: bytes
    invited: int = 0
    needed: int | None = None
