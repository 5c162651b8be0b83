"""Uses a finished run: generate beside the base model, export, merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch

from lichen.clients.personal.own_model import OwnModel, folder_name
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder
from lichen.core.files.manifest import MANIFEST, check
from lichen.core.private import make_folders, share
from lichen.core.store import load_tree, save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import TextShard
from lichen.data.batches.text import encode_classify
from lichen.data.sources.catalog import resolve_model
from lichen.data.sources.record import Record
from lichen.models.features import EncoderFeatures
from lichen.models.loading.load import load_encoder
from lichen.models.loading.named_head import has_named_head
from lichen.models.peft.merge import attach
from lichen.models.peft.merge import merge as merged_model
from lichen.models.peft.own import write_own
from lichen.models.whole import filled
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.model_card import write_card
from lichen.recipes.artifacts.own_model import own_model
from lichen.recipes.artifacts.sampling import Sampling, ask_ids, end_ids, generate_text
from lichen.recipes.assemble.bases.in_force import require_model, with_base_in_force
from lichen.recipes.assemble.chat_template import put_template
from lichen.recipes.assemble.class_names import class_names
from lichen.recipes.assemble.model import SCRATCH, described_base, foundation_of, make_student, scratch_folder, spec_of
from lichen.recipes.rows.prepare import classes_of, gather, split_clients
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage
from lichen.tasks.registry import task_of

__all__ = [
    "Talker",
    "export",
    "load_finished",
    "load_foundation",
    "merge_learned",
    "open_models",
    "require_empty",
    "talk",
    "talk_oneshot",
    "talk_rounds",
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Talker:
    """A run to talk to.

    Attributes:
        kind: Whether it writes or classifies.
        answer: From a text to (the bare model's answer, the run's answer).
        settings: How it is asked, in words; empty for a classifier.
    """

    kind: Literal["chat", "classify"]
    answer: Callable[[str], tuple[str, str]]
    settings: str = ""


_STUDENT = "use --student, which writes a folder that torch loads"


def load_finished(folder: Path) -> tuple[Recipe, Tree]:
    """The recipe of a finished run, and what it learned; refused if it is not finished, or damaged."""
    read_summary(folder)  # says so where the run is not finished
    _check(folder)
    require_model(folder)
    tree, _ = load_tree(folder / "state" / "final.safetensors")
    return with_base_in_force(recipe_of(folder), folder), tree


def _check(folder: Path) -> None:
    check(folder, MANIFEST, fix=f"make it again: lichen run --resume {folder}")


def _classes(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """The run's classes by its own folder; of a folder that is older than their file, by its data."""
    if recipe.writes:
        return ()
    return class_names(folder) or classes_of(recipe, gather(recipe))


