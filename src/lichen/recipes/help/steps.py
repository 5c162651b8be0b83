"""Runs the help of a foundation model before the federation, and counts its cost.

Each kind of help is a step from one experiment to the next, so that they go together: a model writes rows, a teacher
answers public texts, the server makes a first student of both, and clients label rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch

from lichen.algorithms.scores import score
from lichen.clients.distillation.distill import pre_distil
from lichen.clients.distillation.selective import predicted_labels
from lichen.clients.statistics.scale import ScaleLosses, best_scale
from lichen.clients.statistics.sufficient import Statistics
from lichen.core.collecting.collect import collect
from lichen.core.contracts.client import ClientTask, Source
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.augment import TextViews
from lichen.data.batches.augment_images import ImageViews
from lichen.data.batches.scarce_labels import ScarceLabels
from lichen.data.batches.shards import ArrayShard, Shard, TextShard
from lichen.data.sources.records import Record
from lichen.engines.local import LocalEngine
from lichen.models.loading.initial import head_features, head_of, head_start
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import Experiment, values_N
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.clients import Auxiliary
from lichen.recipes.assemble.sides.limits import counting
from lichen.recipes.help.foundation_models import FMRegistry, private_texts
from lichen.recipes.help.layerwise import layer_distillation
from lichen.recipes.help.public_labels import public_labels
from lichen.recipes.help.sequence_teacher import deal_out_texts, teacher_texts
from lichen.recipes.help.synthetic import deal_out, write_synthetic
from lichen.recipes.help.teacher import Teachers, ask, classes_in_answer, with_settings
from lichen.recipes.rows.prepare import first_of
from lichen.recipes.rows.public import unlabelled_of
from lichen.server.lda import Lda
from lichen.server.ridge import Ridge

__all__ = ["apply_help", "with_answer_index"]

Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HelpResult:
    """What help has made of an experiment.

    Attributes:
        experiment: What the federated column works with.
        rows: The clients' rows with a label, synthetic ones among them.
        columns: Scored models that are not the federation's, such as the teacher itself.
        extra: Numbers to tell.
        bytes_up: Bytes to the server that are no round's.
        bytes_down: Bytes from it.
    """

    experiment: Experiment
    rows: tuple[tuple[Record, ...], ...]
    columns: dict[str, Column] = field(default_factory=dict)
    extra: dict[str, float | str | None] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    def plus(self, up: int, down: int, numbers: Mapping[str, float | str | None]) -> HelpResult:
        """With so many bytes more, and numbers to tell."""
        return replace(
            self, bytes_up=self.bytes_up + up, bytes_down=self.bytes_down + down, extra={**self.extra, **numbers}
        )


def apply_help(loaded: LoadedExperiment, folder: RunFolder, say: Say) -> HelpResult:
    """All the help a recipe asks for, and a head in closed form."""
    recipe = loaded.experiment.recipe
    rows = tuple(client_data.train for client_data in loaded.clients_data)
    result = HelpResult(experiment=loaded.experiment, rows=rows)
    foundation_models = FMRegistry(recipe=recipe, say=say, private=lambda: private_texts(loaded.clients_data))
    if recipe.teacher is not None and recipe.writes:
        result = with_teacher_texts(loaded, result, foundation_models, folder, say)
        return replace(result, extra={**result.extra, **foundation_models.summary()})
    by_model = recipe.teacher is not None and recipe.teacher.kind != "labels"
    teachers = Teachers(loaded, foundation_models, say) if by_model else None
    if recipe.synthetic is not None:
        result = with_synthetic(loaded, result, foundation_models, folder, say, teachers)
    if teachers is not None:
        result = with_teacher_answers(loaded, result, teachers, folder, say)
    elif recipe.teacher is not None:
        result = with_public_labels(loaded, result, folder, say)
    if recipe.model.head in ("ridge", "lda"):
        result = with_closed_form_head(loaded, result, folder, say)
    if recipe.semi is not None:
        result = with_unlabelled(loaded, result, teachers if recipe.semi.teacher_rounds else None, folder)
    if recipe.has_help:
        numbers = foundation_models.summary()
        if recipe.teacher is not None and recipe.teacher.kind == "head":
            numbers["fm.asked"] = float(numbers["fm.asked"] or 0.0) + len(loaded.public_split.unlabelled)
        result = replace(result, extra={**result.extra, **numbers})
    return result


def with_synthetic(
    loaded: LoadedExperiment,
    result: HelpResult,
    foundation_models: FMRegistry,
    folder: RunFolder,
    say: Say,
    teachers: Teachers | None,
) -> HelpResult:
    """Rows that a foundation model wrote: trained on at the server, at the clients beside their own, or at both."""
    recipe, experiment = loaded.experiment.recipe, result.experiment
    section = recipe.synthetic
    assert section is not None
    synthetic = write_synthetic(
        loaded, foundation_models, folder, say, None if teachers is None else lambda: teachers.of("synthetic")
    )
    result = result.plus(synthetic.bytes_up, synthetic.bytes_down, synthetic.extra)
    if section.at != "clients":
        shard = loaded.make(synthetic.pool.records())
        experiment = _at_server(experiment, "synthetic", shard, {}, section.server_steps, folder, say)
    if section.at != "server":
        rows, sent = deal_out(loaded, synthetic.pool)
        experiment, result = experiment.with_rows(train=tuple(map(loaded.make, rows))), replace(result, rows=rows)
        more = float(sum(map(len, rows)) - sum(loaded.experiment.server.roster.rows("train")))
        result = result.plus(0, sent, {"synthetic.rows": more})
    return replace(result, experiment=experiment)


def with_teacher_texts(
    loaded: LoadedExperiment, result: HelpResult, foundation_models: FMRegistry, folder: RunFolder, say: Say
) -> HelpResult:
    """What a teacher wrote after public prompts: rows for the server, for the clients, or for both."""
    recipe, experiment = loaded.experiment.recipe, result.experiment
    plan = recipe.teacher
    assert plan is not None
    rows, extra = teacher_texts(loaded, foundation_models, folder, say)
    result = result.plus(0, 0, extra)
    if plan.at != "clients":
        experiment = _at_server(experiment, "told", loaded.make(rows), {}, plan.server_steps, folder, say)
    if plan.at != "server":
        everyones, sent = deal_out_texts(loaded, rows)
        experiment = experiment.with_rows(train=tuple(map(loaded.make, everyones)))
        result = replace(result, rows=everyones).plus(0, sent, {"public_texts.bytes": float(sent)})
    return replace(result, experiment=experiment)


def with_teacher_answers(
    loaded: LoadedExperiment, result: HelpResult, teachers: Teachers, folder: RunFolder, say: Say
) -> HelpResult:
    """The teacher answers the public texts once; the server learns from them, or they ride along in every job."""
    recipe, classes, public_split = loaded.experiment.recipe, loaded.classes, loaded.public_split
    plan = recipe.teacher
    assert plan is not None
    assert loaded.public is not None
    texts = [record.text for record in public_split.unlabelled]

    def answers() -> Tree:
        say(f"the teacher answers {len(texts):,} texts")
        found, up, down = ask(teachers.of("public"), texts, classes, classes_in_answer(recipe, classes), folder)
        return {**found, "bytes_up": torch.tensor(up), "bytes_down": torch.tensor(down)}

    def judged() -> torch.Tensor:
        index = {c: i for i, c in enumerate(classes)}
        out = torch.zeros(len(loaded.clients_data), len(classes), len(classes), dtype=torch.float64)
        teacher = teachers.of("private", measured=True)
        first = first_of([client_data.test for client_data in loaded.clients_data])
        for i in sorted(set(first)):
            test = loaded.clients_data[i].test
            for record, answer in zip(test, teacher.answer([r.text for r in test]), strict=True):
                out[i, index[str(record.label)], index[answer.label]] += 1
        return out[list(first)]

    got = folder.tree("answers", answers, alone=True)
    up, down = int(got.pop("bytes_up")), int(got.pop("bytes_down"))
    if teachers.measurable:
        metrics = {"confusion": folder.number("teacher", judged)}
        result = replace(
            result, columns={**result.columns, "base": Column(value_N=values_N(recipe, metrics), metrics=metrics)}
        )
    sent = {"answers.bytes_to_teacher": float(down), "answers.bytes_from_teacher": float(up)}
    result = result.plus(up, down, {"answers": float(len(texts)), **sent})
    text_bytes = sum(len(t.encode()) for t in texts)
    result = _with_answers(loaded, result, got, loaded.public, text_bytes, folder, say)
    if plan.select:
        experiment = result.experiment
        judge, teacher_label_M = _judging(loaded, experiment, teachers, folder)
        auxiliary = replace(experiment.clients.auxiliary, judge=judge, teacher_label_M=teacher_label_M)
        result = replace(result, experiment=experiment.with_rows(auxiliary=auxiliary))
    return result


def with_public_labels(loaded: LoadedExperiment, result: HelpResult, folder: RunFolder, say: Say) -> HelpResult:
    """The public labelled rows with their own labels, where a teacher's answers would be; no model is asked."""
    answers, rows, size = public_labels(loaded)
    result = result.plus(0, 0, {"public_labels": float(rows.size)})
    return _with_answers(loaded, result, answers, rows, size, folder, say)


