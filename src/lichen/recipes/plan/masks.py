"""Tells what masks cost before they are put on: bytes and seconds of each stage, and of the server until a sum is open.

Bytes are exact: messages of all four stages have a length that is declared. Seconds are measured in parts
(:mod:`lichen.recipes.plan.mask_pace`). What is under masks is a talk among clients, of which nothing can be timed
alone; so a recipe is profiled without them, and what they cost comes on top.

Legend: n clients of a round, k neighbours of each, N numbers of a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from lichen.clients.masking.masked import Masked
from lichen.core.message import Job, sizes
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import algorithm_of, initial_shared, validators_of, works_of
from lichen.recipes.assemble.sides.masks import without_masks
from lichen.recipes.assemble.sides.server import participants
from lichen.recipes.assemble.sides.stated_masks import masks_of
from lichen.recipes.plan.mask_pace import pace_of
from lichen.recipes.plan.traffic import TrafficEstimate, first_order
from lichen.recipes.plan.workload import evaluations, marks
from lichen.recipes.schema.recipe import Recipe

__all__ = ["MaskCost", "mask_cost", "masked_rounds"]

STAGES = ("keys", "shares", "masked sum", "opening")

DROPOUT = "masks are reckoned for rounds that are opened at once; with privacy.dropout some are begun again"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One stage of one client; training, which lies in the third, is not in its seconds."""

    name: str
    up: int
    down: int
    seconds: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MaskCost:
    """What masks over one kind of message cost.

    Attributes:
        clients: n.
        neighbours: k.
        numbers: N.
        stages: Of one client.
        gone: Clients that have fallen silent before the masked sum, as many as may.
        server_seconds: Until the sum is open, with so many gone.
        server_least: The same with nobody gone.
    """

    clients: int
    neighbours: int
    numbers: int
    stages: tuple[_Stage, ...]
    gone: int
    server_seconds: float
    server_least: float

    @property
    def up(self) -> int:
        """Bytes from one client, all stages together."""
        return sum(stage.up for stage in self.stages)

    @property
    def down(self) -> int:
        """Bytes to it, beside the job."""
        return sum(stage.down for stage in self.stages)

    @property
    def seconds(self) -> float:
        """One client's, all stages together."""
        return sum(stage.seconds for stage in self.stages)

    def as_dict(self, recipe: Recipe, *, clear: int, masked: int) -> dict[str, Any]:
        """What a plan holds of it.

        Args:
            recipe: The recipe.
            clear: Bytes up of a round without masks.
            masked: And with them.
        """
        stated = masks_of(recipe, self.clients, signed=False, alone=False) or {}
        promise = {name: stated[name] for name in ("statement", "threshold", "least", "not_promised")}
        return {**asdict(self), **promise, "factor": masked / max(1, clear)}


def mask_cost(recipe: Recipe, work: Masked, job: Job, clients: int) -> MaskCost:
    """Count and measure.

    Args:
        recipe: Says which share of the clients may fall silent.
        work: What is under masks.
        job: One of its jobs.
        clients: Expected in a round.

    Raises:
        LichenError: if the message has no fixed form.
    """
    assert recipe.masked is not None
    terms, numbers, gone = work.terms, work.form(job).numbers, int(recipe.masked.dropped * clients)
    pace = pace_of(terms.k, terms.threshold, numbers)
    stages = zip(STAGES, work.sizes(job), pace.stages(), strict=True)
    return MaskCost(
        clients=clients,
        neighbours=terms.k,
        numbers=numbers,
        stages=tuple(_Stage(name=name, up=up, down=down, seconds=seconds) for name, (up, down), seconds in stages),
        gone=gone,
        server_seconds=pace.server(clients, gone),
        server_least=pace.server(clients, 0),
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedRounds:
    """A federated column under masks.

    Attributes:
        facts: What a plan holds of them; see :meth:`MaskCost.as_dict`.
        sent: The column's bytes.
        seconds: Of all clients' stages, one after another.
        server_seconds: Of all rounds, if nobody falls silent.
        vector_bytes: Of the masked vectors of a round, which wait for one another, and of the table they are put into.
        notes: How far this reaches.
    """

    facts: dict[str, Any]
    sent: TrafficEstimate
    seconds: float
    server_seconds: float
    vector_bytes: int
    notes: tuple[str, ...]


def masked_rounds(
    experiment: Experiment, invited: Sequence[Sequence[int]], sent: TrafficEstimate, *, score_up: int
) -> MaskedRounds | None:
    """Put masks over a federation in the clear; None where the recipe has none.

    Args:
        experiment: The recipe's.
        invited: The clients of every round.
        sent: Its bytes without masks.
        score_up: Bytes of one client's validation without masks.

    Raises:
        LichenError: if a message has no fixed form.
    """
    recipe, server = experiment.recipe, experiment.server
    if recipe.masked is None:
        return None
    rounds, lr = recipe.federation.rounds, recipe.optimizer.lr[0]
    algorithm, works, shared = algorithm_of(server, lr, rounds), works_of(server), initial_shared(server, lr)

    def cost(name: str | None, clients: int) -> MaskCost | None:
        work = works.get(str(name))
        job = Job(work=str(name), shared=shared, version=0, clients=(0,), seed=0, base=server.model.base)
        return mask_cost(recipe, work, job, clients) if isinstance(work, Masked) and clients else None

    train, (trained, seen) = cost(algorithm.work, participants(server)), marks(experiment, rounds)
    assert train is not None
    trainings, rate_trainings = sum(map(len, invited)), sum(len(w) * t for w, t in zip(invited, trained, strict=True))
    up, down = trainings * (train.up - sent.client_up), trainings * train.down
    seconds, server_seconds = rate_trainings * train.seconds, sum(trained) * train.server_least
    valid_up = valid_down = 0
    if (valid := cost(algorithm.valid, sent.validators)) is not None:
        scores = sent.validators * sum(map(bool, seen))
        valid_up, valid_down = scores * (valid.up - score_up), scores * valid.down
        seconds += sent.validators * sum(seen) * valid.seconds
        server_seconds += sum(seen) * valid.server_least
    if judged := evaluations(recipe, invited, [1] * len(invited)):
        # Clients value themselves: nobody asks for the loss after a round, and gradients come as a sum.
        clear = replace(server, recipe=without_masks(recipe))
        open_up, open_down = first_order(clear, shared, 0)
        own_up, own_down = first_order(server, shared, max(map(len, invited)))
        if recipe.value is not None and recipe.value.rows == "valid":
            request = Job(
                work="valid", shared=shared.for_model, version=0, clients=(0,), seed=0, base=server.model.base
            )
            everyone = len(validators_of(server))
            open_up, open_down = open_up + everyone * score_up, open_down + everyone * sizes(request)
        valid_up, valid_down = valid_up + judged * (own_up - open_up), valid_down + judged * (own_down - open_down)
    masked = replace(
        sent,
        client_up=train.up,
        client_down=sent.client_down + train.down,
        round_up=round((sent.up + up + valid_up) / rounds),
        round_down=round((sent.down + down + valid_down) / rounds),
        up=sent.up + up + valid_up,
        down=sent.down + down + valid_down,
        valid_up=sent.valid_up + valid_up,
        valid_down=sent.valid_down + valid_down,
    )
    return MaskedRounds(
        facts=train.as_dict(recipe, clear=sent.up, masked=masked.up),
        sent=masked,
        seconds=seconds,
        server_seconds=server_seconds,
        vector_bytes=2 * 8 * train.numbers * max(map(len, invited)),
        notes=(DROPOUT,) if any(recipe.masked.dropout or ()) else (),
    )
