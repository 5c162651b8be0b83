"""The recipe's teacher: which model labels, and how its labels are weighted.

A teacher is asked once for every public text. Either it is an encoder with a linear head that was trained on the
public labelled rows, or a language model that is asked in words; nothing else of it is reachable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch

from lichen.clients.distillation.teacher_labels import AnswerWork, LocalTeacher, NoBatches
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.sources.cache import keep, key_of, prepared_folder
from lichen.data.sources.records import Record
from lichen.engines.local import LocalEngine
from lichen.fm.disclosure import ORIGINS, Origin
from lichen.fm.zero_shot import Teacher, ZeroShot
from lichen.models.loading.load import base_digest
from lichen.models.losses import answer_settings
from lichen.recipes.assemble.features import encoder_of, featurizer
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.help.foundation_models import FMRegistry
from lichen.recipes.rows.prepare import is_private
from lichen.recipes.schema.help import TeacherConfig
from lichen.recipes.schema.recipe import Recipe

__all__ = ["Teachers", "ask", "classes_in_answer", "with_settings"]


def classes_in_answer(recipe: Recipe, classes: Sequence[str]) -> int:
    """Classes in an answer."""
    assert recipe.teacher is not None
    count = {"all": len(classes), "label": 1, "top_k": recipe.teacher.top_k}[recipe.teacher.answer_format]
    return min(count, len(classes))


def with_settings(plan: TeacherConfig, answers: Tree) -> Tree:
    """The answers, and beside them how they are learned from."""
    return answers | answer_settings(
        temperature=plan.temperature if plan.temperature != 1 else None,
        weight=plan.weight if plan.weight != 1 else None,
        threshold=plan.min_confidence or None,
        hard=True if plan.answer_format == "label" else None,
    )


def ask(
    teacher: Teacher, texts: Sequence[str], classes: Sequence[str], top_k: int, folder: RunFolder
) -> tuple[Tree, int, int]:
    """Let the teacher's node answer every text, once: ``(answers.*, bytes up, bytes down)``."""
    work = AnswerWork(teacher, classes=tuple(classes), top_k=top_k)
    engine = LocalEngine(
        {"answer": ClientTask(work=work, source=NoBatches())},
        ClientStore(folder.path / "state" / "none"),
    )
    job = Job(work="answer", shared=Shared(), version=0, clients=(0,), seed=0, texts=tuple(texts))
    (message,) = drain(engine, job)
    answers = {f"answers.{name}": x[0] for name, x in message.tensors.items()}
    return answers, engine.bytes_up, engine.bytes_down


def head_teacher(
    recipe: Recipe,
    labelled: Sequence[Record],
    unlabelled: Sequence[Record],
    classes: Sequence[str],
    say: Callable[[str], None],
) -> LocalTeacher:
    """A logistic head on the encoder's frozen features of the public labelled rows.

    Features of public rows are kept, so that the next run of the same encoder over the same rows finds them;
    those of any other row never are.
    """
    from sklearn.linear_model import LogisticRegression

    assert recipe.teacher is not None
    features, tokenizer = encoder_of(recipe, recipe.teacher.name, exact=False)
    featurise = featurizer(recipe, features, tokenizer, classes)
    say(f"features of {len(labelled) + len(unlabelled):,} public rows")
    public = [*labelled, *unlabelled]
    x_ND: np.ndarray = keep(
        key_of("features", base_digest(features.model), recipe.data.max_length, [r.text for r in public]),
        lambda: featurise(public).x,
        write=lambda x: {"x": torch.from_numpy(x)},
        read=lambda tree: tree["x"].numpy(),
        folder=prepared_folder(private=is_private(recipe)),
    )
    known = {record.text: x_D for record, x_D in zip(public, x_ND, strict=True)}
    index = {label: i for i, label in enumerate(classes)}
    say(f"training the teacher's head on {len(labelled):,} of them")
    head = LogisticRegression(max_iter=2000, C=10.0, class_weight="balanced").fit(
        x_ND[: len(labelled)], [index[str(record.label)] for record in labelled]
    )

    def classify(texts: Sequence[str]) -> torch.Tensor:
        if all(text in known for text in texts):
            x = np.stack([known[text] for text in texts])
        else:
            x = featurise([Record(client="", text=text) for text in texts]).x
        scores = torch.from_numpy(head.decision_function(x)).double()
        if scores.dim() == 1:  # two classes have one score between them
            scores = torch.stack([-scores / 2, scores / 2], 1)
        logits = torch.full((len(texts), len(classes)), -torch.inf, dtype=torch.float64)
        logits[:, torch.from_numpy(head.classes_)] = scores
        return logits

    return LocalTeacher(classify, classes=classes, top_k=len(classes))


@final
class Teachers:
    """The recipe's teacher, as seen from texts of each origin: what it may not be shown is refused.

    Args:
        loaded: The recipe with its rows.
        foundation_models: Its foundation models.
        say: Called with lines of progress.
    """

    def __init__(self, loaded: LoadedExperiment, foundation_models: FMRegistry, say: Callable[[str], None]) -> None:
        assert loaded.experiment.recipe.teacher is not None
        self._loaded, self._foundation_models, self._say = loaded, foundation_models, say
        self._plan = loaded.experiment.recipe.teacher
        self._head: LocalTeacher | None = None
        self._shown: ZeroShot | None = None

    @property
    def measurable(self) -> bool:
        """Whether it can be scored on rows that nobody may see but their owner: a local model runs where they are."""
        return self._plan.endpoint is None or "private" in self._plan.may_see

    def of(self, origin: Origin, *, measured: bool = False) -> Teacher:
        """The teacher of texts of this origin.

        Args:
            origin: Of the texts.
            measured: They are only scored, on their owner's machine: a local model may read them there.
        """
        if self._plan.kind == "head":
            if self._head is None:
                recipe, rows = self._loaded.experiment.recipe, self._loaded.public_split
                self._head = head_teacher(recipe, rows.labelled, rows.unlabelled, self._loaded.classes, self._say)
            return self._head
        allow = ORIGINS if measured and self._plan.endpoint is None else self._plan.may_see
        policy = self._foundation_models.writer(self._plan.name, self._plan.endpoint, allow, chat=False)
        return replace(self._zero_shot(), fm=policy.of(origin))

    def _zero_shot(self) -> ZeroShot:
        """Calibrated on public texts, once."""
        if self._shown is None:
            plan, public_split = self._plan, self._loaded.public_split
            policy = self._foundation_models.writer(plan.name, plan.endpoint, plan.may_see, chat=False)
            words = {c: plan.label_words.get(c, f" {c}") for c in self._loaded.classes}
            shown = ZeroShot(policy.of("public"), template=plan.template, words=words, calibrate=plan.calibrate)
            if plan.calibrate != "none":
                shown = shown.over([record.text for record in public_split.unlabelled[:PRIOR]])
            if known := public_split.labelled[:PRIOR]:
                shown = shown.fitted([r.text for r in known], [str(r.label) for r in known])
            self._shown = shown
        return self._shown


PRIOR = 200
"""Public texts that a zero-shot teacher is calibrated on, and labelled ones its temperature is fitted to, at most."""
