"""The parts that keep a recipe's promise of privacy: paid rounds, secret numbers, and clients that have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lichen.algorithms.average import Average
from lichen.algorithms.private_average import PrivateAverage
from lichen.clients.privacy.paid_steps import PaidSteps
from lichen.core.contracts.client import ClientWork
from lichen.core.errors import LichenError
from lichen.core.secret.budget import Budget, begun_with
from lichen.core.secret.randomness import SecretRandomness, secret_key
from lichen.engines.ranks import Ranks
from lichen.recipes.assemble.sides.clients import ClientSide, Secret
from lichen.recipes.assemble.sides.guarantee import Guarantee, guarantee
from lichen.recipes.assemble.sides.row_privacy import PaidRounds, hides_rows, row_bounds
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe

__all__ = [
    "BUDGET",
    "KEY",
    "OwnAccounts",
    "PrivateRounds",
    "for_timing",
    "own_accounts",
    "private_rounds",
    "secret_of",
    "with_secret",
]

KEY, BUDGET = "privacy.key", "budget.jsonl"
"""In a run's ``state/``: the secret key, and what was spent."""

ACCOUNTS = "accounts"
"""In a site's folder: what each of its clients has spent, a file each."""


@final
@dataclass(frozen=True, slots=True)
class PrivateRounds:
    """The rounds of a run under privacy.

    Attributes:
        ranks: Who works on them together.
        guarantee: What they promise.
        randomness: Their secret numbers; None where each site has its own.
        budget: Pays for them; the first rank's alone.
    """

    ranks: Ranks
    guarantee: Guarantee
    randomness: SecretRandomness | None
    budget: Budget | None

    def around(self, average: Average) -> PrivateAverage | PaidRounds:
        """Averaging whose rounds are paid for."""
        if self.guarantee.unit == "row":
            return PaidRounds(average, budget=_Rank(self.budget), once=self.ranks.ask_first)
        assert self.randomness is not None
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


def private_rounds(server: ServerSide, run: Path, ranks: Ranks, *, own_keys: bool = False) -> PrivateRounds | None:
    """The rounds of a run whose recipe has a section ``privacy``; None where it has none.

    Args:
        server: The server's side.
        run: The run's folder, which all ranks see.
        ranks: Who works on it together.
        own_keys: Clients are at sites that have keys of their own for their rows.

    Raises:
        LichenError: as :func:`guarantee`, or if key or budget in the folder are damaged.
    """
    recipe, state = server.recipe, run / "state"
    if recipe.noised is None:
        return None
    seed = recipe.noised.seed
    begun = ranks.ask_first(lambda: begun_with(state / BUDGET))
    found = guarantee(server, sigma=_sigma_of(recipe, begun))
    randomness: SecretRandomness | None
    if own_keys and hides_rows(recipe):
        randomness = None
    elif seed is None:
        ranks.ask_first(lambda: secret_key(state / KEY) and None)
        randomness = secret_key(state / KEY)
    else:
        randomness = SecretRandomness.of_seed(seed)
    budget = None
    if ranks.first:
        terms = {**_terms(recipe, found), "key": randomness.mark if randomness is not None else ""}
        budget = Budget(state / BUDGET, terms=terms, limit=found.limit)
    return PrivateRounds(ranks, found, randomness, budget)


def _terms(recipe: Recipe, found: Guarantee) -> dict[str, Any]:
    assert recipe.noised is not None
    return {
        "unit": recipe.noised.unit,
        "clip": recipe.noised.bound,
        "sigma": found.sigma,
        "rate": found.rate,
        "delta": found.delta,
        "epsilon": recipe.noised.epsilon,
        "seeded": found.seeded,
        "steps": found.steps,
    }


def _sigma_of(recipe: Recipe, begun: Mapping[str, Any] | None) -> float | None:
    """The noise that a run was begun with, where the recipe leaves it to the accountant."""
    assert recipe.noised is not None
    return None if begun is None or recipe.noised.sigma is not None else float(begun["sigma"])


