"""What a way of training at the clients declares of itself, and what it is made from.

The methods themselves: :mod:`lichen.clients.methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from lichen.declared import Need, Paper, Property

if TYPE_CHECKING:
    from lichen.clients.training.optimize import Schedule
    from lichen.clients.training.train import Train
    from lichen.core.contracts.client import ClientWork
    from lichen.core.contracts.model import CohortModel
    from lichen.core.contracts.server import Aggregator, ServerOptimizer
    from lichen.core.wire.shared import Shared

__all__ = ["DECIDES", "ClientMethod", "ClientSettings", "Works"]

DECIDES = frozenset(
    {
        Property.GRADIENTS,
        Property.PLAIN_TRAINING,
        Property.SERVER_STEP,
        Property.MEAN_OF_ONE_LAYOUT,
        Property.BOUNDED_SUM,
        Property.CODECS,
        Property.EPOCHS,
        Property.ACCUMULATION,
        Property.LAYER_TURNS,
        Property.PERSONAL_TENSORS,
        Property.PSEUDO_LABELS,
        Property.LATE_ANSWERS,
        Property.LOST_ANSWERS,
    }
)
"""Properties of a recipe that its client method may allow or not."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """What a recipe tells a client method, for one learning rate.

    Attributes:
        model: Runs C clients at once.
        start: The model's tensors before the first round.
        train: The recipe's local training by gradients, with its learning rate, clip and prox.
        evaluate: Validation of the model's own tensors.
        lr: The learning rate.
        clip: The gradient norm at most; None: never cut.
        prox: FedProx's μ.
        alpha: FedDyn's α.
        contrast: MOON's μ.
        temperature: MOON's τ.
        eps: How far a slope is measured.
        population: Candidates of a generation.
        directions: Directions of FedKSeed in all.
        seed: The recipe's.
        steps: Local steps of a round; None where epochs count them.
        rounds: Rounds in all.
        schedule: Learning rate over rounds.
        warmup: Steps or rounds of linear warm-up.
        fragments: Parts of the model that take turns in being sent.
        drop: Chance that a client's answer is lost.
        weighting: How the server weighs messages.
        clients: Clients of the roster.
    """

    model: CohortModel
    start: Shared
    train: Train
    evaluate: ClientWork
    lr: float
    clip: float | None
    prox: float
    alpha: float
    contrast: float
    temperature: float
    eps: float
    population: int
    directions: int
    seed: int
    steps: int | None
    rounds: int
    schedule: Schedule
    warmup: int
    fragments: int
    drop: float
    weighting: Literal["examples", "uniform"]
    clients: int

    @property
    def local_steps(self) -> int:
        """Local steps of a round, for methods that do not allow epochs."""
        assert self.steps is not None
        return self.steps

    @property
    def weigh_by(self) -> Literal["examples", "one"]:
        """What a client's weight counts."""
        return "one" if self.weighting == "uniform" else "examples"


@final
@dataclass(frozen=True, slots=True)
class Works:
    """A client's works: training, and validation where shared tensors are not the model's own."""

    train: ClientWork
    valid: ClientWork | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientMethod:
    """How a client trains.

    Attributes:
        name: The word in a recipe, under ``key``.
        summary: What it does, in one line.
        works: What a client does in a round.
        papers: Where it comes from.
        needs: What the rest of the recipe must allow.
        allows: Which of :data:`DECIDES` hold with it.
        reads: Keys of the section ``optimizer`` that say something to it, beside its learning rates, which every method
            reads; None: all that there are.
        key: The recipe's key that chooses it.
        base: What ``settings.train`` steps by.
        aggregator: The method's own aggregation; None: by the recipe's rule.
        server: The method's own server optimizer; None: the recipe's.
        initial: What the shared tensors begin as; None: the model's own.
        tensors: The model's tensors that shared ones stand for; None: themselves.
        asks_only: The model is asked for answers; it is not opened, and a finished run cannot be merged into it.
        agreed_start: Where all begin is never sent, so that clients and server must agree on it.
        grows_by_steps: A message is as long as the client takes steps.
    """

    name: str
    summary: str
    works: Callable[[ClientSettings], Works]
    papers: tuple[Paper, ...] = ()
    needs: tuple[Need, ...] = ()
    allows: frozenset[Property] = frozenset()
    reads: frozenset[str] | None = None
    key: str = "optimizer.name"
    base: Literal["adamw", "sgd"] = "adamw"
    aggregator: Callable[[ClientSettings], Aggregator] | None = None
    server: Callable[[], ServerOptimizer] | None = None
    initial: Callable[[ClientSettings], Shared] | None = None
    tensors: Callable[[ClientSettings, Shared], Shared] | None = None
    asks_only: bool = False
    agreed_start: bool = False
    grows_by_steps: bool = False
