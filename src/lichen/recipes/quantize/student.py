"""Exports a run's student as a folder that plain torch loads, in fewer bits where a gate lets it pass.

Each draft is read back from the disk, put back into the student's own tensors and scored by the run's own metric.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from safetensors.torch import load_file, save_file

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.sources.catalog import resolve_model
from lichen.models.students.plain import Part, parts_of, to_plain, to_student
from lichen.models.students.rounded import ROUNDED, StudentBits, restore_state, round_state
from lichen.present.units import score_text
from lichen.recipes.artifacts.model_card import write_card
from lichen.recipes.artifacts.own_model import own_model, own_path
from lichen.recipes.artifacts.use.export import require_empty
from lichen.recipes.artifacts.use.finished import load_finished, student_config
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.assemble.experiment import metric_of, values_N
from lichen.recipes.quantize.placing import draft_for, place_draft
from lichen.recipes.quantize.rows import open_rows
from lichen.recipes.quantize.student_card import StudentFacts, use_text
from lichen.recipes.rows.prepare import is_private
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage
from lichen.recipes.tasks.adapt import score_on
from lichen.tasks.registry import task_of
from lichen.tasks.task import Metric

__all__ = ["ExportedStudent", "export_student"]

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StudentAttempt:
    """One way to write its numbers that was tried.

    Attributes:
        name: ``f16`` or ``int8``.
        size_bytes: Of the weights.
        value: The run's metric on validation rows, the mean over clients.
        agreement: Share of validation rows that are given the class that the unrounded student gives; None where rows
            have no classes.
        fault: What speaks against it; empty where it passes.
    """

    name: StudentBits
    size_bytes: int
    value: float
    agreement: float | None
    fault: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedStudent:
    """What was written.

    Attributes:
        path: The folder.
        metric: The run's.
        before: The student's value, not rounded; None where nothing was rounded.
        attempts: In the order in which they were tried; the last one passed.
    """

    path: Path
    metric: str
    before: float | None
    attempts: tuple[StudentAttempt, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A finished run's student.

    Attributes:
        recipe: The run's.
        tree: Its tensors.
        parts: The same in both forms.
        facts: What its folder says of it.
    """

    recipe: Recipe
    tree: Tree
    parts: tuple[Part, ...]
    facts: StudentFacts