def with_secret(server: ServerSide, clients: ClientSide, run: Path) -> ClientSide:
    """The clients with a folder for files of their own, and with key and noise where noise hides single rows.

    Args:
        server: The server's side.
        clients: The clients' side.
        run: The run's folder.

    Raises:
        LichenError: as :func:`guarantee`, or if the key or the budget are damaged.
    """
    return replace(clients, secret=secret_of(server, run / "state"), state=run / "state")


def secret_of(server: ServerSide, state: Path) -> Secret | None:
    """What hides the rows of the clients of a run, in any of its processes; None where noise hides no rows.

    All processes of a run are one person's, and read one key from a file that nobody else can read.

    Args:
        server: The server's side.
        state: Where the run keeps its state.

    Raises:
        LichenError: as :func:`guarantee`, or if the key or the budget are damaged.
    """
    config = server.recipe.noised
    if config is None or not hides_rows(server.recipe):
        return None
    secret = secret_key(state / KEY) if config.seed is None else SecretRandomness.of_seed(config.seed)
    # What a run was begun with is not looked for again, in each of its processes.
    sigma = config.sigma if config.sigma is not None else _sigma_of(server.recipe, begun_with(state / BUDGET))
    return Secret(secret, sigma=guarantee(server).sigma if sigma is None else sigma)


@final
@dataclass(frozen=True, slots=True)
class OwnAccounts:
    """A site's own key, and what each of its clients has spent of the promise to its rows.

    A site trusts neither the server nor another site: its key is drawn here and never leaves, its clients' noise is by
    its own accounting, and its own files, one a client, say what was spent.

    Attributes:
        secret: What hides its clients' rows.
        found: What is promised to each.
        state: The site's folder.
    """

    secret: Secret
    found: Guarantee
    state: Path
    terms: Mapping[str, Any]

    def paid(self, work: ClientWork) -> PaidSteps:
        """Training that these clients pay for."""
        return PaidSteps(work, self.account)

    def account(self, client: int) -> Budget:
        """What a client has spent, as its file says it."""
        path = self.state / ACCOUNTS / f"{client:06d}.jsonl"
        return Budget(path, terms=self.terms, limit=self.found.limit, gaps=True)


def own_accounts(server: ServerSide, state: Path, bounds: tuple[int, int] | None) -> OwnAccounts | None:
    """The key and the accounts of a site; None where noise hides no rows.

    Args:
        server: The server's side as the site knows it: of other sites' clients, that they are there.
        state: The site's folder.
        bounds: Training rows of the clients with fewest and most in all sites, as the server says. Fewer and more than
            there are cost accuracy, not privacy.

    Raises:
        LichenError: if a client of this site is out of these bounds; as :func:`guarantee`.
    """
    recipe = server.recipe
    if recipe.noised is None or not hides_rows(recipe):
        return None
    fewest, most = row_bounds(server.roster)
    if bounds is None or bounds[0] > fewest or bounds[1] < most:
        what = "nothing" if bounds is None else f"{bounds[0]} to {bounds[1]} of all sites' clients"
        raise LichenError(
            f"clients here have {fewest} to {most} training rows, and the server says {what}; noise would be too small",
            where="roster",
            fix="start server and sites anew, with one version of lichen",
        )
    key = secret_key(state / KEY)
    found = guarantee(server, bounds=bounds)
    secret = Secret(key, sigma=found.sigma)
    return OwnAccounts(secret, found, state, {**_terms(recipe, found), "key": key.mark})


def for_timing(recipe: Recipe, clients: ClientSide) -> ClientSide:
    """The clients with noise from a seed, where noise hides single rows: what they learn is thrown away."""
    secret = Secret(SecretRandomness.of_seed(0), sigma=1.0)
    return replace(clients, secret=secret) if hides_rows(recipe) else clients
