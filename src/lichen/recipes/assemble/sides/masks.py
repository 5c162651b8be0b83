"""What masks a recipe's clients put over what they send, and the engine that opens the sums."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache, partial

from lichen.clients.masking.masked import ATTEMPT, Masked, MaskTerms
from lichen.clients.masking.noise_share import NoiseShare
from lichen.clients.masking.own_mean import OwnMean
from lichen.core.contracts.client import ClientWork, Dialogue
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.masks.graph import degree
from lichen.core.message import Job
from lichen.core.seeds import numpy_generator
from lichen.engines.masking.unmasking import UnmaskingEngine
from lichen.recipes.schema.recipe import Recipe

__all__ = ["LEAST", "mask_terms", "masked", "masked_scores", "masked_sums", "unmasking", "without_masks"]

LEAST = 3
"""Clients whose sum is opened, at least: of two, each knows the other's part of it."""

STAGES = 4


def mask_terms(recipe: Recipe, clients: int) -> MaskTerms:
    """What is agreed on by a recipe, for so many clients of a round as are expected.

    Where clients share out the noise, a sum is opened only if as many are left as the noise is reckoned for.

    Raises:
        LichenError: if there are fewer than three.
    """
    config = recipe.masked
    assert config is not None
    if clients < LEAST:
        what = f"a sum of {clients} would show too much of each: masks need {LEAST} clients in every sum"
        raise LichenError(what, where="privacy.secure", fix="let more clients take part, come to a round and validate")
    k, threshold = _degree(clients, config.dropped, config.colluding)
    least = max(LEAST, clients - int(config.dropped * clients) if config.noised and config.unit == "client" else 0)
    return MaskTerms(k=k, threshold=threshold, least=least, run=_run_of(recipe))


@lru_cache(maxsize=64)
def _degree(clients: int, dropped: float, colluding: float) -> tuple[int, int]:
    gone, liars = int(dropped * clients), int(colluding * clients)
    k, threshold = degree(clients, dropped=gone / clients, colluding=liars / clients)
    # Where all hold shares of all, as many are asked for as colluding ones cannot give twice, if so many may be left.
    safe = (clients + liars) // 2 + 1
    return k, safe if k == clients - 1 and threshold < safe <= clients - gone else threshold


def _run_of(recipe: Recipe) -> str:
    """By what all sides of a run know it: the recipe, but for where rows lie and who computes."""
    terms = recipe.model_dump_json(exclude={"data", "engine", "compare", "cache_dir"})
    return hashlib.sha256(terms.encode()).hexdigest()


def masked(
    recipe: Recipe, work: ClientWork, aggregator: Aggregator, clients: int, noise: NoiseShare | None = None
) -> Masked:
    """A work whose messages lie under masks until they are summed by this aggregator."""
    terms, drops_out = mask_terms(recipe, clients), _drops_out(recipe)
    return Masked(inner=work, terms=terms, aggregator=aggregator, noise=noise, drops_out=drops_out)


def masked_scores(recipe: Recipe, work: ClientWork, clients: int) -> Masked:
    """An evaluation whose sums are told of all clients together; each counts 1."""
    return masked_sums(recipe, OwnMean(work), clients)


def masked_sums(recipe: Recipe, work: ClientWork, clients: int) -> Masked:
    """A work of metrics alone, of which the server learns the sums over so many clients."""
    return Masked(inner=work, terms=mask_terms(recipe, clients), drops_out=_drops_out(recipe))


def _drops_out(recipe: Recipe) -> partial[int | None]:
    config = recipe.masked
    assert config is not None
    return partial(_stage_of, config.dropout or (0.0,) * STAGES, recipe.seed)


def _stage_of(chances: tuple[float, ...], seed: int, job: Job, client: int) -> int | None:
    """The stage in which a client falls silent, by the round's seed; None where it comes to the end."""
    if not any(chances):
        return None
    attempt = int(job.settings.get(ATTEMPT, 0))
    generator = numpy_generator(seed, "dropout", job.work, job.version, attempt, client)
    return next((stage for stage, chance in enumerate(chances) if generator.random() < chance), None)


def unmasking(recipe: Recipe, engine: Engine, works: Mapping[str, ClientWork | Dialogue]) -> Engine:
    """The engine, opening sums where the recipe's clients mask; else itself."""
    if recipe.masked is None:
        return engine
    hidden = {name: work for name, work in works.items() if isinstance(work, Masked)}
    patience = math.inf if recipe.masked.stage_seconds is None else recipe.masked.stage_seconds
    return UnmaskingEngine(engine, hidden, patience=patience)


def without_masks(recipe: Recipe) -> Recipe:
    """The recipe with its messages in the clear; noise and clip stay."""
    config = recipe.masked
    if config is None:
        return recipe
    if config.noised:
        return recipe.model_copy(update={"privacy": config.model_copy(update={"secure": False})})
    clip = recipe.wire.clip if config.clip is None else config.clip
    return recipe.model_copy(update={"privacy": None, "wire": recipe.wire.model_copy(update={"clip": clip})})
