"""The parts that keep a recipe's promise of privacy: paid rounds, secret numbers, and clients that have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lichen.algorithms.average import Average
from lichen.algorithms.private_average import PrivateAverage
from lichen.core.secret.budget import Budget, begun_with
from lichen.core.secret.randomness import SecretRandomness, secret_key
from lichen.engines.ranks import Ranks
from lichen.recipes.assemble.sides.clients import ClientSide, Secret
from lichen.recipes.assemble.sides.guarantee import Guarantee, guarantee
from lichen.recipes.assemble.sides.row_privacy import PaidRounds, hides_rows
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe

__all__ = ["BUDGET", "KEY", "PrivateRounds", "for_timing", "private_rounds", "with_secret"]

KEY, BUDGET = "privacy.key", "budget.jsonl"
"""In a run's ``state/``: the secret key, and what was spent."""


@final
@dataclass(frozen=True, slots=True)
class PrivateRounds:
    """The rounds of a run under privacy.

    Attributes:
        ranks: Who works on them together.
        guarantee: What they promise.
        randomness: Their secret numbers.
        budget: Pays for them; the first rank's alone.
    """

    ranks: Ranks
    guarantee: Guarantee
    randomness: SecretRandomness
    budget: Budget | None

    def around(self, average: Average) -> PrivateAverage | PaidRounds:
        """Averaging whose rounds are paid for."""
        if self.guarantee.unit == "row":
            return PaidRounds(average, budget=_Rank(self.budget))
        return PrivateAverage(
            inner=average,
            sigma=self.guarantee.sigma,
            rate=self.guarantee.rate,
            randomness=self.randomness,
            budget=_Rank(self.budget),
            once=self.ranks.ask_first,
        )

    def ended(self, finished: int) -> bool:
        """Whether the next round cannot be paid for."""
        return bool(self.ranks.ask_first(lambda: not _Rank(self.budget).first.pays_for(finished)))


@final
@dataclass(frozen=True, slots=True)
class _Rank:
    """The first rank's budget; on others nothing asks for it."""

    budget: Budget | None

    @property
    def first(self) -> Budget:
        assert self.budget is not None, "the first rank alone pays"
        return self.budget

    def charge(self, round_: int) -> int:
        return self.first.charge(round_)

    def close(self, round_: int, attempt: int) -> None:
        self.first.close(round_, attempt)


def private_rounds(server: ServerSide, run: Path, ranks: Ranks) -> PrivateRounds | None:
    """The rounds of a run whose recipe has a section ``privacy``; None where it has none.

    Args:
        server: The server's side.
        run: The run's folder, which all ranks see.
        ranks: Who works on it together.

    Raises:
        LichenError: as :func:`guarantee`, or if key or budget in the folder are damaged.
    """
    recipe, state = server.recipe, run / "state"
    if recipe.privacy is None:
        return None
    seed = recipe.privacy.seed
    begun = ranks.ask_first(lambda: begun_with(state / BUDGET))
    found = guarantee(server, sigma=_sigma_of(recipe, begun))
    if seed is None:
        ranks.ask_first(lambda: secret_key(state / KEY) and None)
        randomness = secret_key(state / KEY)
    else:
        randomness = SecretRandomness.of_seed(seed)
    budget = None
    if ranks.first:
        terms = {**_terms(recipe, found), "key": randomness.mark}
        budget = Budget(state / BUDGET, terms=terms, limit=found.limit)
    return PrivateRounds(ranks, found, randomness, budget)


def _terms(recipe: Recipe, found: Guarantee) -> dict[str, Any]:
    assert recipe.privacy is not None
    return {
        "unit": recipe.privacy.unit,
        "clip": recipe.privacy.clip,
        "sigma": found.sigma,
        "rate": found.rate,
        "delta": found.delta,
        "epsilon": recipe.privacy.epsilon,
        "seeded": found.seeded,
        "steps": found.steps,
    }


def _sigma_of(recipe: Recipe, begun: Mapping[str, Any] | None) -> float | None:
    """The noise that a run was begun with, where the recipe leaves it to the accountant."""
    assert recipe.privacy is not None
    return None if begun is None or recipe.privacy.sigma is not None else float(begun["sigma"])


def with_secret(server: ServerSide, clients: ClientSide, run: Path) -> ClientSide:
    """The clients with their key and their noise, where noise hides single rows; else as they are.

    Args:
        server: The server's side.
        clients: The clients' side.
        run: The run's folder.

    Raises:
        LichenError: as :func:`guarantee`, or if the key or the budget are damaged.
    """
    recipe = server.recipe
    if recipe.privacy is None or not hides_rows(recipe):
        return clients
    state, seed = run / "state", recipe.privacy.seed
    secret = secret_key(state / KEY) if seed is None else SecretRandomness.of_seed(seed)
    found = guarantee(server, sigma=_sigma_of(recipe, begun_with(state / BUDGET)))
    return replace(clients, secret=Secret(secret, sigma=found.sigma))


def for_timing(recipe: Recipe, clients: ClientSide) -> ClientSide:
    """The clients with noise from a seed, where noise hides single rows: what they learn is thrown away."""
    secret = Secret(SecretRandomness.of_seed(0), sigma=1.0)
    return replace(clients, secret=secret) if hides_rows(recipe) else clients
