"""What a recipe's ``privacy`` section costs and promises, and the parts that keep it.

Legend: N clients of the roster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, final

from lichen.algorithms.average import Average
from lichen.algorithms.private_average import PrivateAverage
from lichen.core.errors import LichenError
from lichen.core.secret.budget import Budget, begun_with
from lichen.core.secret.randomness import SecretRandomness, secret_key
from lichen.engines.ranks import Ranks
from lichen.recipes.assemble.sides.clients import ClientSide, Secret
from lichen.recipes.assemble.sides.row_privacy import PaidRounds, hides_rows, noise_of, per_row
from lichen.recipes.assemble.sides.server import ServerSide, participants
from lichen.recipes.schema.recipe import Recipe
from lichen.transforms.privacy import Event, Gaussian, Sampled, Statement, Unit, account, delta_for, epsilon, sigma_for

__all__ = ["KEY", "PrivateRounds", "for_timing", "private_rounds", "promised", "spent", "with_secret"]

KEY, BUDGET = "privacy.key", "budget.jsonl"
"""In a run's ``state/``: the secret key, and what was spent."""

SHOWN = 5
"""Rounds after which a plan tells ε."""

WITHIN = 1e-6
"""Relative width to which the noise is found."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """What so many rounds promise.

    Attributes:
        sigma: Noise in a round's sum, in units of the clip.
        rate: Chance of each client in a round, or the largest one of a row in a step.
        delta: δ.
        limit: Rounds that can be paid for; None: any number.
        seeded: Nothing is secret.
        unit: What is hidden.
        steps: Releases of a round.
    """

    sigma: float
    rate: float
    delta: float
    limit: int | None
    seeded: bool = False
    unit: Unit = "client"
    steps: int = 1

    def after(self, charges: int) -> Statement:
        """What holds after so many rounds were charged."""
        return account(_events(self.sigma, self.rate, charges * self.steps), self.delta, unit=self.unit)

    def sentence(self, charges: int) -> str:
        """The same as a sentence; no promise where noise follows from a seed."""
        return "no privacy: seeded" if self.seeded else str(self.after(charges))


def _events(sigma: float, rate: float, steps: int) -> list[Event]:
    plain = Gaussian(sigma, steps=steps)
    return [plain if rate == 1 else Sampled(plain, rate=rate)]


def guarantee(server: ServerSide, *, sigma: float | None = None) -> Guarantee:
    """What the recipe's rounds promise to these clients.

    Args:
        server: The server's side, whose recipe has a section ``privacy``.
        sigma: The noise of a run that was begun; None: as the recipe says, or as its epsilon needs.

    Raises:
        LichenError: if δ hides nothing, or the rounds cost more than epsilon.
    """
    config, clients, rounds = server.recipe.privacy, len(server.roster), server.recipe.federation.rounds
    assert config is not None
    if hides_rows(server.recipe):
        return _of_rows(server, sigma)
    delta = delta_for(clients) if config.delta is None else config.delta
    if delta >= 1 / clients:
        raise LichenError(
            f"{delta:g} allows that one of {clients} clients is published whole",
            where="privacy.delta",
            fix=f"use less than {1 / clients:.2g}, or leave it out",
        )
    rate = participants(server) / clients
    sigma = config.sigma if sigma is None else sigma
    found, limit = _noise(sigma, config.epsilon, delta, rate, rounds)
    return Guarantee(sigma=found, rate=rate, delta=delta, limit=limit, seeded=config.seed is not None)


def _of_rows(server: ServerSide, sigma: float | None) -> Guarantee:
    config, rounds, one = server.recipe.privacy, server.recipe.federation.rounds, per_row(server)
    assert config is not None
    sigma = config.sigma if sigma is None else sigma
    found, limit = _noise(sigma, config.epsilon, one.delta, one.rate, rounds, one.steps)
    return Guarantee(
        sigma=found,
        rate=one.rate,
        delta=one.delta,
        limit=limit,
        seeded=config.seed is not None,
        unit="row",
        steps=one.steps,
    )


@lru_cache(maxsize=32)
def _noise(
    sigma: float | None, target: float | None, delta: float, rate: float, rounds: int, steps: int = 1
) -> tuple[float, int | None]:
    """The noise, and how many rounds can be paid for."""
    if target is None:
        assert sigma is not None
        return sigma, None
    if sigma is None:
        return sigma_for(target, delta, rounds * steps, rate=rate, within=WITHIN), rounds
    limit = _affordable(sigma, target, delta, rate, rounds, steps)
    if limit < rounds:
        raise LichenError(
            f"round {limit + 1} of {rounds} would pass ε = {target:g} with noise of {sigma:g}",
            where="privacy.epsilon",
            fix=f"set federation.rounds to {limit} at most, raise privacy.sigma, or leave it out",
        )
    return sigma, limit


def _affordable(sigma: float, target: float, delta: float, rate: float, rounds: int, releases: int) -> int:
    """The most rounds that cost ``target`` at most, counted no further than twice those of the recipe."""

    def fits(steps: int) -> bool:
        return epsilon(_events(sigma, rate, steps * releases), delta) <= target

    low, high = (rounds, 2 * rounds + 1) if fits(rounds) else (0, rounds)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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
            budget = _Rank(self.budget)
            return PaidRounds(average, charge=budget.charge, close=budget.close)
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
        **({"steps": found.steps} if found.unit == "row" else {}),
    }


def _sigma_of(recipe: Recipe, begun: Mapping[str, Any] | None) -> float | None:
    """The noise that a run was begun with, where the recipe leaves it to the accountant."""
    assert recipe.privacy is not None
    return None if begun is None or recipe.privacy.sigma is not None else float(begun["sigma"])


LEFT_OUT = (
    "losses, counts and failures of clients",
    "who came to a round, and how many",
    "validation, and with it the choice of a round and of a learning rate",
    "bytes and seconds of a round, which are told as expected, or not at all",
)
"""What a run does not tell."""

LEFT_OUT_OF_ROWS = (
    "losses, counts and tokens of training",
    "validation, and with it the choice of a round and of a learning rate",
)
"""What a run that hides rows does not tell."""

KNOWN = (
    "the clients' names and numbers of rows",
    "names of classes",
    "the time a run takes",
)
"""What is taken as known to everybody."""

SIMULATED = (
    "scores on test rows, which stay with their clients where each has its own process",
    "columns of clients alone and of all rows together",
    "what was read of the data, and digests of it",
)
"""What is told beside the promise where one process has everybody's rows anyway."""


