"""What a recipe's ``privacy`` section costs and promises.

Legend: N clients of the roster.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import final

from lichen.core.errors import LichenError
from lichen.recipes.assemble.sides.row_privacy import hides_rows, row_bounds
from lichen.recipes.assemble.sides.server import ServerSide, participants
from lichen.transforms.privacy import Event, Gaussian, Sampled, Statement, Unit, account, delta_for, epsilon, sigma_for

__all__ = ["Guarantee", "guarantee"]

WITHIN = 1e-6
"""Relative width to which the noise is found."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """What so many rounds promise.

    Attributes:
        unit: What is hidden.
        sigma: Noise in a sum, in units of the clip.
        rate: Chance of each client in a round, or the largest one of a row in a step.
        steps: Releases of a round.
        delta: δ.
        limit: Rounds that can be paid for; None: any number.
        seeded: Nothing is secret.
    """

    unit: Unit
    sigma: float
    rate: float
    steps: int
    delta: float
    limit: int | None = None
    seeded: bool = False

    def after(self, charges: int) -> Statement:
        """What holds after so many rounds were charged."""
        return account(_events(self.sigma, self.rate, charges * self.steps), self.delta, unit=self.unit)

    def against_server(self, charges: int) -> Statement:
        """What holds against a server that sees no message but their sums, and knows who came: nothing is sampled."""
        return account(_events(self.sigma, 1, charges * self.steps), self.delta, unit=self.unit)

    def sentence(self, charges: int) -> str:
        """The same as a sentence; no promise where noise follows from a seed."""
        return "no privacy: seeded" if self.seeded else str(self.after(charges))


def _events(sigma: float, rate: float, steps: int) -> list[Event]:
    plain = Gaussian(sigma, steps=steps)
    return [plain if rate == 1 else Sampled(plain, rate=rate)]


def guarantee(server: ServerSide, *, sigma: float | None = None, bounds: tuple[int, int] | None = None) -> Guarantee:
    """What the recipe's rounds promise to these clients, or to each of their rows.

    Args:
        server: The server's side, whose recipe has a section ``privacy``.
        sigma: The noise of a run that was begun; None: as the recipe says, or as its epsilon needs.
        bounds: Training rows of the clients with fewest and most; None: by the roster.

    Raises:
        LichenError: if δ hides nothing, or the rounds cost more than epsilon.
    """
    config, federation, clients = server.recipe.noised, server.recipe.federation, len(server.roster)
    assert config is not None
    if hides_rows(server.recipe):
        # What holds at the client whose rows are sampled most often holds at all.
        fewest, units = bounds or row_bounds(server.roster)
        of, steps = "rows of a client", federation.fixed_steps
        rate = min(1.0, federation.batch_size / max(fewest, 1))
    else:
        units, of, steps, rate = clients, "clients", 1, participants(server) / clients
    delta = delta_for(units) if config.delta is None else config.delta
    if delta >= 1 / max(units, 1):
        raise LichenError(
            f"{delta:g} allows that one of {units} {of} is published whole",
            where="privacy.delta",
            fix=f"use less than {1 / max(units, 1):.2g}, or leave it out",
        )
    sigma = config.sigma if sigma is None else sigma
    found, limit = _noise(sigma, config.epsilon, delta, rate, federation.rounds, steps)
    seeded = config.seed is not None
    return Guarantee(unit=config.unit, sigma=found, rate=rate, steps=steps, delta=delta, limit=limit, seeded=seeded)


@lru_cache(maxsize=32)
def _noise(
    sigma: float | None, target: float | None, delta: float, rate: float, rounds: int, steps: int
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
