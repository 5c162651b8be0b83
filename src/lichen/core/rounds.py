"""The round loop, with checkpoints and resume.

``run`` repeats ``algorithm.round`` and writes the server's state after each one, so that a kill at
any moment loses at most the round in flight and a resumed run gives the uninterrupted run's bytes:
round r depends on nothing but the state after round r - 1 and ``derive(seed, "round", r)``. Jobs that nobody has
answered yet belong to the state, with the tensors they were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lichen.core import tree as trees
from lichen.core.contracts.algorithm import Algorithm, Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import load_tree, save_tree
from lichen.core.timing.flight import Flight
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["Observer", "load_state", "run", "save_state"]

Observer = Callable[[Report], None]


def run(
    algorithm: Algorithm,
    engine: Engine,
    shared: Callable[[], Shared],
    *,
    rounds: int,
    seed: int,
    checkpoint: Path | None = None,
    once: Callable[[Callable[[], None]], object] = lambda do: do(),
    save: Callable[[Path, ServerState], object] | None = None,
    stop: Callable[[ServerState], bool] = lambda _: False,
    observers: Sequence[Observer] = (),
) -> ServerState:
    """Run rounds until ``rounds`` are finished, going on from ``checkpoint`` where it exists.

    Args:
        algorithm: The server's side of a round.
        engine: Where clients run.
        shared: Makes the tensors to start from; not called when a checkpoint exists.
        rounds: How many in all, those before the checkpoint included.
        seed: The run's seed.
        checkpoint: File of the server's state.
        once: Does a thing that is to be done once: of several ranks the first does it, and none goes on
            before it is done. A rank that trained ahead of the file would drop private state a resumed run needs.
        save: Writes the state to that file; by default :func:`save_state`.
        stop: Whether the rounds end here, before all are done; asked before each, and only of the state, so
            that a resumed run ends where the uninterrupted one does.
        observers: Called with each round's report before its state is on disk.

    Returns:
        The state after the last round.
    """
    if checkpoint is not None and checkpoint.exists():
        state = load_state(checkpoint)
    else:
        state = algorithm.init(shared())
    while state.round < rounds and not stop(state):
        state, report = algorithm.round(state, engine, derive(seed, "round", state.round))
        # Told first: a kill in between repeats the round and tells it again, and no round is left untold.
        for observe in observers:
            observe(report)
        if checkpoint is not None:
            once(partial(_save, save or save_state, checkpoint, state))
    for flight in state.in_flight:  # nobody listens any more; who goes on from the state submits them again
        if flight.number is not None:
            engine.cancel(flight.number)
    return replace(state, in_flight=tuple(replace(flight, number=None) for flight in state.in_flight))


def _save(save: Callable[[Path, ServerState], object], path: Path, state: ServerState) -> None:
    save(path, state)


def save_state(path: Path, state: ServerState) -> str:
    """Write the server's state atomically; of jobs in flight, a clock and answers that did not count there is
    nothing where there are none.

    Returns:
        The file's digest.
    """
    tree: Tree = {}
    header: dict[str, Any] = {"round": state.round, "best_round": state.best_round}
    parts = {
        "shared": state.shared.flat(),
        "optimizer": state.optimizer,
        "best": state.best.flat(),
        "links": state.downlink,
        "transforms": state.transforms,
    }
    for place, flight in enumerate(state.in_flight):
        parts[f"flight/{place}"] = flight.job.shared.flat()
    if state.rollback:
        parts["rollback"] = {"pairs": torch.tensor(sorted(state.rollback.items()), dtype=torch.int64)}
    for part, tensors in parts.items():
        tree = trees.join(f"{part}/", tensors, tree)
    tree["best_value"] = torch.tensor(state.best_value, dtype=torch.float64)
    if state.in_flight:
        header["in_flight"] = [_flight_header(flight) for flight in state.in_flight]
    if state.clock:
        header["clock"] = state.clock
    return save_tree(path, tree, header)


def load_state(path: Path) -> ServerState:
    """Undo :func:`save_state`.

    Raises:
        LichenError: if the file is missing, damaged or not a server state.
    """
    tree, header = load_tree(path)
    try:
        value = float(tree.pop("best_value"))
        shared, tree = trees.split(tree, "shared/")
        optimizer, tree = trees.split(tree, "optimizer/")
        best, tree = trees.split(tree, "best/")
        downlink, tree = trees.split(tree, "links/")
        transforms, tree = trees.split(tree, "transforms/")
        rollback, tree = trees.split(tree, "rollback/")
        return ServerState(
            round=int(header["round"]),
            shared=Shared.of_flat(shared),
            optimizer=optimizer,
            best=Shared.of_flat(best),
            best_round=int(header["best_round"]),
            best_value=value,
            downlink=downlink,
            transforms=transforms,
            in_flight=tuple(
                _flight(about, trees.split(tree, f"flight/{place}/")[0])
                for place, about in enumerate(header.get("in_flight", ()))
            ),
            clock=float(header.get("clock", 0.0)),
            rollback=dict(rollback["pairs"].tolist()) if rollback else {},
        )
    except KeyError as error:
        raise LichenError(f"is not a server state: {error} is missing", where=str(path)) from None


def _flight_header(flight: Flight) -> dict[str, Any]:
    """What JSON holds of a job in flight: it will be submitted again for those who are waited for, ``shared`` whole."""
    job = flight.job
    back = [(client, job.rollback[client]) for client in flight.waiting if client in job.rollback]
    return {
        **({"rollback": back} if back else {}),
        "work": job.work,
        "version": job.version,
        "clients": flight.waiting,
        "seed": job.seed,
        "base": job.base,
        "settings": dict(job.settings),
        "texts": job.texts,
        "snapshot": job.snapshot,
        "sent": flight.sent,
    }


def _flight(about: dict[str, Any], shared: Tree) -> Flight:
    job = Job(
        work=about["work"],
        shared=Shared.of_flat(shared),
        version=about["version"],
        clients=tuple(about["clients"]),
        seed=about["seed"],
        base=about["base"],
        settings=about["settings"],
        texts=tuple(about["texts"]),
        snapshot=about["snapshot"],
        rollback={int(client): int(before) for client, before in about.get("rollback", ())},
    )
    return Flight(job=job, waiting=job.clients, sent=float(about["sent"]))
