"""Jobs in flight between rounds: submitted again where a run goes on, given up where they are too old."""

from __future__ import annotations

from dataclasses import replace

from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.timing.flight import Flight
from lichen.core.timing.schedule import Schedule, VirtualClock

__all__ = ["at_work", "give_up_old", "now_in_flight"]


def at_work(state: ServerState) -> frozenset[int]:
    """Clients that have yet to answer."""
    return frozenset(client for flight in state.in_flight for client in flight.waiting)


def now_in_flight(state: ServerState, engine: Engine) -> ServerState:
    """The state, all of whose jobs in flight this engine knows; its virtual clock, if it has one, shows the state's.

    A job is submitted again for those who have not answered: on a virtual clock at the time when it was first sent, so
    that they answer when they would have, on another as of now.
    """
    flights = list[Flight]()
    for flight in state.in_flight:
        if flight.number is None:
            if isinstance(engine, VirtualClock):
                engine.set_time(flight.sent)
            job = replace(flight.job, clients=flight.waiting)
            flight = replace(flight, job=job, sent=engine.now(), number=engine.submit(job))
        flights.append(flight)
    if isinstance(engine, VirtualClock):
        engine.set_time(state.clock)
    return replace(state, in_flight=tuple(flights))


def give_up_old(state: ServerState, engine: Engine, schedule: Schedule) -> tuple[ServerState, dict[int, int]]:
    """The state without jobs whose answers would weigh nothing, and the clients that are free again.

    Returns:
        ``(state, by client, ascending, the version of its job)``.
    """
    flying, free = list[Flight](), dict[int, int]()
    for flight in state.in_flight:
        if schedule.discount(state.round - flight.job.version) > 0:
            flying.append(flight)
            continue
        free |= dict.fromkeys(flight.waiting, flight.job.version)
        if flight.number is not None:
            engine.cancel(flight.number)
    return replace(state, in_flight=tuple(flying)), dict(sorted(free.items()))
