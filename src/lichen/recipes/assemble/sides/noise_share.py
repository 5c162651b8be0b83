"""What part of a round's noise each client of a recipe adds under masks."""

from __future__ import annotations

import math

from lichen.clients.masking.noise_share import NoiseShare
from lichen.recipes.assemble.sides.guarantee import guarantee
from lichen.recipes.assemble.sides.masks import mask_terms
from lichen.recipes.assemble.sides.server import ServerSide, participants
from lichen.server.private_mean import SLACK

__all__ = ["noise_share"]


def noise_share(server: ServerSide) -> NoiseShare | None:
    """A client's part; None where noise does not hide clients, and so is not shared out.

    Raises:
        LichenError: as :func:`lichen.recipes.assemble.sides.guarantee.guarantee`.
    """
    config = server.recipe.noised
    if config is None or config.unit != "client":
        return None
    left = mask_terms(server.recipe, participants(server)).least
    deviation = guarantee(server).sigma * config.bound * (1 + SLACK) / math.sqrt(left)
    return NoiseShare(deviation, seed=config.seed)
