"""Loads a recipe's model with its class names and notes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch

from lichen.core.contracts.model import CohortModel
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wrapping import innermost
from lichen.data.sources.cache import keep, key_of
from lichen.data.sources.catalog import resolve_model
from lichen.data.sources.entries import cache_dir
from lichen.fm.local import LocalFM
from lichen.fm.soft_prompt import SoftPrompt
from lichen.models.adapters.ends.end_blocks import note_patched
from lichen.models.adapters.whole_layers import came_with_head, head_layers, lacked_layers, within
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.findings import Findings, Recall, anew
from lichen.models.full import FullCausal, FullClassifier
from lichen.models.loading.load import base_digest, load_encoder
from lichen.models.loading.named_head import base_names, has_named_head, in_base_order
from lichen.models.preference.losses import PreferenceLoss
from lichen.models.preference.model import PreferenceModel
from lichen.recipes.assemble.chat_template import put_template
from lichen.recipes.assemble.model import STUDENT_TOKENIZER, foundation_of, objective_of, scratch_folder, spec_of
from lichen.recipes.rows.prepare import ClientData
from lichen.recipes.schema.recipe import Recipe

__all__ = ["cohort_of", "load_model"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What a recipe trains, at hand.

    Attributes:
        model: The cohort model; None for a student, which is made for its data later.
        foundation: The transformers model under it; None for a student.
        tokenizer: Its tokenizer, or the one that a student's texts need; None for pixels.
        classes: The classes in the order of its logits; none for a language model.
        notes: What a person should know of it, a line each.
    """

    model: CohortModel | None
    foundation: Any
    tokenizer: Any
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def load_model(
    recipe: Recipe,
    labels: Sequence[str],
    clients_data: Sequence[ClientData],
    *,
    reads_text: bool,
    keep_private: bool = True,
) -> LoadedModel:
    """The recipe's model and what belongs to it.

    Args:
        recipe: Of task chat or classify.
        labels: The data's, sorted; none for a language model.
        clients_data: Whose rows a model from nothing may take its words from.
        reads_text: Rows are texts, not numbers.
        keep_private: A model with words of private rows may stay in the cache.

    Raises:
        LichenError: if the model cannot be loaded, the adapter does not fit it, or it knows other classes.
    """
    section, padded, classes, notes = recipe.model, not recipe.engine.packing, tuple(labels), list[str]()
    if section.scratch is not None:
        with ExitStack() as stack:
            away = None if keep_private else stack.enter_context(TemporaryDirectory(prefix="lichen-scratch-"))
            source = scratch_folder(recipe, clients_data, private=None if away is None else Path(away))
            foundation, tokenizer = foundation_of(recipe, source, len(classes))
            put_template(recipe, tokenizer, say=notes.append)
    elif section.name is not None and recipe.writes:
        foundation, tokenizer = foundation_of(recipe, resolve_model(section.name), 0)
        put_template(recipe, tokenizer, say=notes.append)
    elif section.name is not None:
        foundation, tokenizer, classes, notes = _classifier(recipe, resolve_model(section.name), labels)
    elif not reads_text:
        return LoadedModel(model=None, foundation=None, tokenizer=None, classes=classes)
    else:
        tokenizer = load_encoder(resolve_model(STUDENT_TOKENIZER))[1]
        return LoadedModel(model=None, foundation=None, tokenizer=tokenizer, classes=classes)
    if recipe.offsite is not None and recipe.offsite.realign is not None:
        note_patched(foundation)
    recall = remembered if keep_private or section.scratch is None else anew
    model = cohort_of(recipe, foundation, tokenizer, classes, padded=padded, recall=recall)
    notes += _notes(recipe, foundation, model)
    return LoadedModel(model=model, foundation=foundation, tokenizer=tokenizer, classes=classes, notes=tuple(notes))


def _classifier(
    recipe: Recipe, source: str | Path, labels: Sequence[str]
) -> tuple[Any, Any, tuple[str, ...], list[str]]:
    """``(model, tokenizer, classes, notes)``: with the base's own head where it has one whose classes have names."""
    if recipe.model.head != "base" or recipe.model.random or not recipe.classifies:
        return *foundation_of(recipe, source, len(labels), anew=True), tuple(labels), []
    names, notes = base_names(source), list[str]()
    if names:
        model, tokenizer = foundation_of(recipe, source, len(names))
        if has_named_head(model):
            classes, loose = in_base_order(labels, names)
            notes.append(f"the head of {recipe.model.name} is kept, with its classes: {', '.join(classes)}")
            if loose:
                notes.append(f"taken for the base's classes in spite of case or blanks: {', '.join(loose)}")
            return model, tokenizer, classes, notes
        if len(names) == len(labels) and not came_with_head(model):
            return model, tokenizer, tuple(labels), notes
    model, tokenizer = foundation_of(recipe, source, len(labels), anew=True)
    if came_with_head(model):
        notes.append(
            f"the head of {recipe.model.name} does not name its classes, and is drawn anew; to keep it, name each one "
            "in id2label of the base's config.json"
        )
    return model, tokenizer, tuple(labels), notes