def _with_answers(
    loaded: LoadedExperiment, result: HelpResult, answers: Tree, rows: Shard, size: int, folder: RunFolder, say: Say
) -> HelpResult:
    """Who learns from answered public rows of ``size`` bytes: the server, the clients, or both."""
    plan, experiment = loaded.experiment.recipe.teacher, result.experiment
    assert plan is not None
    got = with_settings(plan, answers)
    public = with_answer_index(rows, np.arange(rows.size))
    if plan.at != "clients":
        more = layer_distillation(loaded) if plan.layers else {}
        experiment = _at_server(experiment, "distilled", public, got, plan.server_steps, folder, say, **more)
    if plan.at != "server":
        # Every client is sent the public texts once.
        sent = size * len(loaded.clients_data)
        result = result.plus(0, sent, {"public_texts.bytes": float(sent)})
        experiment = experiment.with_server(start=experiment.start | Shared(frozen=got), public=public)
    return replace(result, experiment=experiment)


def _judging(
    loaded: LoadedExperiment, experiment: Experiment, teachers: Teachers, folder: RunFolder
) -> tuple[Source, torch.Tensor]:
    """The clients' rows for validation, and what the teacher says of them, on their own machines."""
    rows = [client_data.valid for client_data in loaded.clients_data]
    answers, indices = _own_answers(loaded, "judged", rows, teachers, folder)
    shards = [with_answer_index(shard, place) for shard, place in zip(experiment.clients.valid, indices, strict=True)]
    return experiment.evaluating(shards), predicted_labels(answers)


