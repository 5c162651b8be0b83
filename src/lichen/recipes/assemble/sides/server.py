"""The server's side of an experiment: model, start and roster, and nobody's rows.

Legend: N clients of the roster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from lichen.clients.splitting.split_parts import SplitParts
from lichen.core.contracts.model import CohortModel
from lichen.core.roster import Roster
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.augment import Views
from lichen.data.batches.shards import Shard
from lichen.recipes.schema.recipe import Recipe
from lichen.server.lowrank.submodel import Capacity

__all__ = ["ServerSide", "at_work", "capacity_from", "participants", "rows_per_round", "steps_per_round"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSide:
    """What a server works with, and tells its clients.

    Attributes:
        recipe: The recipe.
        model: The cohort model.
        start: The shared tensors before the first round.
        roster: The clients, as they have declared themselves.
        classes: The labels in the order of the model's logits; none for a language model.
        pad: Padding token of text shards.
        public: Texts a teacher has answered, learned from beside the clients' own rows.
        labelled: Public rows with labels that the server itself trains on between rounds; None: it does not.
        views: How it sees them.
        repair: Public safe pairs that it tunes on after the rounds; None: it does not.
        capacity: What each client can train; None where all train everything.
        split: The pieces of a split model; None where each client holds the whole.
        align: Gives an emulator's middle a new patch between rounds; None: it stays as it is.
    """

    recipe: Recipe
    model: CohortModel
    start: Shared
    roster: Roster
    classes: tuple[str, ...] = ()
    pad: int = 0
    public: Shard | None = None
    labelled: Shard | None = None
    views: Views | None = None
    repair: Shard | None = None
    capacity: Capacity | None = None
    split: SplitParts | None = None
    align: Callable[[Shared, int], Tree] | None = None


def capacity_from(roster: Roster, *, scaling: float) -> Capacity | None:
    """What clients have declared that they can train, a rank and a number of blocks each; None where nobody has.

    Args:
        roster: The clients.
        scaling: alpha / r of the recipe's adapter.
    """
    pairs = [m.capacity for m in roster if isinstance(m.capacity, tuple) and len(m.capacity) == 2]
    if len(pairs) < len(roster):
        return None
    ranks, lasts = zip(*pairs, strict=True)
    return Capacity(ranks, last_N=lasts, scaling=scaling)


def participants(server: ServerSide) -> int:
    """Clients whose answers make a round."""
    fed, everyone = server.recipe.federation, len(server.roster)
    if fed.schedule.kind == "buffered":
        return min(fed.schedule.arrivals, at_work(server))
    return min(fed.clients_per_round or everyone, everyone)


def at_work(server: ServerSide) -> int:
    """Clients at work at once."""
    fed, everyone = server.recipe.federation, len(server.roster)
    if fed.schedule.kind == "buffered":
        return min(fed.schedule.concurrency or everyone, everyone)
    return participants(server)


def steps_per_round(server: ServerSide) -> float:
    """Local steps of a client in a round; with epochs, on average over clients."""
    fed, rows_N = server.recipe.federation, server.roster.rows("train")
    if fed.local_epochs is None:
        return fed.fixed_steps
    rows = fed.batch_size * fed.gradient_accumulation_steps
    return fed.local_epochs * sum(-(-n // rows) for n in rows_N) / len(rows_N)


def rows_per_round(server: ServerSide) -> float:
    """Rows a client trains on in a round; with epochs, on average over clients."""
    fed, rows_N = server.recipe.federation, server.roster.rows("train")
    if fed.local_epochs is None:
        return fed.fixed_steps * fed.batch_size * fed.gradient_accumulation_steps
    return fed.local_epochs * sum(rows_N) / len(rows_N)
