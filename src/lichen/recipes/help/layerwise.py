"""Distils a first student layer by layer on public texts, at the server.

The student's rows are in the teacher's tokens here, so that both see one text; a table says which of the
student's own words each token is (:mod:`lichen.models.layerwise_distillation`).
"""

from __future__ import annotations

from typing import Any

from lichen.core.errors import LichenError
from lichen.data.batches.text import pad_id
from lichen.data.sources.catalog import resolve_model
from lichen.models.layerwise_distillation import EncoderStates, Layers, renumbering
from lichen.models.loading.load import load_encoder
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.rows.prepare import encode

__all__ = ["layer_distillation"]


def layer_distillation(loaded: LoadedExperiment) -> dict[str, Any]:
    """What :func:`lichen.clients.distillation.distill.pre_distil` takes to follow the recipe's layers, its public rows
    among it.

    Raises:
        LichenError: if the teacher is no encoder, or reads other tokens.
    """
    recipe = loaded.experiment.recipe
    plan = recipe.teacher
    assert plan is not None
    model, tokenizer = load_encoder(resolve_model(plan.name), device=recipe.model.device)
    if len(tokenizer) != len(loaded.tokenizer):
        raise LichenError(
            "reads other tokens than the student", where="teacher.layers", fix="take minilm-l6, or teach by answers"
        )
    words = loaded.vocabulary
    table_V = None
    if words is not None:
        table_V = renumbering(words.words, unknown=words.unknown, vocabulary=len(tokenizer))
    return {
        "public": encode(recipe, tokenizer, loaded.classes)(loaded.public_split.unlabelled),
        "layers": Layers(plan.layers, relation={own: of for own, of in plan.layers.items() if own > 0}),
        "teacher": EncoderStates(model),
        "words_V": table_V,
        "pad": pad_id(tokenizer),
    }
