"""A first student whose layers follow the teacher's, made at the server on public texts.

The student's rows are in the teacher's tokens here, so that both see one text; a table says which of the
student's own words each token is (:mod:`lichen.models.layers`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lichen.clients.distill import pre_distil
from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.data.catalog import resolve_model
from lichen.data.shards import TextShard
from lichen.data.text import pad_id
from lichen.models.layers import EncoderStates, Layers, renumbering
from lichen.models.load import load_encoder
from lichen.recipes.bench import Bench
from lichen.recipes.folder import RunFolder
from lichen.recipes.open import Opened
from lichen.recipes.prepare import encode

__all__ = ["layered"]


def layered(opened: Opened, bench: Bench, answers: Tree, folder: RunFolder, say: Callable[[str], None]) -> Bench:
    """The bench with a student distilled from the teacher's layers and answers.

    Raises:
        LichenError: if the teacher is no encoder, reads other tokens, or has no such layer.
    """
    recipe = bench.recipe
    plan = recipe.teacher
    assert plan is not None
    model, tokenizer = load_encoder(resolve_model(plan.name), device=recipe.model.device)
    if len(tokenizer) != len(opened.tokenizer):
        raise LichenError(
            "reads other tokens than the student", where="teacher.layers", fix="take minilm-l6, or teach by answers"
        )
    shard = encode(recipe, tokenizer, opened.classes)(opened.commons.unlabelled)
    assert isinstance(shard, TextShard)
    public = TextShard(
        shard.input_ids, labels=shard.labels, kind="classify", answer=np.arange(shard.size, dtype=np.int64)
    )
    words = opened.vocabulary
    table_V = None
    if words is not None:
        table_V = renumbering(words.words, unknown=words.unknown, vocabulary=len(tokenizer))

    def made() -> Tree:
        say(f"the server follows the teacher's layers for {plan.server_steps} steps")
        start, _ = pre_distil(
            bench.model,
            bench.start,
            public,
            answers,
            steps=plan.server_steps,
            lr=recipe.optimizer.lr[0],
            seed=derive(recipe.seed, "layers"),
            layers=Layers(plan.layers, relation={own: of for own, of in plan.layers.items() if own > 0}),
            teacher=EncoderStates(model),
            words_V=table_V,
            pad=pad_id(tokenizer),
            max_length=recipe.data.max_length,
            device=recipe.model.device,
        )
        return start

    return replace(bench, start=folder.tree("layers", made, alone=True))