def load_foundation(recipe: Recipe, folder: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """``(model, tokenizer, classes)`` as the run loaded them; nothing of its data is read."""
    if recipe.method.asks_only:
        raise LichenError(
            "a prompt found by asking lies outside the model", where=recipe.name, fix="its tensors lie in model/"
        )
    scratch = recipe.model.scratch is not None
    if (recipe.model.name is None and not scratch) or not task_of(recipe.task).procedure.rounds:
        raise LichenError(
            f"a run of task {recipe.task} on {recipe.model.name or 'a student'} has no merged transformers model",
            where=recipe.name,
            fix=_STUDENT if recipe.model.student is not None else "its tensors lie in the run's model/ as safetensors",
        )
    classes = _classes(recipe, folder)
    if scratch:
        own_base = folder / SCRATCH
        source: str | Path = (
            own_base if own_base.is_dir() else scratch_folder(recipe, split_clients(recipe, gather(recipe)))
        )
    else:
        source = resolve_model(str(recipe.model.name))
    model, tokenizer = foundation_of(recipe, source, len(classes))
    put_template(recipe, tokenizer, run=folder)
    return model, tokenizer, classes


def open_models(folder: Path) -> tuple[Recipe, Any, Any, Any]:
    """``(recipe, bare model, the run's model, tokenizer)`` of a finished run over a foundation model.

    Raises:
        LichenError: if the run is not finished, is damaged, or has no foundation model.
    """
    recipe, tree = load_finished(folder)
    if recipe.model.student is not None:
        raise LichenError("has no foundation model", where=str(folder), fix="name a run that adapts one")
    model, tokenizer, _ = load_foundation(recipe, folder)
    return recipe, model, _attached(recipe, model, tree), tokenizer


def export(
    folder: Path | str, *, merge: bool = False, out: Path | str | None = None, client: str | None = None
) -> Path:
    """Write the run's model: a plain transformers folder with everything merged, or the adapter as it is.

    Args:
        folder: The run folder; that of several stages means the last one.
        merge: Merge into the base's weights; else it is the adapter.
        out: Where to; by default ``folder/merged``, and for the adapter where it lies.
        client: The model of this client's own; by default the one that all share. It is private, and so is what is
            written: by default in ``folder/own/CLIENT``, or ``folder/own/CLIENT-merged``.

    Returns:
        The folder that loads elsewhere.

    Raises:
        LichenError: if the run is not finished, or has nothing of the kind.
    """
    folder, out = last_stage(folder), None if out is None else Path(out)
    if not merge and client is None:
        return _adapter(folder, out)
    recipe, tree = load_finished(folder)
    own = None if client is None else own_model(folder, recipe, Shared.of_flat(tree), client)
    if own is not None and recipe.model.student is not None:
        return _own_student(folder, {**tree, **own.trainable}, _own_folder(folder, client), out, merge=merge)
    model, tokenizer, classes = load_foundation(recipe, folder)
    target = out or folder / "merged"
    if own is not None:
        target = out or _own_folder(folder, client, "-merged" if merge else "")
        if not merge:
            return _own_adapter(recipe, model, tokenizer, own, Shared.of_flat(tree).patch, target, given=out)
        if own.other:
            what = "two adapters whose weight differs by row cannot be merged into one model's weights"
            raise LichenError(what, where="--merge", fix="leave it out, and load both adapters")
        tree = {**tree, **own.trainable}
    whole = merge_learned(recipe, model, tree)
    if classes:
        whole.config.id2label = dict(enumerate(classes))
        whole.config.label2id = {name: i for i, name in enumerate(classes)}
    if out is not None:
        require_empty(out)
    with whole_folder(target) as draft:
        whole.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_card(folder, draft, recipe, tokenizer, called=target.name)
        share(draft)
    return target


def merge_learned(recipe: Recipe, model: Any, tree: Tree) -> Any:
    """The model with what was learned in its weights."""
    if recipe.model.adapter.facts.whole:
        return filled(model, tree)
    shared = Shared.of_flat(tree)
    return merged_model(model, shared.trainable, shared.patch, spec=spec_of(recipe, model))


def _own_folder(folder: Path, client: str | None, more: str = "") -> Path:
    """Where a client's own model goes, if nobody says where."""
    return folder / "own" / f"{folder_name(str(client))}{more}"


def _own_student(folder: Path, tree: Tree, target: Path, out: Path | None, *, merge: bool) -> Path:
    """A client's own student, in the form of the run's ``model/``."""
    if merge:
        raise LichenError("a student is whole as it is", where="--merge", fix="leave it out")
    if out is not None:
        require_empty(out)
    make_folders((out or target).parent)
    with whole_folder(out or target, shared=False) as draft:
        shutil.copytree(folder / "model", draft, dirs_exist_ok=True)
        save_tree(draft / "model.safetensors", tree)
    return out or target


def _own_adapter(
    recipe: Recipe, model: Any, tokenizer: Any, own: OwnModel, patch: Tree, target: Path, *, given: Path | None
) -> Path:
    """A client's own adapter in PEFT's format; of two that are weighed row by row both, and what weighs them."""
    if recipe.model.adapter.facts.whole:
        raise LichenError("its own models are no adapters", where="--client", fix="use --merge")
    if given is not None:
        require_empty(given)
    make_folders(target.parent)
    with whole_folder(target, shared=False) as draft:
        spec, about, task = spec_of(recipe, model), described_base(recipe, model), task_of(recipe.task).peft
        for part in write_own(draft, own, spec=spec, base_name=about, task=task, patch=patch):
            tokenizer.save_pretrained(part)
    return target


def _adapter(folder: Path, out: Path | None) -> Path:
    """The folder of the run's adapter, or a copy of it."""
    own = folder / "adapter"
    if not own.is_dir():
        read_summary(folder)  # says so where it is no run, or not finished
        require_model(folder)
        student = (folder / "recipe.yaml").is_file() and recipe_of(folder).model.student is not None
        raise LichenError("has no adapter", where=str(folder), fix=_STUDENT if student else "use --merge")
    _check(folder)
    if out is None:
        return own
    require_empty(out)
    with whole_folder(out) as draft:
        shutil.copytree(own, draft, dirs_exist_ok=True)
        share(draft)
    return out


def require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LichenError("is not empty", where=f"--out {out}", fix="choose another folder")


def _attached(recipe: Recipe, model: Any, tree: Tree) -> Any:
    if recipe.model.adapter.facts.whole:
        return filled(model, tree)
    shared = Shared.of_flat(tree)
    return attach(model, shared.trainable, shared.patch, spec=spec_of(recipe, model))


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
    joined = _attached(recipe, model, tree)
    if recipe.writes:

        def answer(text: str) -> tuple[str, str]:
            bare, mine = (_write(recipe, one, tokenizer, text, sampling) for one in (model, joined))
            return bare, mine

        return Talker(kind="chat", answer=answer, settings=_settings(recipe, sampling))

    own = recipe.model.head == "base" and has_named_head(model)
    describe = _describing(recipe, classes)

    def classify(text: str) -> tuple[str, str]:
        ids = tokenizer(text, truncation=True, max_length=recipe.data.max_length, return_tensors="pt")
        with torch.no_grad():
            bare = describe(model(**ids).logits[0]) if own else "(its head is not trained)"
            return bare, describe(joined(**ids).logits[0])

    return Talker(kind="classify", answer=classify)


def _settings(recipe: Recipe, sampling: Sampling) -> str:
    if not {"chat", "messages"} & {recipe.data.form}:
        return f"{sampling}; form {recipe.data.form}"
    system = recipe.data.system
    named = "the template's own" if system is None else repr(system) if system else "none"
    return f"{sampling}; chat template, system message: {named}"


def _describing(recipe: Recipe, classes: Sequence[str]) -> Callable[[torch.Tensor], str]:
    """What puts a row's outputs into words."""
    labels = task_of(recipe.task).labels
    assert labels is not None
    return partial(labels.describe, names=classes)


def _write(recipe: Recipe, model: Any, tokenizer: Any, text: str, sampling: Sampling | None = None) -> str:
    """One answer in the form the run was trained in."""
    form = recipe.data.form
    ids = ask_ids(tokenizer, form, text)
    return generate_text(model, tokenizer, ids, sampling or Sampling(), ends=end_ids(model, tokenizer, form))


def _talk_student(recipe: Recipe, tree: Tree, folder: Path) -> Talker:
    """A small text model beside nothing: what taught it is not part of the run.

    Raises:
        LichenError: if it reads pictures, which cannot be typed.
    """
    file = folder / "model" / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        named, numbers = about.get("tokenizer"), [int(token) for token in about.get("vocabulary") or ()]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise LichenError("does not describe a student", where=str(file), fix="run the recipe again") from None
    if named is None:
        raise LichenError("its model reads pictures, which cannot be typed", where=str(folder), fix="see its summary")
    classes = class_names(folder)
    describe = _describing(recipe, classes)
    _, tokenizer = load_encoder(resolve_model(str(named)))
    words = {token: i for i, token in enumerate(numbers or range(len(tokenizer)))}
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
    classes = _classes(recipe, folder)

    def classify(text: str) -> tuple[str, str]:
        record = Record(client="", text=text)
        ((ids, _),) = encode_classify([record], tokenizer, max_length=recipe.data.max_length, classes=classes)
        row = torch.from_numpy(ids)[None].long()
        x = features.rows(row, torch.ones_like(row)).double()
        scores = (x @ head["head.weight"].double().T + head["head.bias"].double())[0]
        return "(it has no head)", f"{classes[int(scores.argmax())]} (scores {', '.join(f'{s:.2f}' for s in scores)})"

    return Talker(kind="classify", answer=classify)
