"""Asks a finished run: what it writes or tells beside its bare model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.data.batches.shards import TextShard
from lichen.data.batches.text import encode_classify
from lichen.data.sources.catalog import resolve_model
from lichen.data.sources.record import Record
from lichen.models.features import EncoderFeatures
from lichen.models.loading.load import load_encoder
from lichen.models.loading.named_head import has_named_head
from lichen.recipes.artifacts.sampling import Sampling, settings_text, write
from lichen.recipes.artifacts.use.finished import (
    attach_learned,
    classes_of_run,
    load_finished,
    load_foundation,
    student_config,
)
from lichen.recipes.assemble.class_names import class_names
from lichen.recipes.assemble.model import make_student
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage
from lichen.tasks.registry import task_of

__all__ = ["Talker", "talk", "talk_oneshot", "talk_rounds"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Talker:
    """A run to talk to.

    Attributes:
        kind: Whether it writes or classifies.
        answer: From a text to (the bare model's answer, the run's answer), and to those of others that ``names`` adds.
        settings: How it is asked, in words; empty for a classifier.
        names: Whose answers these are.
    """

    kind: Literal["chat", "classify"]
    answer: Callable[[str], tuple[str, ...]]
    settings: str = ""
    names: tuple[str, ...] = ("bare model", "this run")


def talk(
    folder: Path | str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> Talker:
    """Load a finished run beside its bare model.

    Args:
        folder: The run folder; that of several stages means the last one.
        max_new_tokens: Tokens written at most; 48 by default.
        temperature: Of the draw; 0, the default, takes the likeliest token.
        top_p: Share of the probability that is drawn from; 1 by default.
        repetition_penalty: For tokens that stand there already; 1.2 by default, 1 for none.
        seed: Of the draw; 0 by default.

    Raises:
        LichenError: if the run is not finished, or cannot answer, or a setting is out of range or of no effect.
    """
    folder = last_stage(folder)
    requested = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    given = {key: value for key, value in requested.items() if value is not None}
    recipe, tree = load_finished(folder)
    if given and not recipe.writes:
        raise LichenError(f"a run of task {recipe.task} writes nothing", where=next(iter(given)), fix="leave it out")
    sampling = Sampling(**given)  # type: ignore[arg-type]  # by name, each of its own type
    talker: Talker = task_of(recipe.task).procedure.load("talk")(recipe, tree, folder, sampling)
    return talker


def talk_rounds(recipe: Recipe, tree: Tree, folder: Path, sampling: Sampling) -> Talker:
    """A model that was trained in rounds, beside the bare one."""
    if recipe.model.student is not None:
        return _talk_student(recipe, tree, folder)
    model, tokenizer, classes = load_foundation(recipe, folder)
    joined = attach_learned(recipe, model, tree)
    if recipe.writes:

        def answer(text: str) -> tuple[str, str]:
            bare, mine = (write(recipe, one, tokenizer, text, sampling) for one in (model, joined))
            return bare, mine

        return Talker(kind="chat", answer=answer, settings=settings_text(recipe, sampling))

    own = recipe.model.head == "base" and has_named_head(model)
    describe = _describing(recipe, classes)

    def classify(text: str) -> tuple[str, str]:
        ids = tokenizer(text, truncation=True, max_length=recipe.data.max_length, return_tensors="pt")
        with torch.no_grad():
            bare = describe(model(**ids).logits[0]) if own else "(its head is not trained)"
            return bare, describe(joined(**ids).logits[0])

    return Talker(kind="classify", answer=classify)


def _describing(recipe: Recipe, classes: Sequence[str]) -> Callable[[torch.Tensor], str]:
    """What puts a row's outputs into words."""
    labels = task_of(recipe.task).labels
    assert labels is not None
    return partial(labels.describe, names=classes)


def _talk_student(recipe: Recipe, tree: Tree, folder: Path) -> Talker:
    """A small text model beside nothing: what taught it is not part of the run.

    Raises:
        LichenError: if it reads pictures, which cannot be typed.
    """
    about = student_config(folder)
    named = about.get("tokenizer")
    if named is None:
        raise LichenError("its model reads pictures, which cannot be typed", where=str(folder), fix="see its summary")
    classes = class_names(folder)
    describe = _describing(recipe, classes)
    _, tokenizer = load_encoder(resolve_model(str(named)))
    words = {token: i for i, token in enumerate(about["vocabulary"] or range(len(tokenizer)))}
    unknown = words[int(tokenizer.unk_token_id)]
    student = make_student(
        recipe, TextShard((), labels=np.zeros(0, dtype=np.int64), kind="classify"), classes, vocabulary=len(words)
    )

    def classify(text: str) -> tuple[str, str]:
        record = Record(client="", text=text)
        ((ids, _),) = encode_classify([record], tokenizer, max_length=recipe.data.max_length, classes=classes)
        row = torch.tensor([[[words.get(int(t), unknown) for t in ids]]])
        batch = {
            "active_C": torch.ones(1, dtype=torch.bool),
            "input_ids_CBT": row,
            "attention_mask_CBT": torch.ones_like(row),
        }
        logits = student.logits(trees.broadcast(tree, 1), {}, batch)[0, 0]
        return "(none: the student began from nothing)", describe(logits)

    return Talker(kind="classify", answer=classify)


def talk_oneshot(recipe: Recipe, head: Tree, folder: Path, sampling: Sampling) -> Talker:
    """A head that was solved for, which alone tells classes: the bare encoder has none."""
    model, tokenizer = load_encoder(resolve_model(str(recipe.model.name)))
    features = EncoderFeatures(model, normalize=True)
    classes = classes_of_run(recipe, folder)

    def classify(text: str) -> tuple[str, str]:
        record = Record(client="", text=text)
        ((ids, _),) = encode_classify([record], tokenizer, max_length=recipe.data.max_length, classes=classes)
        row = torch.from_numpy(ids)[None].long()
        x = features.rows(row, torch.ones_like(row)).double()
        scores = (x @ head["head.weight"].double().T + head["head.bias"].double())[0]
        return "(it has no head)", f"{classes[int(scores.argmax())]} (scores {', '.join(f'{s:.2f}' for s in scores)})"

    return Talker(kind="classify", answer=classify)