def spent(recipe: Recipe, run: Path, *, alone: bool) -> dict[str, Any] | None:
    """What a finished run has spent and says of it, as its summary holds it; None without privacy.

    Args:
        recipe: The run's.
        run: Its folder.
        alone: The server had nobody's rows.

    Raises:
        LichenError: if the budget is damaged.
    """
    config, path = recipe.privacy, run / "state" / BUDGET
    begun = begun_with(path)
    if config is None or begun is None:
        return None
    found = Guarantee(
        sigma=begun["sigma"],
        rate=begun["rate"],
        delta=begun["delta"],
        limit=None,
        seeded=begun["seeded"],
        unit=begun["unit"],
        steps=begun.get("steps", 1),
    )
    charges = Budget(path, terms=begun).charges
    after = found.after(charges)
    return {
        "statement": found.sentence(charges),
        "epsilon": None if math.isinf(after.epsilon) or found.seeded else after.epsilon,
        "delta": found.delta,
        "unit": config.unit,
        "clip": config.clip,
        "sigma": found.sigma,
        "rate": found.rate,
        "charges": charges,
        "left_out": list(LEFT_OUT if config.unit == "client" else LEFT_OUT_OF_ROWS),
        "known": list(KNOWN),
        "simulated": [] if alone else list(SIMULATED),
        "warnings": warnings(recipe),
    }


def warnings(recipe: Recipe) -> list[str]:
    """What a person should know of noise and this recipe."""
    lora = recipe.model.name is not None and recipe.model.adapter.facts.low_rank
    if lora and not recipe.aggregation.freezes:
        return [
            f"{recipe.rule}: noise on both factors of LoRA is multiplied in their product; ffa and fedsvd have noise "
            "on one"
        ]
    return []


def promised(server: ServerSide, numbers: int) -> dict[str, Any] | None:
    """What a run will promise, as its plan holds it; None without privacy.

    Args:
        server: The server's side.
        numbers: Of one client's message.

    Returns:
        ``statement``, ``sigma``, ``rate``, ``delta``, ``clip``; ``epsilon_by_round``, pairs of rounds and ε; and how
        large the noise of a round's change is: ``numbers`` d of a message and ``noise`` σ C √d / q N, its expected
        norm, beside ``clip`` C, the most that the mean change can be.

    Raises:
        LichenError: as :func:`guarantee`.
    """
    config, rounds = server.recipe.privacy, server.recipe.federation.rounds
    if config is None:
        return None
    found = guarantee(server)
    marks = sorted({max(1, round(rounds * part / SHOWN)) for part in range(1, SHOWN + 1)})
    return {
        "statement": found.sentence(rounds),
        "sigma": found.sigma,
        "rate": found.rate,
        "delta": found.delta,
        "clip": config.clip,
        "epsilon_by_round": [(mark, found.after(mark).epsilon) for mark in marks] if found.sigma else [],
        "numbers": numbers,
        "noise": noise_of(server, found.sigma)
        if found.unit == "row"
        else found.sigma * config.clip * math.sqrt(numbers) / (found.rate * len(server.roster)),
        "warnings": warnings(server.recipe),
    }


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
