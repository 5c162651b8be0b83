"""A chat teacher: answers public prompts, and shares the answers out among clients."""

from __future__ import annotations

from collections.abc import Callable

from lichen.clients.distillation.sequence import prompt_of, sequences
from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.data.sources.records import Record
from lichen.data.synthetic.pool import Pool, SyntheticRow, sampled_rows
from lichen.fm.generation.synthesis import prompt_digest
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.help.foundation_models import FMRegistry
from lichen.recipes.help.synthetic import write_pool

__all__ = ["deal_out_texts", "teacher_texts"]

Rows = tuple[Record, ...]


def teacher_texts(
    loaded: LoadedExperiment, foundation_models: FMRegistry, folder: RunFolder, say: Callable[[str], None]
) -> tuple[Rows, dict[str, float | str | None]]:
    """``(public prompts with the teacher's answers, numbers to tell)``; ``pool.jsonl`` holds what it wrote.

    Raises:
        LichenError: if no public row has a prompt, or nothing that was written can be used.
    """
    recipe = loaded.experiment.recipe
    plan = recipe.teacher
    assert plan is not None
    prompted = [record for record in loaded.public_split.unlabelled if prompt_of(record)]
    if not prompted or recipe.data.form == "stream":
        raise LichenError(
            "no public row has a prompt that a teacher could answer",
            where="teacher.answer_format",
            fix="use data with prompts or conversations, in a form that has them, or leave the teacher out",
        )
    fm = foundation_models.writer(plan.name, plan.endpoint, plan.may_see, chat=not plan.plain).of("public")
    say(f"the teacher answers {len(prompted):,} public prompts")
    rows, sifted = sequences(fm, prompted, max_new_tokens=plan.max_new_tokens)
    say(f"of what was written: {sifted}")
    if not rows:
        raise LichenError(
            f"{fm.name} wrote nothing usable", where="teacher", fix="raise teacher.max_new_tokens, or use another model"
        )
    written = [SyntheticRow(_answer(r), model=fm.name, prompt=prompt_digest(prompt_of(r))) for r in rows]
    write_pool(folder, Pool().grow(written, generation=0), sifted)
    return rows, {"answers": float(len(prompted)), "answers.kept": float(len(rows))}


def deal_out_texts(loaded: LoadedExperiment, rows: Rows) -> tuple[tuple[Rows, ...], int]:
    """``(each client's rows with some of the teacher's behind, bytes down)``.

    A client draws its own, at most ``teacher.share`` of what it then has.
    """
    recipe, out, sent = loaded.experiment.recipe, list[Rows](), 0
    assert recipe.teacher is not None
    for client_data in loaded.clients_data:
        seed = derive(recipe.seed, "said", client_data.name)
        part = [rows[i] for i in sampled_rows(len(client_data.train), len(rows), recipe.teacher.share, seed)]
        sent += sum(len((prompt_of(r) + _answer(r)).encode(errors="replace")) for r in part)
        out.append((*client_data.train, *part))
    return tuple(out), sent


def _answer(record: Record) -> str:
    return record.messages[-1]["content"] if record.messages else record.text
