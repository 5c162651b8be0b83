"""Builds the model of a recipe: foundation model with adapter, full, from scratch, or a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lichen.core.contracts.model import CohortModel
from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder
from lichen.core.private import tighten
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wrapping import innermost
from lichen.data.batches.shards import ArrayShard, Shard, TextShard
from lichen.data.sources.cache import key_of
from lichen.data.sources.catalog import CATALOG, cache_dir
from lichen.data.sources.records import load_records
from lichen.data.sources.sealed import is_whole, seal_entry
from lichen.models.adapters.kind import Spec, kind_of, kinds_in_peft
from lichen.models.adapters.whole_layers import whole_layers
from lichen.models.adapters.wrap import Wrapped
from lichen.models.cohort import Cohort
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.load import load_causal
from lichen.models.objectives import RowObjective
from lichen.models.peft.format import has_peft_format
from lichen.models.peft.start import start_from
from lichen.models.students import scratch
from lichen.models.students.student import Student
from lichen.models.students.students import ImageCNN, ImageMLP, TextCNN, TwoLayerTransformer
from lichen.recipes.assemble.class_names import class_names
from lichen.recipes.rows.prepare import ClientData, is_private
from lichen.recipes.schema.recipe import Recipe, StudentConfig
from lichen.tasks.registry import task_of

__all__ = [
    "SCRATCH",
    "STUDENT_TOKENIZER",
    "base_name_of",
    "described_base",
    "foundation_of",
    "make_student",
    "objective_of",
    "scratch_folder",
    "spec_of",
    "start_of",
]

SCRATCH = "state/scratch"
"""Where in a run's folder the language model lies that was drawn from nothing."""

STUDENT_TOKENIZER = "minilm-l6"
"""A text student that is trained from scratch still needs somebody's tokens."""


def spec_of(recipe: Recipe, model: Any) -> Spec:
    """The recipe's adapter; a classifier's head, and what its files lack, is trained in full.

    Raises:
        LichenError: if the section does not fit the kind.
    """
    adapter = recipe.model.adapter
    heads = whole_layers(model, adapter.modules_to_save, classifier=not recipe.writes)
    return kind_of(adapter.kind).build(adapter, heads)


def foundation_of(recipe: Recipe, source: str | Path, classes: int, *, anew: bool = False) -> tuple[Any, Any]:
    """The frozen transformers model, quantised if the recipe says so, and its tokenizer; ``anew``: with a new head."""
    section = recipe.model
    weight_seed = derive(recipe.seed, "weights") if section.random else None
    if recipe.writes:
        return load_causal(
            source,
            dtype=section.dtype,
            device=section.device,
            quantized=section.quantize,
            layers=section.layers,
            random=weight_seed,
        )
    return load_classifier(
        source,
        classes=classes,
        seed=derive(recipe.seed, "head"),
        dtype=section.dtype,
        device=section.device,
        quantized=section.quantize,
        layers=section.layers,
        random=weight_seed,
        anew=anew,
    )


def scratch_folder(recipe: Recipe, clients_data: Sequence[ClientData], *, private: Path | None = None) -> Path:
    """The recipe's untrained language model, drawn once and kept in the cache.

    Args:
        recipe: Its size, and the text its tokenizer is learned from.
        clients_data: Whose rows are read where it names no text.
        private: Where a model with words of private rows lies; by default in the cache's private part.
    """
    section = recipe.model.scratch
    assert section is not None
    if section.text is not None:
        texts = [record.text for record in load_records(section.text, columns={})]
    else:
        texts = [record.text for client_data in clients_data for record in client_data.train]
    key = key_of("scratch", section.model_dump(), recipe.data.max_length, recipe.seed, texts, code=(scratch.__file__,))
    own = section.text is None and is_private(recipe)
    cache = private or cache_dir() / "private" if own else cache_dir()
    folder = cache / f"scratch-{key[:16]}"
    if not is_whole(folder):
        size = scratch.Size(section.width, layers=section.layers, heads=section.heads, context=recipe.data.max_length)
        seed = derive(recipe.seed, "scratch")
        cache_dir().mkdir(parents=True, exist_ok=True)
        with whole_folder(folder, shared=not own) as draft:
            scratch.save_scratch(draft, size, texts, vocabulary=section.vocabulary, seed=seed)
            seal_entry(draft, folder.name)
            if own:
                tighten(draft)
    return folder


