"""Task ``teach``: a foundation model teaches small students through its answers alone.

The rows of some owners are public: the teacher's head is trained on a part of them, another part is
unlabelled text. The teacher is asked once for every such text and answers with a label and its k
most likely classes; nothing else of it is reachable. Answers and texts go to clients that have few
labels of their own, whose students learn from both. Bytes of texts and answers are counted like all
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lichen.clients.answer import AnswerWork, NoBatches, Teacher
from lichen.core.contracts import Station
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.data.records import Record
from lichen.data.shards import TextShard
from lichen.engines.local import LocalEngine
from lichen.recipes.adapt import Column, Watch, adapt
from lichen.recipes.bench import Bench, values_N
from lichen.recipes.folder import RunFolder
from lichen.recipes.schema import Recipe

__all__ = ["Lesson", "ask", "part_public", "teach", "vocabulary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """The columns, the answers, and what they weighed."""

    columns: dict[str, Column]
    answers: Tree
    bytes_up: int
    bytes_down: int


def part_public(
    recipe: Recipe, rows: dict[str, list[Record]]
) -> tuple[list[Record], list[Record], dict[str, list[Record]]]:
    """``(labelled, unlabelled, private)``: owners are drawn whole, so that no private owner is public.

    Raises:
        LichenError: if the public owners have too few rows.
    """
    assert recipe.teacher is not None
    names = sorted(rows)
    order = numpy_generator(recipe.seed, "public owners").permutation(len(names))
    public = {names[i] for i in order[: int(recipe.teacher.public * len(names))]}
    pool = [r for name in sorted(public) for r in rows[name]]
    shuffled = [pool[i] for i in numpy_generator(recipe.seed, "public rows").permutation(len(pool))]
    need = recipe.teacher.labelled + recipe.teacher.unlabelled
    if len(shuffled) < need:
        raise LichenError(
            f"the public owners have {len(shuffled)} rows, {need} are asked for",
            where="teacher.public",
            fix="raise it, or lower teacher.labelled or teacher.unlabelled",
        )
    cut = recipe.teacher.labelled
    return shuffled[:cut], shuffled[cut:need], {name: of for name, of in rows.items() if name not in public}


def vocabulary(shards: Sequence[TextShard], *, size: int, keep: Sequence[int]) -> dict[int, int]:
    """The ``size`` most frequent tokens of public text, renumbered from ``len(keep)`` on; ``keep`` comes first.

    A student needs no more words than it will see: an embedding of the foundation model's whole
    vocabulary would be most of its bytes.
    """
    counts: dict[int, int] = {}
    for shard in shards:
        for ids in shard.input_ids:
            for token in ids.tolist():
                counts[token] = counts.get(token, 0) + 1
    ranked = sorted((t for t in counts if t not in set(keep)), key=lambda t: (-counts[t], t))
    return {token: i for i, token in enumerate([*keep, *ranked[: size - len(keep)]])}


def renumber(shard: TextShard, words: dict[int, int], unknown: int) -> TextShard:
    """The shard in the students' vocabulary."""
    ids = tuple(np.asarray([words.get(t, unknown) for t in row.tolist()], dtype=np.int32) for row in shard.input_ids)
    return replace(shard, input_ids=ids)


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


def teach(
    bench: Bench,
    public: TextShard,
    answers: Callable[[], tuple[Tree, int, int]],
    teacher_confusion: Callable[[], torch.Tensor],
    folder: RunFolder,
    watch: Watch,
    say: Callable[[str], None],
) -> Lesson:
    """Students without and with the teacher, and the teacher itself, on the same test rows.

    Args:
        bench: Students and their few labelled rows.
        public: The unlabelled texts, row i belonging to answer i.
        answers: Asks the teacher; called once in a run's life.
        teacher_confusion: The teacher's own counts on each client's test rows, ``(N, K, K)``.
        folder: The run folder.
        watch: Sees every round.
        say: Progress lines.
    """
    recipe = bench.recipe
    assert recipe.teacher is not None
    say(f"the teacher answers {public.size} texts")
    got = folder.tree("answers", lambda: _as_tree(*answers()))
    up, down = int(got.pop("bytes_up")), int(got.pop("bytes_down"))
    without = adapt(bench, folder, watch, say, name="without_teacher")
    taught = replace(
        bench, start={**bench.start, **got}, public=replace(public, answer=np.arange(public.size, dtype=np.int64))
    )
    alone = recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"columns": ()})})
    columns = adapt(replace(taught, recipe=alone), folder, watch, say, name="federated")
    metrics = {"confusion": folder.number("teacher", teacher_confusion)}
    columns["base"] = Column(value_N=values_N(recipe, metrics), metrics=metrics)
    columns["without_teacher"] = without["without_teacher"]
    columns.update({name: column for name, column in without.items() if name in ("alone", "pooled")})
    return Lesson(columns=columns, answers=got, bytes_up=up, bytes_down=down)


def _as_tree(answers: Tree, up: int, down: int) -> Tree:
    return {**answers, "bytes_up": torch.tensor(up), "bytes_down": torch.tensor(down)}
