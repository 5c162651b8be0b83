"""The recipe's teacher: who answers, and what its answers weigh.

A teacher is asked once for every public text. Either it is an encoder with a linear head that was trained on the
public labelled rows, or a language model that is asked in words; nothing else of it is reachable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lichen.clients.answer import AnswerWork, LocalTeacher, NoBatches
from lichen.core.contracts import Station
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.data.records import Record
from lichen.data.shards import ArrayShard
from lichen.engines.local import LocalEngine
from lichen.models.api_answer import Teacher, ZeroShot
from lichen.recipes.faces import Faces
from lichen.recipes.featured import encoder_of, featured
from lichen.recipes.folder import RunFolder
from lichen.recipes.open import Opened
from lichen.recipes.schema import Recipe

__all__ = ["answered_with", "ask", "head_teacher", "teacher_of"]


def answered_with(recipe: Recipe, classes: Sequence[str]) -> int:
    """Classes in an answer."""
    assert recipe.teacher is not None
    kept = {"all": len(classes), "label": 1, "top_k": recipe.teacher.top_k}[recipe.teacher.tells]
    return min(kept, len(classes))


def ask(
    teacher: Teacher, texts: Sequence[str], classes: Sequence[str], top_k: int, folder: RunFolder
) -> tuple[Tree, int, int]:
    """Let the teacher's node answer every text, once: ``(answers.*, bytes up, bytes down)``."""
    work = AnswerWork(teacher, classes=tuple(classes), top_k=top_k)
    engine = LocalEngine(
        {"answer": Station(work=work, source=NoBatches())},
        ClientStore(folder.path / "state" / "none"),
    )
    job = Job(work="answer", shared={}, version=0, clients=(0,), seed=0, texts=tuple(texts))
    (message,) = engine.run(job)
    answers = {f"answers.{name}": x[0] for name, x in message.tensors.items()}
    return answers, engine.bytes_up, engine.bytes_down


def head_teacher(
    recipe: Recipe, labelled: Sequence[Record], classes: Sequence[str], say: Callable[[str], None]
) -> LocalTeacher:
    """A logistic head on the encoder's frozen features of the public labelled rows."""
    from sklearn.linear_model import LogisticRegression

    assert recipe.teacher is not None
    features, tokenizer = encoder_of(recipe, recipe.teacher.name, exact=False)
    featurise = featured(recipe, features, tokenizer, classes)
    say(f"training the teacher's head on {len(labelled):,} public rows")
    known: ArrayShard = featurise(labelled)
    head = LogisticRegression(max_iter=2000, C=10.0, class_weight="balanced").fit(known.x, known.labels)

    def classify(texts: Sequence[str]) -> torch.Tensor:
        x = featurise([Record(client="", text=text) for text in texts]).x
        scores = torch.from_numpy(head.decision_function(x)).double()
        if scores.dim() == 1:  # two classes have one score between them
            scores = torch.stack([-scores / 2, scores / 2], 1)
        logits = torch.full((len(texts), len(classes)), -torch.inf, dtype=torch.float64)
        logits[:, torch.from_numpy(head.classes_)] = scores
        return logits

    return LocalTeacher(classify, classes=classes, top_k=len(classes))


def teacher_of(opened: Opened, faces: Faces, say: Callable[[str], None]) -> Teacher:
    """The recipe's teacher: a head on an encoder, or a language model that is asked in words."""
    recipe = opened.bench.recipe
    plan, known = recipe.teacher, opened.commons.labelled
    assert plan is not None
    if plan.kind == "head":
        return head_teacher(recipe, known, opened.classes, say)
    flow = faces.writer(plan.name, plan.endpoint, plan.may_see, chat=False)
    words = {c: plan.words.get(c, f" {c}") for c in opened.classes}
    shown = ZeroShot(flow.of("public"), template=plan.template, words=words, calibrate=plan.calibrate)
    if plan.calibrate != "none":
        shown = shown.over([record.text for record in opened.commons.unlabelled[:PRIOR]])
    if known:
        some = known[:PRIOR]
        shown = shown.fitted([r.text for r in some], [str(r.label) for r in some])
    return shown


PRIOR = 200
"""Public texts that a zero-shot teacher is calibrated on, and labelled ones its temperature is fitted to, at most."""