def export_student(
    folder: Path | str,
    *,
    bits: StudentBits | Literal["auto"] = "f32",
    gate: float,
    out: Path | str | None = None,
    client: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ExportedStudent:
    """Write a run's student as safetensors, a configuration and a card with the code that loads it.

    Args:
        folder: The run folder; that of several stages means the last one.
        bits: ``f32`` as it is; ``f16`` or ``int8`` rounded; ``auto`` for the smallest that passes the gate, which may
            be ``f32``.
        gate: Share by which the run's metric may get worse on the clients' validation rows.
        out: Where to; by default ``folder/student``, or ``folder/student-BITS``.
        client: The student of this client's own; held against its own rows, and private.
        say: Called with lines of progress.

    Returns:
        Where it lies, and what was measured.

    Raises:
        LichenError: if the run has no such student, there are no rows to score or a client's were withdrawn, or the
            gate refuses; nothing is written then.
    """
    folder, given = last_stage(folder), None if out is None else Path(out)
    if given is not None:
        require_empty(given)
    if bits != "f32":
        refuse_withdrawn(folder, fix="export before the purge, to --out elsewhere; --bits f32 reads no rows")
    student = _open(folder, client)
    formats: tuple[StudentBits, ...] = (*ROUNDED, "f32") if bits == "auto" else (bits,)
    metric = metric_of(student.recipe)
    attempts: list[StudentAttempt] = []
    before: float | None = None
    scorer = None if formats == ("f32",) else _scorer(folder, student, client)
    if scorer is not None:
        say("scoring the student")
        before, choices = scorer(student.tree)
    for one in formats:
        target = given or _default(folder, client, one)
        with draft_for(target) as aside:
            draft = Path(aside) / "student"
            _write(draft, student, one)
            measured = ""
            if one != "f32" and scorer is not None and before is not None:
                say(f"reading {one} back")
                attempts.append(_tried(draft, student, one, scorer, before, choices, gate, metric))
                if attempts[-1].fault:
                    continue
                measured = _measured(attempts[-1], before, metric)
            use = use_text(student.facts, one, measured)
            kind = student.facts.kind
            write_card(folder, draft, student.recipe, None, called=target.name, student=kind, use=use)
            place_draft(draft, target, shared=client is None)
            return ExportedStudent(path=target, metric=metric.name, before=before, attempts=tuple(attempts))
    fault = attempts[-1]
    same = "" if fault.agreement is None else f"; {100 * fault.agreement:.1f} % of rows are given the same class"
    raise LichenError(
        f"{fault.name} does not pass the gate of {100 * gate:g} %: {fault.fault}{same}",
        where=f"--bits {bits}",
        fix="use --bits auto for the smallest that passes, or raise --gate if you accept that",
    )


def _open(folder: Path, client: str | None) -> Student:
    recipe, flat = load_finished(folder)
    config = recipe.model.student
    if config is None:
        several = "its clients have several students" if recipe.model.students else "this run trained no student"
        fix = "they lie in model/, a folder each" if recipe.model.students else "use --merge or --gguf, or the adapter"
        raise LichenError(several, where=f"--student {folder}", fix=fix)
    shared = Shared.of_flat(flat)
    tree = shared.trainable
    if client is not None:
        tree = {**tree, **own_model(folder, recipe, shared, client).trainable}
    about = student_config(folder)
    shapes = {name: tuple(x.shape) for name, x in tree.items()}
    row = tuple(int(size) for size in about.get("row_shape") or ())
    if config.kind == "image-mlp":
        row = row or (shapes["layer0.weight"][1],)
    elif config.kind == "image-cnn" and not row:
        what = "does not say how large its pictures are: it is from an older version"
        raise LichenError(what, where=str(folder / "model" / CONFIG), fix="run the recipe again")
    parts = parts_of(config.kind, shapes, row)
    facts = StudentFacts(
        kind=config.kind,
        shapes=shapes,
        row=row,
        classes=tuple(str(name) for name in about["classes"]),
        names_classes=_names_classes(recipe),
        tokenizer=about.get("tokenizer"),
        words=tuple(about["vocabulary"]) or None,
        max_length=recipe.data.max_length,
        scaled=not is_private(recipe),
    )
    return Student(recipe=recipe, tree=tree, parts=parts, facts=facts)


def _names_classes(recipe: Recipe) -> bool:
    labels = task_of(recipe.task).labels
    return labels is not None and labels.classes


def _default(folder: Path, client: str | None, bits: StudentBits) -> Path:
    name = "student" if bits == "f32" else f"student-{bits}"
    return folder / name if client is None else own_path(folder, client, f"-{name}")


def _measured(attempt: StudentAttempt, before: float, metric: Metric) -> str:
    """What rounding cost, for the card."""
    same = "" if attempt.agreement is None else f", and {100 * attempt.agreement:.1f} % of the rows have the same class"
    return (
        f"On the clients' validation rows `{metric.name}` is {score_text(attempt.value)} so, and {score_text(before)} "
        f"in float32{same}; the results above are those in float32."
    )


def _write(draft: Path, student: Student, bits: StudentBits) -> None:
    """The whole folder but for its card."""
    draft.mkdir()
    facts, about = student.facts, {"format": "pt"}
    save_file(round_state(to_plain(student.parts, student.tree), bits), draft / WEIGHTS, metadata=about)
    config: dict[str, Any] = {
        "architecture": facts.kind,
        "row_shape": list(facts.row) or None,
        "classes" if facts.names_classes else "outputs": list(facts.classes),
        "bits": bits,
    }
    if facts.tokenizer is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(resolve_model(facts.tokenizer))
        tokenizer.backend_tokenizer.save(str(draft / TOKENIZER))
        config |= {"tokenizer": TOKENIZER, "max_length": facts.max_length}
        if facts.words is not None:
            unknown = tokenizer.unk_token_id  # the first word stands for others where there is none
            config |= {"vocabulary": list(facts.words)}
            config["unknown"] = 0 if unknown is None else facts.words.index(int(unknown))
    write_atomic(draft / CONFIG, (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode(), shared=True)


Scorer = Callable[[Tree], tuple[float, torch.Tensor | None]]
"""From a student's tensors to the mean of the metric over clients and each row's class."""


def _scorer(folder: Path, student: Student, client: str | None) -> Scorer:
    """Scores on the clients' validation rows; the data must be those of the run.

    Raises:
        LichenError: if there are none, or they are others.
    """
    loaded, valid = open_rows(folder, client)
    recipe, experiment = loaded.experiment.recipe, loaded.experiment
    shards = [shard for shard in valid if shard.size]
    if not shards:
        what = "the run has no validation rows to hold a rounded student against"
        raise LichenError(what, where="--bits", fix="run it with data.valid above 0, or leave it out")

    def scored(tree: Tree) -> tuple[float, torch.Tensor | None]:
        value_N = values_N(recipe, score_on(experiment, shards, Shared(tree), folder))
        value = float(value_N.nanmean())
        if not student.facts.names_classes:
            return value, None
        tree_1, source = trees.broadcast(tree, 1), experiment.evaluating(shards)
        choices = []
        for place in range(len(shards)):
            for batch in source.batches((place,), 0):
                with torch.no_grad():
                    logits_BK = experiment.model.logits(tree_1, {}, batch)[0]
                choices.append(logits_BK.argmax(-1)[batch["index_CB"][0] >= 0])
        return value, torch.cat(choices)

    return scored


def _tried(
    draft: Path,
    student: Student,
    bits: StudentBits,
    scorer: Scorer,
    before: float,
    choices: torch.Tensor | None,
    gate: float,
    metric: Metric,
) -> StudentAttempt:
    after, found = scorer(to_student(student.parts, restore_state(load_file(draft / WEIGHTS))))
    same = None if choices is None or found is None else float((choices == found).double().mean())
    return StudentAttempt(
        name=bits,
        size_bytes=(draft / WEIGHTS).stat().st_size,
        value=after,
        agreement=same,
        fault=fault_of(metric, before, after, gate),
    )


def fault_of(metric: Metric, before: float, after: float, gate: float) -> str:
    """What speaks against a rounded student; empty where it passes.

    Args:
        metric: The run's.
        before: Its mean over clients, not rounded.
        after: The rounded one's.
        gate: Share of the former by which it may get worse.

    >>> from lichen.tasks.classify import ACCURACY
    >>> fault_of(ACCURACY, 0.8, 0.795, 0.01)
    ''
    >>> fault_of(ACCURACY, 0.8, 0.784, 0.01)
    "accuracy on the clients' validation rows goes from 0.8 to 0.784, worse by 2 % and not 1 % at most"
    """
    worse = before - after if metric.higher_is_better else after - before
    if worse <= abs(before) * gate + 1e-12:
        return ""
    share = 100 * worse / abs(before) if before and math.isfinite(worse) else math.inf
    return (
        f"{metric.name} on the clients' validation rows goes from {before:.4g} to {after:.4g}, worse by {share:.3g} % "
        f"and not {100 * gate:g} % at most"
    )
