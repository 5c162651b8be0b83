"""One round after another: what the server remembers between them, and what it reports of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, final

from lichen.core.contracts.engine import Engine
from lichen.core.contracts.value import RoundValue
from lichen.core.replies import ATTENDED, Attendance
from lichen.core.timing.flight import Flight
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["Algorithm", "Report", "ServerState"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Everything the server must remember between rounds; written at each round's end.

    Attributes:
        round: Rounds finished; also the version of ``shared``.
        shared: The shared tensors.
        optimizer: State of the server optimizer.
        best: ``shared`` of the best validated round; empty before the first validation.
        best_round: Its round, -1 before.
        best_value: Its validation value, NaN before.
        downlink: What clients hold and how they are brought further; empty where all is sent whole.
        in_flight: Jobs that somebody has yet to answer, with the tensors they were sent; oldest first.
        transforms: What transforms keep of their total halves, each under its name; empty where none keeps anything.
        clock: Seconds since the start, where the engine has a virtual clock.
        rollback: Clients whose last answer did not count, and the version of the first such since the last that did:
            from what they had then they go on. Empty where every answer counted.
    """

    round: int
    shared: Shared
    optimizer: Tree = field(default_factory=dict)
    best: Shared = field(default_factory=Shared)
    best_round: int = -1
    best_value: float = float("nan")
    downlink: Tree = field(default_factory=dict)
    in_flight: tuple[Flight, ...] = ()
    transforms: Tree = field(default_factory=dict)
    clock: float = 0.0
    rollback: Mapping[int, int] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One finished round, for the observers, who read and cannot steer.

    Attributes:
        round: Rounds finished, from 1.
        clients: Who was asked in this round.
        metrics: Scalars such as ``loss``, ``valid``, ``deviation``; ``time``, the virtual seconds since the start.
        tokens: Tokens (or rows) the clients trained on, padding left out; None where that is not told, for privacy.
        bytes_up: Bytes from clients to server in this round.
        bytes_down: Bytes from server to clients in this round.
        seconds: Wall time of the round.
        valid_up: Of ``bytes_up``, those of validation.
        valid_down: Of ``bytes_down``, those of validation.
        attendance: Who answered, what was refused and why.
        value: What the clients contributed; None where nobody asked.
    """

    round: int
    clients: tuple[int, ...]
    metrics: Mapping[str, float]
    tokens: int | None = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    valid_up: int = 0
    valid_down: int = 0
    attendance: Attendance = ATTENDED
    value: RoundValue | None = None


class Algorithm(Protocol):
    """The server's side of one round."""

    def init(self, shared: Shared) -> ServerState: ...
    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]: ...