def start_of(
    recipe: Recipe, model: CohortModel, classes: Sequence[str] = (), *, say: Callable[[str], None] = lambda _: None
) -> Tree:
    """The shared tensors every column starts from: fresh, or with the function of the adapter in ``init_from``.

    Args:
        recipe: The recipe.
        model: What is trained.
        classes: The run's classes, in the order of its logits.
        say: Called with what was assumed of the adapter, a line each.

    Raises:
        LichenError: if that adapter cannot be computed here, or not with what the recipe trains.
    """
    fresh, adapter = model.init(derive(recipe.seed, "init")), recipe.model.adapter
    if adapter.init_from is None:
        return fresh
    cohort = innermost(model)
    wrapped = cohort.wrapped if isinstance(cohort, Cohort) else None
    if not isinstance(wrapped, Wrapped) or not has_peft_format(wrapped.spec):
        raise LichenError(
            f"{'a student' if recipe.model.student else f'kind: {adapter.kind}'} does not start from a PEFT adapter",
            where="model.adapter.init_from",
            fix=f"use one of the kinds {', '.join(kinds_in_peft())}; or merge the adapter into its base, and name that "
            "in model.name",
        )
    folder, name = Path(adapter.init_from).expanduser(), recipe.model.name or ""
    upstream = CATALOG[name].upstream if name in CATALOG else ""
    called = tuple(one for one in (name, described_base(recipe, wrapped.model), upstream) if one)
    begun = start_from(folder, wrapped, fresh, base_names=called, classes=classes, their_classes=class_names(folder))
    for note in begun.notes:
        say(f"model.adapter.init_from: {note}")
    return begun.tree


def base_name_of(model: Any) -> str:
    """Where elsewhere finds a model: the folder it was read from, in full, or its hub id."""
    source = str(getattr(model.config, "_name_or_path", ""))
    return str(Path(source).resolve()) if source and Path(source).is_dir() else source


def described_base(recipe: Recipe, model: Any) -> str:
    """What an adapter calls its base: where it lies; one cut short or drawn anew, which lies nowhere, by what it is.

    No tool takes that for a place, so that none puts the adapter on a base that it was not trained on.
    """
    section = recipe.model
    less = [f"its first {section.layers} layers"] if section.layers is not None else []
    less += [f"drawn anew from seed {recipe.seed}"] if section.random else []
    return f"{base_name_of(model)} ({', '.join(less)})" if less else base_name_of(model)


def objective_of(recipe: Recipe, names: Sequence[str]) -> RowObjective:
    """What the outputs of a model of rows are held against.

    Args:
        recipe: Of a task with labels.
        names: The outputs' names.
    """
    labels = task_of(recipe.task).labels
    assert labels is not None
    return labels.objective(names)


def make_student(
    recipe: Recipe, shard: Shard, names: Sequence[str], *, vocabulary: int = 0, section: StudentConfig | None = None
) -> Student:
    """The recipe's student, or the one of several that ``section`` is, sized for these rows.

    Args:
        recipe: The recipe.
        shard: Some rows.
        names: Of its outputs.
        vocabulary: Tokens it knows.
        section: One of several students.

    Raises:
        LichenError: if its architecture does not read this kind of data.
    """
    student = section or recipe.model.student
    assert student is not None
    classes, objective = len(names), objective_of(recipe, names)
    reads_text, where = student.kind in ("text-cnn", "transformer"), "model.student.kind"
    where = "model.students" if recipe.model.students else where
    if reads_text != isinstance(shard, TextShard):
        kinds = "image-mlp or image-cnn" if isinstance(shard, ArrayShard) else "text-cnn or transformer"
        raise LichenError(f"{student.kind} does not fit this data", where=where, fix=f"use {kinds}")
    if isinstance(shard, ArrayShard):
        inputs = int(np.prod(shard.x.shape[1:]))
        if student.kind == "image-mlp":
            return ImageMLP(inputs, hidden=(student.width,), classes=classes, objective=objective)
        channels, side = _picture(shard.x.shape[1:], where)
        return ImageCNN(side, channels=channels, width=student.width, classes=classes, objective=objective)
    if student.kind == "text-cnn":
        return TextCNN(vocabulary, width=student.width, classes=classes, objective=objective)
    most = recipe.data.max_length
    return TwoLayerTransformer(vocabulary, width=student.width, classes=classes, max_length=most, objective=objective)


def _picture(shape: Sequence[int], where: str) -> tuple[int, int]:
    """Channels, and pixels of a side, of square pictures; plain lists of numbers have one channel.

    Raises:
        LichenError: if rows of this shape are no square pictures.
    """
    channels = shape[0] if len(shape) == 3 else 1
    side = round((int(np.prod(shape)) / channels) ** 0.5)
    if len(shape) > 3 or channels * side * side != np.prod(shape) or shape[-1] not in (side, side * side):
        raise LichenError(
            f"image-cnn reads square pictures, channels first, and rows are {' x '.join(map(str, shape))} numbers",
            where=where,
            fix="use image-mlp",
        )
    return channels, side
