"""The clients' side of an experiment: their rows, and what they declare of them.

Legend: M rows of all clients, N clients, P parts, K classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import final

import numpy as np
from torch import Tensor

from lichen.clients.attack.rows import RowAttack
from lichen.core.contracts.client import Source
from lichen.core.roster import Member, Roster, declared_name
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.tree import Tree
from lichen.data.batches.augment import Views
from lichen.data.batches.scarce_labels import ScarceLabels
from lichen.data.batches.shards import ArrayShard, Shard, pooled

__all__ = ["TOKENS", "Auxiliary", "ClientSide", "declared", "group_of", "recounted"]

TOKENS = "tokens"
"""The group of clients whose rows are texts; others' tells the shape of a row."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Auxiliary:
    """What clients learn from beside their labels and a teacher's public answers.

    Attributes:
        rows: All rows of the clients, those without a label among them, one shard a client; none: labelled ones alone.
        unlabelled: How many of each client's rows have none.
        source: These rows as SemiFL's clients draw them; None: they are no such clients.
        views: Weak and strong views of the unlabelled ones.
        answers: ``answers.*`` of a teacher to them, which never leave.
        judge: The clients' rows to judge a teacher by; None: it is taken at its word.
        teacher_label_M: The class it names for each of those.
    """

    rows: tuple[Shard, ...] = ()
    unlabelled: tuple[int, ...] = ()
    source: ScarceLabels | None = None
    views: Views | None = None
    answers: Tree = field(default_factory=dict)
    judge: Source | None = None
    teacher_label_M: Tensor | None = None


@final
@dataclass(frozen=True, slots=True)
class Secret:
    """What hides clients' rows.

    Attributes:
        randomness: Their key.
        sigma: Their noise, in units of the clip.
    """

    randomness: SecretRandomness
    _: KW_ONLY
    sigma: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSide:
    """What clients hold: in a simulation all of them, on a node its own.

    Attributes:
        train: One shard a client.
        valid: One shard a client, to choose learning rate and round by.
        test: One shard a client, only scored.
        auxiliary: What they learn from beside.
        poison: What becomes of liars' training rows; None: they stay what they are.
        secret: What hides their rows in training; None: nothing does, or nobody trains.
        canaries: Rows beside their own that the federation trains them on, one shard a client; none: it has no such.
        pairs: Secret pairs of owners, which the federation trains them on in steps of their own, one shard a client.
        state: Folder for files of their own, such as values that nobody else knows; None: they keep none.
        absent: Clients without a row here, that have declared some and never take part.
    """

    train: tuple[Shard, ...]
    valid: tuple[Shard, ...]
    test: tuple[Shard, ...]
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    poison: RowAttack | None = None
    secret: Secret | None = None
    canaries: tuple[Shard, ...] = ()
    pairs: tuple[Shard, ...] = ()
    state: Path | None = None
    absent: frozenset[int] = frozenset()

    @property
    def planted(self) -> tuple[Shard, ...]:
        """What the federation trains on: each client's own rows, and its canaries after them."""
        if not self.canaries:
            return self.train
        both = zip(self.train, self.canaries, strict=True)
        return tuple(pooled((own, more)) if more.size else own for own, more in both)


def group_of(shape: Sequence[int] | None) -> str:
    """The group of clients whose rows are numbers of this shape; None: texts.

    >>> group_of((1, 8, 8)), group_of(None)
    ('1 8 8', 'tokens')
    """
    return TOKENS if shape is None else " ".join(map(str, shape))


def declared(
    clients: ClientSide,
    names: Sequence[str] = (),
    *,
    classes: Sequence[str] = (),
    capacity_N: Sequence[Hashable] = (),
) -> Roster:
    """What clients declare of themselves, each by its own rows.

    Args:
        clients: Their rows.
        names: Their own names; none: their numbers.
        classes: Labels whose rows they may tell, in the order of the model's logits; none: they tell none.
        capacity_N: What each can train; none: all train everything.
    """
    members = []
    for client, shard in enumerate(clients.train):
        labels = _labels(clients, client, classes)
        member = Member(
            name=declared_name(names[client]) if names else f"client-{client:03d}",
            rows=_rows(clients, client),
            labels=labels,
            capacity=capacity_N[client] if capacity_N else None,
            group=group_of(shard.x.shape[1:] if isinstance(shard, ArrayShard) else None),
        )
        members.append(member)
    return Roster(tuple(members))


def recounted(roster: Roster, clients: ClientSide) -> Roster:
    """The same clients with other rows, such as those that were written for them."""
    return Roster(
        tuple(one if c in clients.absent else replace(one, rows=_rows(clients, c)) for c, one in enumerate(roster))
    )


def _rows(clients: ClientSide, client: int) -> dict[str, int]:
    return {
        "train": clients.train[client].size,
        "valid": clients.valid[client].size,
        "test": clients.test[client].size,
    }


def _labels(clients: ClientSide, client: int, classes: Sequence[str]) -> dict[str, float]:
    """Training rows of each class that is among a client's rows at all."""
    counts_PK = [
        np.bincount(labels[labels >= 0], minlength=len(classes))
        for part in (clients.train, clients.valid, clients.test)
        if classes
        for labels in (np.asarray(part[client].labels),)
    ]
    return {
        declared_name(name): float(counts_PK[0][k])
        for k, name in enumerate(classes)
        if any(count_K[k] for count_K in counts_PK)
    }
