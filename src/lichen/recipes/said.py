"""A teacher of task chat: what it writes after public prompts, and who is given how much of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from lichen.clients.sequence import prompt_of, sequences
from lichen.core.errors import LichenError
from lichen.core.seeds import derive, numpy_generator
from lichen.data.pool import Pool, Row, save_pool
from lichen.data.records import Record
from lichen.recipes.faces import Faces
from lichen.recipes.folder import RunFolder
from lichen.recipes.open import Opened

__all__ = ["beside", "said"]

Rows = tuple[Record, ...]


def said(
    opened: Opened, faces: Faces, folder: RunFolder, say: Callable[[str], None]
) -> tuple[Rows, dict[str, float | str | None]]:
    """``(public prompts with the teacher's answers, numbers to tell)``; ``pool.jsonl`` holds what it wrote.

    Raises:
        LichenError: if no public row has a prompt, or nothing that was written can be used.
    """
    recipe = opened.bench.recipe
    plan = recipe.teacher
    assert plan is not None
    asked = [record for record in opened.commons.unlabelled if prompt_of(record)]
    if not asked or recipe.data.form == "stream":
        raise LichenError(
            "no public row has a prompt that a teacher could answer",
            where="teacher.tells",
            fix="use data with prompts or conversations, in a form that has them, or leave the teacher out",
        )
    fm = faces.writer(plan.name, plan.endpoint, plan.may_see, chat=not plan.plain).of("public")
    say(f"the teacher answers {len(asked):,} public prompts")
    rows, sifted = sequences(fm, asked, most=plan.most)
    say(f"of what was written: {sifted}")
    if not rows:
        raise LichenError(
            f"{fm.name} wrote nothing usable", where="teacher", fix="raise teacher.most, or use another model"
        )
    if folder.ranks.first:
        wrote = [Row(_answer(r), model=fm.name, prompt=_digest(prompt_of(r))) for r in rows]
        save_pool(folder.path / "pool.jsonl", Pool().grow(wrote, generation=0))
        told = {str(i): {"rule": rule, "why": why} for i, (rule, why) in sifted.dropped.items()}
        folder.write_json("dropped.json", told)
    return rows, {"answers": float(len(asked)), "answers.kept": float(len(rows))}


def beside(opened: Opened, rows: Rows) -> tuple[tuple[Rows, ...], int]:
    """``(each client's rows with some of the teacher's behind, bytes down)``.

    A client draws its own, at most ``teacher.share`` of what it then has.
    """
    recipe, out, sent = opened.bench.recipe, list[Rows](), 0
    assert recipe.teacher is not None
    share = recipe.teacher.share
    for owner in opened.owners:
        room = int(share / (1 - share) * len(owner.train) + 1e-9)
        order = numpy_generator(derive(recipe.seed, "said", owner.name), "rows").permutation(len(rows))
        part = [rows[i] for i in sorted(order[:room].tolist())]
        sent += sum(len((prompt_of(r) + _answer(r)).encode()) for r in part)
        out.append((*owner.train, *part))
    return tuple(out), sent


def _answer(record: Record) -> str:
    return record.messages[-1]["content"] if record.messages else record.text


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]
