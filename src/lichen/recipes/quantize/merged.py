"""The merged language model of a finished run, in float32, as it is before anything is rounded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.data.batches.text import start_id
from lichen.models.adapters.quantized import refuse_quantized
from lichen.recipes.artifacts.own_model import own_model, with_own
from lichen.recipes.artifacts.use.finished import load_finished, load_foundation, merge_learned
from lichen.recipes.schema.recipe import Recipe

__all__ = ["merged_run", "with_trained_template"]


def merged_run(folder: Path, *, client: str | None = None) -> tuple[Recipe, Any, Any]:
    """``(recipe, merged model, tokenizer)`` of a finished run that writes texts, the model in float32 and not rounded.

    Args:
        folder: The run.
        client: Whose own model; None for the one that all share.

    Raises:
        LichenError: if the run is not finished, or has nothing of the kind.
    """
    recipe, tree = load_finished(folder)
    if recipe.model.student is not None or recipe.model.students or not recipe.writes:
        student = recipe.model.student is not None
        kind = f"kind {recipe.model.student.kind}" if recipe.model.student is not None else f"task {recipe.task}"
        raise LichenError(
            f"only language models are written so, and this run's model is of {kind}",
            where=str(folder),
            fix="use --student --bits auto" if student else "use its model/ or adapter/ as it is",
        )
    model, tokenizer, _ = load_foundation(recipe, folder)
    if client is not None:
        own = own_model(folder, recipe, Shared.of_flat(tree), client)
        tree = with_own(tree, own, where="--client", fix="leave it out")
    refuse_quantized(model, where="export")
    return recipe, merge_learned(recipe, model.to(torch.float32), tree), tokenizer


def with_trained_template(tokenizer: Any, form: str) -> Any:
    """The tokenizer with a chat template that asks as the run was trained, for a file that no card goes with.

    A run in form ``transcript`` or ``plain`` never saw its base's template. Of a conversation the last message is
    asked, since training rows were one question and its answer.

    Args:
        tokenizer: The run's; it stays as it is.
        form: ``data.form`` of the run.
    """
    if form in ("chat", "messages"):
        return tokenizer
    start = json.dumps(tokenizer.convert_ids_to_tokens(start_id(tokenizer)), ensure_ascii=False)
    end = '{{ "\\n" }}' if form == "transcript" else ""
    last = f'{{{{ {start} }}}}{{{{ message["content"] }}}}{end}'
    out = copy.copy(tokenizer)
    out.chat_template = f"{{% for message in messages %}}{{% if loop.last %}}{last}{{% endif %}}{{% endfor %}}"
    return out