def cohort_of(
    recipe: Recipe, foundation: Any, tokenizer: Any, classes: Sequence[str], *, padded: bool, recall: Recall
) -> CohortModel:
    """The model of C clients around a loaded one.

    Args:
        recipe: The recipe.
        foundation: The frozen transformers model.
        tokenizer: Its tokenizer.
        classes: In the order of its logits; none for a language model.
        padded: Rows are not packed.
        recall: What was found of the model before.

    Raises:
        LichenError: if the adapter does not fit it.
    """
    section = recipe.model
    name = section.name or recipe.name
    if recipe.method.asks_only:
        words = section.adapter.start or str(tokenizer.eos_token)
        fm = LocalFM(foundation, tokenizer, name=name, positions=section.adapter.num_virtual_tokens, start=words)
        return SoftPrompt(fm, seed=derive(recipe.seed, "projection"), size=recipe.optimizer.dimensions)
    if section.adapter.facts.whole:
        # Where all begin is not always sent, and must then be agreed on.
        base = base_digest(foundation) if recipe.method.agreed_start else None
        exclude = section.adapter.exclude
        if recipe.writes:
            return preferring(recipe, FullCausal(foundation, name=name, exclude=exclude, base=base))
        objective = objective_of(recipe, classes)
        return FullClassifier(foundation, name=name, exclude=exclude, base=base, objective=objective)
    spec = spec_of(recipe, foundation)
    model: CausalCohort | ClassifierCohort
    if recipe.writes:
        model = CausalCohort(foundation, adapter=spec, name=name, reference=padded, recall=recall)
    else:
        objective = objective_of(recipe, classes)
        model = ClassifierCohort(
            foundation, adapter=spec, name=name, reference=padded, objective=objective, recall=recall
        )
    model = model.checkpointed() if recipe.engine.gradient_checkpointing else model
    return preferring(recipe, model)


def preferring(recipe: Recipe, model: CausalCohort | ClassifierCohort | FullCausal) -> CohortModel:
    """The model with a loss of preferences around it, where the task has one."""
    if not recipe.prefers or isinstance(model, ClassifierCohort):
        return model
    config = recipe.preference
    loss = PreferenceLoss(
        config.kind,
        beta=config.sharpness,
        gamma=config.gamma,
        good_weight=config.good_weight,
        bad_weight=config.bad_weight,
    )
    return PreferenceModel(model, loss, rated=recipe.rated)


def remembered(facts: tuple[object, ...], find: Callable[[], Findings]) -> Findings:
    """What was found of a model before, from the cache folder; else found now, and kept there."""
    if not facts:
        return find()

    def write(found: Findings) -> Tree:
        return {"findings": torch.frombuffer(bytearray(json.dumps(asdict(found)).encode()), dtype=torch.uint8)}

    def read(tree: Tree) -> Findings:
        return Findings(**json.loads(tree["findings"].numpy().tobytes()))

    return keep(key_of("findings", *facts), find, write=write, read=read, folder=cache_dir() / "findings")


def _notes(recipe: Recipe, model: Any, cohort: object) -> list[str]:
    """What a person should know of the model: layers that its files lack, and clients with calls of their own."""
    cohort = innermost(cohort)
    if not isinstance(cohort, CausalCohort | ClassifierCohort):
        return []
    notes: list[str] = []
    named, head = recipe.model.adapter.modules_to_save, head_layers(model)
    if lacked := [name for name in lacked_layers(model) if not within(name, head)]:
        notes.append(
            f"the files of {recipe.model.name} lack {', '.join(lacked)}: drawn from the seed, trained like the head "
            "and saved with the adapter"
        )
    if more := [name for name in cohort.wrapped.heads if named and not within(name, (*named, *lacked))]:
        notes.append(f"trained whole beside modules_to_save, as PEFT does in every classifier: {', '.join(more)}")
    if cohort.alone is not None and recipe.engine.packing:
        notes.append(f"each client gets a call of its own, because of {cohort.alone}")
    return notes
