"""The pieces of a recipe's model, where it is split: what its clients hold, and what its server.

Legend: H width.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, cast

from lichen.clients.splitting.ends import Cut, Ends
from lichen.clients.splitting.split_parts import SplitParts
from lichen.core.contracts.model import CohortModel
from lichen.core.errors import LichenError
from lichen.core.wrapping import innermost
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.objectives import RowObjective
from lichen.models.pieces.carve import carve, spec_within
from lichen.models.pieces.families import blocks_of
from lichen.models.pieces.piece_cohort import PieceCohort
from lichen.recipes.schema.recipe import Recipe

__all__ = ["split_parts"]


def cuts_of(recipe: Recipe, blocks: int) -> tuple[Cut, ...]:
    """The recipe's cuts, as they are dealt out; where memory chooses, all that there are to choose from.

    Raises:
        LichenError: if one leaves no middle.
    """
    assert recipe.split is not None
    first, last = recipe.split.client.first, recipe.split.client.last
    turns = [(first[k % len(first)], last[k % len(last)]) for k in range(math.lcm(len(first), len(last)))]
    cuts = tuple(Cut(*one) for one in (product(first, last) if recipe.federation.memory else turns))
    if (wide := next((cut for cut in cuts if cut.first + cut.last >= blocks), None)) is not None:
        what = f"{wide.first} blocks and {wide.last} leave no middle of the {blocks} that {recipe.model.name} has"
        raise LichenError(what, where="split.client", fix=f"let first and last be {blocks - 1} together at most")
    return cuts


def split_parts(recipe: Recipe, foundation: Any, model: CohortModel) -> SplitParts | None:
    """The pieces of a recipe's model, which share its weights; None where it is not split.

    Args:
        recipe: The recipe.
        foundation: The frozen transformers model.
        model: The whole one of C clients around it.

    Raises:
        LichenError: if the family has no pieces, or the cuts leave no middle.
    """
    if recipe.split is None:
        return None
    whole = innermost(model)
    assert isinstance(whole, CausalCohort | ClassifierCohort)
    blocks = len(blocks_of(foundation)[1])
    cuts = cuts_of(recipe, blocks)
    ends, middles = dict[Cut, Ends](), dict[Cut, PieceCohort]()
    for cut in dict.fromkeys(cuts):
        middle = middles[cut] = _piece(foundation, whole, cut.first, blocks - cut.last)
        first, last = _piece(foundation, whole, 0, cut.first), _last(foundation, whole, blocks - cut.last, blocks)
        ends[cut] = Ends.around(middle, first, last)
    width = int(foundation.config.get_text_config().hidden_size)
    return SplitParts(cuts=cuts, ends=ends, middles=middles, width=width, dtype_bytes=foundation.dtype.itemsize)


def _piece(foundation: Any, whole: CausalCohort | ClassifierCohort, start: int, stop: int) -> PieceCohort:
    piece = carve(foundation, start, stop, where="split.client")
    spec = spec_within(whole.adapter, foundation, piece)
    return PieceCohort(piece, adapter=spec, name=whole.name, reference=whole.reference)


def _last(foundation: Any, whole: CausalCohort | ClassifierCohort, start: int, stop: int) -> CohortModel:
    piece = carve(foundation, start, stop, where="split.client")
    spec = spec_within(whole.adapter, foundation, piece)
    more: dict[str, Any] = {"adapter": spec, "name": whole.name, "reference": True, "prove": False}
    if isinstance(whole, CausalCohort):
        return CausalCohort(piece, **more)
    return ClassifierCohort(piece, objective=cast(RowObjective, whole.objective), **more)