def _own_answers(
    loaded: LoadedExperiment, name: str, rows: Sequence[Sequence[Record]], teachers: Teachers, folder: RunFolder
) -> tuple[Tree, list[np.ndarray]]:
    """``(answers to the clients' own rows, where each row's lies)``; no byte of it crosses anything."""
    classes, texts = loaded.classes, [record.text for some in rows for record in some]

    def fresh() -> Tree:
        return ask(teachers.of("private"), texts, classes, len(classes), folder)[0] if texts else {}

    answers = folder.tree(name, fresh, alone=True)
    ends = np.cumsum([0, *map(len, rows)])
    return answers, [np.arange(a, b) for a, b in pairwise(ends.tolist())]


def with_closed_form_head(loaded: LoadedExperiment, result: HelpResult, folder: RunFolder, say: Say) -> HelpResult:
    """The classifier's head in closed form, from one message of statistics of each client."""
    recipe, experiment = loaded.experiment.recipe, result.experiment
    features, classes = head_features(experiment.model, experiment.start), len(loaded.classes)
    head, before = head_of(experiment.model, experiment.start), experiment.start.trainable
    biased, width = f"{head}.bias" in before, before[f"{head}.weight"].shape[1]
    if recipe.model.head == "lda" and not biased:
        raise LichenError("the head has no bias, which lda needs", where="model.head", fix="use ridge")

    def solved() -> Tree:
        say("statistics of every client for a head in closed form")
        work, model = Statistics(features, classes=classes, width=width, bits=12, bias=biased), experiment.model
        losses = ScaleLosses(model)
        engine = LocalEngine(
            {
                "statistics": ClientTask(work=work, source=experiment.evaluating(experiment.clients.train)),
                "scale": ClientTask(work=losses, source=experiment.evaluating(experiment.clients.valid)),
            },
            ClientStore(folder.path / "state" / "none"),
            base=model.base,
            device=recipe.model.device,
        )
        rule = Lda(bits=12) if recipe.model.head == "lda" else Ridge(recipe.ridge, bits=12, bias=biased)
        roster = experiment.server.roster
        everyone = tuple(range(len(roster)))
        job = Job(work="statistics", shared=Shared(), version=0, clients=everyone, seed=0, base=model.base)
        total = collect(engine, [job], rule, admission=counting("statistics", work, roster.rows("train"))).total
        solution = rule.close(total, Shared())[0].trainable
        # On rows that are not in the statistics: its own flatter a head, and it would be scaled too far.
        choosing = replace(job, work="scale", shared=head_start(model, experiment.start, solution))
        losses_NS = score(engine, choosing, counting("scale", losses, roster.rows("valid")))[1]["losses"]
        scale = best_scale(losses_NS)
        after = head_start(model, experiment.start, solution, scale=scale).trainable
        changed = {name: x for name, x in after.items() if x is not before[name]}
        sent = {"bytes_up": torch.tensor(engine.bytes_up), "bytes_down": torch.tensor(engine.bytes_down)}
        return {**changed, **sent, "scale": torch.tensor(scale, dtype=torch.float64)}

    got = folder.tree("head", solved, alone=True)
    up, down, scale = int(got.pop("bytes_up")), int(got.pop("bytes_down")), float(got.pop("scale"))
    numbers = {"head.bytes_up": float(up), "head.bytes_down": float(down), "head.scale": scale}
    return replace(result, experiment=experiment.with_server(start=experiment.start | Shared(got))).plus(
        up, down, numbers
    )


