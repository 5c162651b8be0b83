"""From a recipe to a bench: records gathered and parted, the model loaded and wrapped, shards made.

A server and a node open the same recipe and hold the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from lichen.core.contracts import CohortModel
from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.data.catalog import CATALOG, resolve_model
from lichen.data.fetch import fetch
from lichen.data.records import Record
from lichen.data.shards import ArrayShard, Shard, TextShard
from lichen.data.text import pad_id
from lichen.models.cohort import CausalCohort, ClassifierCohort
from lichen.models.load import load_causal, load_classifier, load_encoder
from lichen.models.lora import Lora
from lichen.models.peft_format import load_adapter
from lichen.models.students import ImageCNN, ImageMLP, TextCNN, TwoLayerTransformer
from lichen.recipes.bench import Bench
from lichen.recipes.prepare import Owner, classes_of, encode, gather, owners_of
from lichen.recipes.schema import Recipe

STUDENT_TOKENIZER = "minilm-l6"
"""A text student that is trained from scratch still needs somebody's tokens."""

__all__ = ["STUDENT_TOKENIZER", "Opened", "lora_of", "make_student", "open_recipe", "shards_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A recipe with everything it names at hand.

    Attributes:
        bench: What the columns work with.
        owners: The clients, in roster order.
        classes: The labels; none for a language model.
        foundation: The frozen transformers model; None for a student.
        tokenizer: Its tokenizer; None without one.
    """

    bench: Bench
    owners: tuple[Owner, ...]
    classes: tuple[str, ...]
    foundation: Any
    tokenizer: Any


def fetch_named(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Fetch what the recipe names from the catalog, before anything is loaded."""
    wanted = [recipe.model.name, recipe.data.name, recipe.compare.forgotten, recipe.teacher and recipe.teacher.name]
    for name in wanted:
        if name in CATALOG:
            fetch(str(name), say=say)


def lora_of(recipe: Recipe, model: Any) -> Lora:
    """The recipe's adapter; a classifier's head is trained in full unless the recipe says what is."""
    adapter = recipe.model.adapter
    heads = adapter.modules_to_save
    if not heads and recipe.task == "classify":
        heads = tuple(n for n in ("classifier", "score") if getattr(model, n, None) is not None)
    return Lora(targets=adapter.targets, rank=adapter.rank, alpha=adapter.alpha, heads=heads, last=adapter.last)


def shards_of(owners: Sequence[Owner], part: str, make: Callable[[Sequence[Record]], Shard]) -> tuple[Shard, ...]:
    """One shard a client, all of them stretches of one; a part that all clients share is made once."""
    parts = {id(rows): rows for owner in owners if (rows := getattr(owner, part))}
    records = [record for rows in parts.values() for record in rows]
    whole = make(records)
    begin = dict(zip(parts, accumulate(map(len, parts.values()), initial=0), strict=False))
    made = {place: whole.between(begin[place], begin[place] + len(rows)) for place, rows in parts.items()}
    nothing = whole.between(0, 0)
    return tuple(made.get(id(getattr(owner, part)), nothing) for owner in owners)


def make_student(recipe: Recipe, shard: Shard, classes: int, *, vocabulary: int = 0) -> CohortModel:
    """The recipe's student, sized for these rows.

    Raises:
        LichenError: if its architecture does not read this kind of data.
    """
    student = recipe.model.student
    assert student is not None
    reads_text = student.kind in ("text-cnn", "transformer")
    if reads_text != isinstance(shard, TextShard):
        kinds = "image-mlp or image-cnn" if isinstance(shard, ArrayShard) else "text-cnn or transformer"
        raise LichenError(f"{student.kind} does not fit this data", where="model.student.kind", fix=f"use {kinds}")
    if isinstance(shard, ArrayShard):
        inputs = int(np.prod(shard.x.shape[1:]))
        if student.kind == "image-mlp":
            return ImageMLP(inputs, hidden=(student.width,), classes=classes)
        return ImageCNN(round(inputs**0.5), width=student.width, classes=classes)
    if student.kind == "text-cnn":
        return TextCNN(vocabulary, width=student.width, classes=classes)
    return TwoLayerTransformer(vocabulary, width=student.width, classes=classes, max_length=recipe.data.max_length)


def open_recipe(recipe: Recipe, *, say: Callable[[str], None] = lambda _: None) -> Opened:
    """Open a recipe of task chat or classify.

    Raises:
        LichenError: whatever does not fit, by its key.
    """
    fetch_named(recipe, say)
    records = gather(recipe)
    classes = classes_of(recipe, records)
    owners = owners_of(recipe, records)
    say(f"{len(owners)} clients, {sum(len(o.train) for o in owners):,} rows to train on")
    model, foundation, tokenizer = _model(recipe, classes, owners)
    make = encode(recipe, tokenizer, classes)
    train = shards_of(owners, "train", make)
    if model is None:
        model = make_student(recipe, train[0], len(classes), vocabulary=len(tokenizer) if tokenizer else 0)
    bench = Bench(
        recipe=recipe,
        model=model,
        start=start_of(recipe, model),
        train=train,
        valid=shards_of(owners, "valid", make),
        test=shards_of(owners, "test", make),
        pad=pad_id(tokenizer) if tokenizer is not None else 0,
    )
    return Opened(bench=bench, owners=owners, classes=classes, foundation=foundation, tokenizer=tokenizer)


def _model(recipe: Recipe, classes: Sequence[str], owners: Sequence[Owner]) -> tuple[CohortModel | None, Any, Any]:
    """``(cohort model or None for a student, foundation model, tokenizer)``."""
    section = recipe.model
    if section.name is None:
        if owners[0].train[0].features is not None:
            return None, None, None
        _, tokenizer = load_encoder(resolve_model(STUDENT_TOKENIZER))
        return None, None, tokenizer
    source, padded = resolve_model(section.name), not recipe.engine.packing
    if recipe.task == "chat":
        foundation, tokenizer = load_causal(source, dtype=section.dtype, device=section.device)
        lm = CausalCohort(foundation, adapter=lora_of(recipe, foundation), name=section.name, reference=padded)
        lm.checkpointing = bool(recipe.engine.gradient_checkpointing)
        return lm, foundation, tokenizer
    foundation, tokenizer = load_classifier(
        source, classes=len(classes), seed=derive(recipe.seed, "head"), dtype=section.dtype, device=section.device
    )
    model = ClassifierCohort(foundation, adapter=lora_of(recipe, foundation), name=section.name, reference=padded)
    model.checkpointing = bool(recipe.engine.gradient_checkpointing)
    return model, foundation, tokenizer


def start_of(recipe: Recipe, model: CohortModel) -> Tree:
    """The shared tensors every column starts from: fresh, or the adapter that ``init_from`` names.

    Raises:
        LichenError: if that adapter is of another shape.
    """
    fresh = model.init(derive(recipe.seed, "init"))
    if recipe.model.adapter.init_from is None:
        return fresh
    loaded, config = load_adapter(Path(recipe.model.adapter.init_from), like=fresh)
    if config.get("lora_alpha") != recipe.model.adapter.alpha:
        raise LichenError(
            f"the adapter in {recipe.model.adapter.init_from} was scaled with alpha {config.get('lora_alpha')}",
            where="model.adapter.alpha",
            fix=f"set it to {config.get('lora_alpha')}",
        )
    return loaded
