"""What the clients of task ``oneshot`` can be asked at a node: statistics, scores of a head, and heads of their own.

Rows become frozen features when their client is first asked, so that a node encodes the rows of its own clients alone.

Legend: C clients, B rows, d features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from lichen.clients.distillation.teacher_labels import NoBatches
from lichen.clients.statistics.closed_head import HeadConfusion, OwnHead
from lichen.clients.statistics.declare import Declare
from lichen.clients.statistics.sufficient import Statistics
from lichen.core.contracts.client import ClientTask, ClientWork, Dialogue, Source
from lichen.core.contracts.model import Batch
from lichen.core.message import Message
from lichen.core.roster import PARTS, Member, Roster, declared_name
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.data.sources.record import Record
from lichen.recipes.assemble.features import encoder_of, featurizer
from lichen.recipes.assemble.open import fetch_named
from lichen.recipes.assemble.sides.clients import TOKENS
from lichen.recipes.assemble.sides.masks import masked
from lichen.recipes.assemble.sides.summed_scores import SUMMED_TEST, masked_test, sums_scores
from lichen.recipes.rows.prepare import ClientData, classes_of, gather_all
from lichen.recipes.rows.public import labelled_of, split_public
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.personal_heads import personal_heads
from lichen.server.lda import Lda
from lichen.server.ridge import Ridge

__all__ = [
    "TESTS",
    "feature_source",
    "hidden",
    "open_statistics",
    "roster_of",
    "solver_of",
    "statistics_node",
    "statistics_works",
]

TESTS = {"test": SUMMED_TEST, "alone.test": f"alone.{SUMMED_TEST}"}
"""The works that score heads on test rows, and those in their place where the server learns sums alone."""


def solver_of(recipe: Recipe) -> Lda | Ridge:
    """How the recipe solves for the head."""
    return Lda() if recipe.model.head == "lda" else Ridge(lam=recipe.ridge)


def roster_of(clients_data: Sequence[ClientData]) -> Roster:
    """What clients declare: their names and how many rows they have."""
    rows = {one.name: {part: len(getattr(one, part)) for part in PARTS} for one in clients_data}
    return Roster(tuple(Member(name=declared_name(name), rows=mine, group=TOKENS) for name, mine in rows.items()))


def _features(batch: Batch) -> Tensor:
    return batch["x_CBF"]


def feature_source(shards: Mapping[int, ArrayShard] | Sequence[ArrayShard]) -> EvalSource:
    """Batches of features, each row once."""
    return EvalSource(shards, batch_size=256, pad=0)


def statistics_works(recipe: Recipe, roster: Roster, *, classes: int, width: int) -> dict[str, ClientWork | Dialogue]:
    """All that clients of this recipe can be asked to do, by name; made without a row.

    Args:
        recipe: Says how a head is solved for.
        roster: The clients.
        classes: K.
        width: d.
    """
    statistics, rule = Statistics(_features, classes=classes, width=width), solver_of(recipe)

    def solve(message: Message) -> Tree:
        return rule.close(rule.add(rule.zero(), message), Shared())[0].trainable

    tests = {work: HeadConfusion(_features, classes=classes, personal=work == "alone.test") for work in TESTS}
    scoring: dict[str, ClientWork | Dialogue] = (
        {TESTS[work]: masked_test(recipe, test, len(roster)) for work, test in tests.items()}
        if sums_scores(recipe)
        else {**tests}
    )
    return {
        "roster": Declare(roster),
        "statistics": hidden(recipe, statistics, len(roster)),
        "alone": OwnHead(statistics, solve),
        **scoring,
        **personal_heads(recipe, statistics, _features, classes),
    }


def hidden(recipe: Recipe, statistics: Statistics, clients: int) -> ClientWork | Dialogue:
    """The statistics of so many clients, under masks where the recipe has them."""
    return statistics if recipe.masked is None else masked(recipe, statistics, solver_of(recipe), clients)


@final
@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Each row of a client once, as frozen features, made when it is first asked for.

    Args:
        rows: By client.
        make: Encodes them.
    """

    rows: Mapping[int, Sequence[Record]]
    make: Callable[[Sequence[Record]], ArrayShard]
    made: dict[int, ArrayShard] = field(default_factory=dict, init=False)

    def shape(self, client: int) -> Hashable:
        """All rows are equally wide."""
        return ()

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The features of these clients."""
        for client in clients:
            if client not in self.made:
                self.made[client] = self.make(self.rows.get(client, ()))
        return feature_source(self.made).batches(clients, seed)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsNode:
    """A node of the task, with the rows of some clients.

    Attributes:
        recipe: The recipe.
        roster: Its clients.
        classes: K.
        width: d.
        base: Digest of the encoder.
        train: The clients' training rows.
        valid: Their validation rows.
        test: Their test rows.
    """

    recipe: Recipe
    roster: Roster
    classes: int
    width: int
    base: str
    train: Source
    valid: Source
    test: Source

    @property
    def start(self) -> Shared:
        """Clients begin from nothing."""
        return Shared()

    def client_tasks(self) -> dict[str, ClientTask]:
        """All that its clients can be asked to do."""
        sources: Mapping[str, Source] = {
            **{"roster": NoBatches(), "statistics": self.train, "alone": self.train},
            **dict.fromkeys((*TESTS, *TESTS.values()), self.test),
            **{"personal": self.train, "personal.valid": self.valid, "personal.test": self.test},
        }
        works = statistics_works(self.recipe, self.roster, classes=self.classes, width=self.width)
        return {name: ClientTask(work=work, source=sources[name]) for name, work in works.items()}


def statistics_node(
    recipe: Recipe, roster: Roster, classes: Sequence[str], clients_data: Mapping[int, ClientData]
) -> StatisticsNode:
    """A node with the rows of these clients, by their number in the roster; the encoder is loaded."""
    features, tokenizer = encoder_of(recipe, str(recipe.model.name), exact=True)
    make = featurizer(recipe, features, tokenizer, classes)
    train, valid, test = (
        FeatureRows({number: getattr(one, part) for number, one in clients_data.items()}, make) for part in PARTS
    )
    return StatisticsNode(
        recipe=recipe,
        roster=roster,
        classes=len(classes),
        width=features.width,
        base=features.base,
        train=train,
        valid=valid,
        test=test,
    )


def open_statistics(recipe: Recipe) -> StatisticsNode:
    """A node that opens the recipe's data, with everybody's rows.

    Raises:
        LichenError: whatever does not fit, by its key.
    """
    fetch_named(recipe, lambda _: None)
    gathered = gather_all(recipe)
    clients_data = labelled_of(split_public(recipe, gathered.records).clients_data)
    classes = classes_of(recipe, gathered.records)
    return statistics_node(recipe, roster_of(clients_data), classes, dict(enumerate(clients_data)))
