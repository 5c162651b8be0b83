"""What a plan says that privacy will cost, and a summary what it has cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lichen.core.secret.budget import Budget, begun_with
from lichen.recipes.assemble.sides.guarantee import Guarantee, guarantee
from lichen.recipes.assemble.sides.privacy import BUDGET
from lichen.recipes.assemble.sides.row_privacy import noise_of
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe

__all__ = ["promised", "spent"]

SHOWN = 5
"""Rounds after which a plan tells ε."""

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
    config, path = recipe.noised, run / "state" / BUDGET
    begun = begun_with(path)
    if config is None or begun is None:
        return None
    found = Guarantee(**{name: begun[name] for name in ("unit", "sigma", "rate", "steps", "delta", "seeded")})
    charges = Budget(path, terms=begun).charges
    after = found.after(charges)
    return {
        "statement": found.sentence(charges),
        "epsilon": None if math.isinf(after.epsilon) or found.seeded else after.epsilon,
        "delta": found.delta,
        "unit": config.unit,
        "clip": config.bound,
        "sigma": found.sigma,
        "rate": found.rate,
        "charges": charges,
        "server": _to_server(recipe, found, charges),
        "left_out": list(LEFT_OUT if config.unit == "client" else LEFT_OUT_OF_ROWS),
        "known": list(KNOWN),
        "simulated": [] if alone else list(SIMULATED),
        "warnings": warnings(recipe),
    }


def _to_server(recipe: Recipe, found: Guarantee, charges: int) -> str | None:
    """What is promised against the server, where it sees sums alone; None where it sees each change."""
    if recipe.masked is None or found.unit != "client" or found.seeded:
        return None
    return f"{found.against_server(charges)}, for it knows who came"


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
    config, rounds = server.recipe.noised, server.recipe.federation.rounds
    if config is None:
        return None
    found = guarantee(server)
    marks = sorted({max(1, round(rounds * part / SHOWN)) for part in range(1, SHOWN + 1)})
    return {
        "statement": found.sentence(rounds),
        "sigma": found.sigma,
        "rate": found.rate,
        "delta": found.delta,
        "clip": config.bound,
        "epsilon_by_round": [(mark, found.after(mark).epsilon) for mark in marks] if found.sigma else [],
        "numbers": numbers,
        "noise": noise_of(server, found.sigma)
        if found.unit == "row"
        else found.sigma * config.bound * math.sqrt(numbers) / (found.rate * len(server.roster)),
        "server": _to_server(server.recipe, found, rounds),
        "warnings": [*warnings(server.recipe), *_everybody(found, rounds)],
    }


def _everybody(found: Guarantee, rounds: int) -> list[str]:
    """What a person should know whose clients all come to every round."""
    if found.unit == "row" or found.rate < 1 or rounds < 2 or not found.sigma:
        return []
    return [
        "everybody comes to every round: noise correlated over rounds (DP-FTRL) would leave as much in the model; "
        "few clients hide nobody well, and privacy.unit=row hides their rows"
    ]
