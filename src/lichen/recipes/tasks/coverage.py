"""Counts how much of the clients' rows a column trains on.

A default run of ten rounds of four steps of four rows sees 160 rows of a client, however many it has. A client that
takes m of its n rows in each of t rounds, drawn anew every time, has seen 1 - (1 - m/n)^t of them on average.

Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from lichen.present.trace import Event
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.sides.personal import stages_of
from lichen.recipes.assemble.sides.server import ServerSide, participants
from lichen.recipes.assemble.workload import alone_rounds, pooled_experiment, unbudgeted

__all__ = ["coverage_of", "planned", "trained"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What a column trains on.

    Attributes:
        rows: Rows trained on, all clients and rounds together.
        rows_there: Training rows there are.
        passes: ``rows / rows_there``.
        share_seen: Share of the training rows that are trained on at least once, on average over draws.
    """

    rows: float
    rows_there: int
    passes: float
    share_seen: float


def coverage_of(server: ServerSide, rounds: Iterable[Sequence[int]], *, often: float = 0.0) -> Coverage:
    """What clients see of their rows.

    Args:
        server: What clients have declared, and the recipe's steps or epochs.
        rounds: Who trains in each round.
        often: How often each client trains beside that, where it is not told who did.
    """
    fed, rows_N = server.recipe.federation, server.roster.rows("train")
    often_N = [often] * len(rows_N)
    for clients in rounds:
        for client in clients:
            often_N[client] += 1
    total = distinct = 0.0
    for rows, often in zip(rows_N, often_N, strict=True):
        if fed.local_epochs is not None:
            once = fed.local_epochs * rows
        else:
            once = fed.fixed_steps * min(fed.batch_size * fed.gradient_accumulation_steps, rows)
        total += once * often
        if rows:
            distinct += rows * (1 - (1 - min(once / rows, 1.0)) ** often)
    whole = sum(rows_N)
    share = min(1.0, distinct / max(whole, 1))
    return Coverage(rows=total, rows_there=whole, passes=total / max(whole, 1), share_seen=share)


def planned(experiment: Experiment, invited: Sequence[Sequence[int]], columns: Iterable[str]) -> dict[str, Coverage]:
    """What the trained columns of a recipe will see, at one learning rate each.

    Args:
        experiment: The recipe's.
        invited: The clients of every round of the federation.
        columns: Those that are run.
    """
    server = experiment.server
    free = unbudgeted(server)
    rounds = {
        "federated": (server, invited),
        "without": (server, invited),
        "alone": (server, [range(len(server.roster))] * alone_rounds(server)),
        "alone_best": (server, [free.training(r) for r in range(free.rounds)]),
        "pooled": (pooled_experiment(experiment).server, [(0,)] * server.recipe.federation.rounds),
    }
    if stages_of(server.recipe):
        rounds["personal"] = (finetuned(server), [range(len(server.roster))])
    return {name: coverage_of(*rounds[name]) for name in ("federated", *columns) if name in rounds}


def finetuned(server: ServerSide) -> ServerSide:
    """The server's side, a client's round of which is all of its fine-tuning; itself where there is none."""
    stages, fed = stages_of(server.recipe), server.recipe.federation
    if not stages:
        return server
    fed = fed.model_copy(update={"local_steps": sum(stages.values()), "local_epochs": None})
    return replace(server, recipe=server.recipe.model_copy(update={"federation": fed}))


def trained(
    side: Callable[[str], ServerSide], columns: Mapping[str, Column], events: Sequence[Event]
) -> dict[str, dict[str, Any]]:
    """What the trained columns of a finished run have seen, as its summary holds it.

    Args:
        side: The server's side that a column was learned with, by its name.
        columns: All columns; those without rounds in the trace are left out.
        events: The run's trace.
    """
    out = {}
    for name, column in columns.items():
        grid = None if column.lr is None else lr_name(column.lr)
        rounds = {e.report.round: e for e in events if e.column == name and e.grid == grid}
        if not rounds:
            continue
        last = rounds[max(rounds)]
        own, every = side(name), [e.report.clients for e in rounds.values()]
        if name == "personal":  # its stages go on from one another, and are as long as their last number of steps
            own, every = finetuned(own), every[-1:]
        # Under privacy no round tells who came.
        private = own.recipe.noised
        secret = private is not None and private.unit == "client" and name == "federated"
        often = len(rounds) * participants(own) / len(own.roster) if secret else 0.0
        out[name] = {
            "rounds": last.report.round,
            "of": last.total_rounds,
            "kept": column.best_round if column.best_round > 0 else None,
            **asdict(coverage_of(own, every, often=often)),
        }
    return out