def with_unlabelled(
    loaded: LoadedExperiment, result: HelpResult, teachers: Teachers | None, folder: RunFolder
) -> HelpResult:
    """The clients' rows without labels, and how they are looked at."""
    recipe, experiment = loaded.experiment.recipe, result.experiment
    assert recipe.semi is not None
    semifl = recipe.semi.kind == "semifl"
    free: Sequence[Sequence[Record]] = unlabelled_of(loaded.public_split.clients_data)
    known_rows: Sequence[Sequence[Record]] = result.rows
    if semifl:  # its clients have no labels: those that they choose by teach nothing
        free = [
            [*(replace(row, label=None) for row in known), *some] for known, some in zip(known_rows, free, strict=True)
        ]
        known_rows = [()] * len(free)
    # Behind the labelled ones, synthetic rows among them.
    shards = [loaded.make([*known, *some]) for known, some in zip(known_rows, free, strict=True)]
    answers: Tree = {}
    if teachers is not None:
        answers, indices = _own_answers(loaded, "own answers", free, teachers, folder)
        nothing = [np.full(len(known), -1) for known in known_rows]
        shards = [
            with_answer_index(s, np.concatenate([n, p])) for s, n, p in zip(shards, nothing, indices, strict=True)
        ]
    first = loaded.experiment.clients.train[0]
    auxiliary = Auxiliary(
        rows=tuple(shards),
        unlabelled=tuple(map(len, free)),
        views=text_views(loaded) if isinstance(first, TextShard) else picture_views(first),
        answers=answers,
    )
    numbers = float(sum(map(len, free)))
    experiment = experiment.with_rows(auxiliary=auxiliary)
    if semifl:
        source = experiment.training(shards, batch=recipe.federation.batch_size, steps=recipe.federation.local_steps)
        assert isinstance(source, ScarceLabels)
        labelled = loaded.make(loaded.public_split.labelled)
        experiment = experiment.with_rows(auxiliary=replace(auxiliary, source=source))
        experiment = experiment.with_server(labelled=labelled, views=auxiliary.views)
    return replace(result, experiment=experiment).plus(0, 0, {"unlabelled.rows": numbers})


def text_views(loaded: LoadedExperiment) -> TextViews:
    """Views of rows in the tokens of the model, or in the student's own."""
    views = TextViews.of(loaded.tokenizer)
    if loaded.vocabulary is None:
        return views
    words, unknown = loaded.vocabulary.words, loaded.vocabulary.unknown
    special = tuple(sorted({words[t] for t in views.special if t in words} - {unknown}))
    return TextViews(loaded.experiment.server.pad, special=special)


def picture_views(shard: Shard) -> ImageViews:
    """Views of pictures, flat or not."""
    assert isinstance(shard, ArrayShard)
    flat = shard.x.ndim == 2
    return ImageViews(side=round(shard.x.shape[1] ** 0.5) if flat else None)


def _at_server(
    experiment: Experiment, name: str, shard: Shard, answers: Tree, steps: int, folder: RunFolder, say: Say, **more: Any
) -> Experiment:
    """A first student, made at the server before the first round, at the first of the recipe's learning rates.

    ``more`` is for :func:`lichen.clients.distillation.distill.pre_distil`, in place of what is given here.
    """
    recipe = experiment.recipe

    def made() -> Tree:
        say(f"the server trains {steps} steps on {shard.size:,} rows ({name})")
        start, _ = pre_distil(
            experiment.model,
            experiment.start,
            answers=answers,
            steps=steps,
            lr=recipe.optimizer.lr[0],
            seed=derive(recipe.seed, name),
            max_length=recipe.data.max_length,
            device=recipe.model.device,
            **{"public": shard, "pad": experiment.server.pad, **more},
        )
        return start.flat()

    return experiment.with_server(start=Shared.of_flat(folder.tree(name, made, alone=True)))


def with_answer_index(shard: Shard, answer_N: np.ndarray) -> Shard:
    """The shard with each row's place among the answers."""
    return replace(shard, answer=answer_N.astype(np.int64))
