"""What a recipe promises to each row of its clients, and the parts that keep it: DP-SGD at the clients.

A client's steps are accounted for by its own sampling rate, ``batch_size`` over its number of rows, which is taken as
known. What is said holds for every client: the promise is that of the largest rate, for all steps of all rounds that
were charged, whether or not a client was asked in each. Who is asked, and what the server makes of the changes, is
public or follows from them.

Legend: N clients of the roster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

from lichen.algorithms.average import Average
from lichen.algorithms.private_average import Charges
from lichen.clients.privacy.private_steps import PrivateSteps
from lichen.clients.training.train import Train
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.roster import Roster
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.wire.shared import Shared
from lichen.data.batches.poisson_rows import PoissonRows
from lichen.data.batches.shards import TrainSource
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe

__all__ = ["PaidRounds", "hides_rows", "noise_of", "private_source", "private_steps", "row_bounds"]


def hides_rows(recipe: Recipe) -> bool:
    """Whether noise hides single rows."""
    return recipe.noised is not None and recipe.noised.unit == "row"


def rates_N(server: ServerSide) -> tuple[float, ...]:
    """The chance of each of a client's rows to be in a step, of all clients."""
    batch = server.recipe.federation.batch_size
    return tuple(min(1.0, batch / rows) if rows else 1.0 for rows in server.roster.rows("train"))


def row_bounds(roster: Roster) -> tuple[int, int]:
    """Training rows of the client that has fewest, and of the one that has most; of clients with rows."""
    rows = [rows for rows in roster.rows("train") if rows]
    return min(rows, default=0), max(rows, default=0)


def private_steps(server: ServerSide, train: Train, secret: SecretRandomness | None, sigma: float) -> PrivateSteps:
    """The recipe's training with every row hidden.

    Args:
        server: The server's side.
        train: The training without privacy.
        secret: The clients' key; None where nobody trains.
        sigma: The noise, in units of the clip.
    """
    config, rows_N = server.recipe.noised, server.roster.rows("train")
    assert config is not None
    means = tuple(rate * rows for rate, rows in zip(rates_N(server), rows_N, strict=True))
    return PrivateSteps(train, clip=config.bound, sigma=sigma, mean_rows_N=means, randomness=secret)


def private_source(server: ServerSide, source: TrainSource, secret: SecretRandomness) -> PoissonRows:
    """The recipe's training rows as Poisson samples, in micro-batches of its batch size."""
    batch = server.recipe.federation.batch_size
    return PoissonRows(source, rate_N=rates_N(server), randomness=secret, batch_rows=batch)


@final
@dataclass(frozen=True, slots=True)
class PaidRounds:
    """Averaging whose every round is charged before its jobs go out; an algorithm.

    A client's noise follows from its key, the step and the sum it hides, so a round that is done again after a kill
    gives the same bytes, and pays again only once it was whole.

    Args:
        inner: The averaging; it validates nothing.
        budget: Pays for rounds.
        once: Does a thing that is to be done once: of several ranks the first does it, and all get what comes of it.
    """

    inner: Average
    _: KW_ONLY
    budget: Charges
    once: Callable[[Callable[[], Any]], Any] = lambda do: do()

    def __post_init__(self) -> None:
        if self.inner.valid is not None:
            raise LichenError("what clients' rows judge is a release", where="privacy", fix="set valid=None")

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round."""
        return self.inner.init(shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round, charged first.

        Raises:
            LichenError: if the budget does not pay for it; nothing was sent then.
        """
        attempt = int(self.once(lambda: self.budget.charge(state.round)))
        after, report = self.inner.round(state, engine, seed)
        self.once(lambda: self.budget.close(state.round, attempt))
        return after, replace(report, tokens=None)


def noise_of(server: ServerSide, sigma: float) -> float:
    """How large the noise of one step's mean gradient is expected to be, at the client with the fewest rows a step."""
    config, rows_N = server.recipe.noised, server.roster.rows("train")
    assert config is not None
    ends = server.recipe.aggregation.freezes[0] if server.recipe.aggregation.freezes else ()
    numbers = sum(x.numel() for name, x in server.start.trainable.items() if not name.endswith(ends))
    fewest = min((rate * rows for rate, rows in zip(rates_N(server), rows_N, strict=True) if rows), default=1.0)
    return sigma * config.bound * math.sqrt(numbers) / fewest
