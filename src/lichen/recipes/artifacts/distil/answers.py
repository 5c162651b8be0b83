"""Lets the model on an old base answer questions that are nobody's: what another base learns from.

Learning from what a teacher is likeliest to write needs no tokens in common, so that any base can take over from any
other (sequence-level distillation). The texts are taken token by token where the paper searches with a beam.

Reference:
    Yoon Kim and Alexander M. Rush. "Sequence-Level Knowledge Distillation." EMNLP 2016.
    https://arxiv.org/abs/1606.07947
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lichen.clients.distillation.sequence import prompt_of
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.data.sources.records import Record, load_records
from lichen.recipes.artifacts.sampling import Sampling, ask_ids, end_ids, generate_text
from lichen.recipes.schema.recipe import Recipe

__all__ = ["ANSWERS", "questions", "write_answers"]

ANSWERS = "answers.jsonl"
"""The file of the answers, in the folder of what learns them. It is private: a model may repeat what it learned."""

LEAST = 10
"""Answers that can be split into rows to train on, to choose by and to test."""


def questions(public: Sequence[Record], file: Path | None, *, where: str) -> tuple[str, ...]:
    """The questions, each once: of a file, or of the recipe's public rows.

    Args:
        public: The old run's public rows.
        file: Rows with a column `prompt`.
        where: What names the file, for errors.

    Raises:
        LichenError: if they are too few.
    """
    records = public
    if file is not None:
        try:
            rows = load_records(str(file), columns={"text": ("prompt",)}, empty="keep")
        except LichenError as error:
            place = f"{where} {file}" if error.where.startswith("data.") else f"{where}: {error.where}"
            raise LichenError(error.what, where=place, fix=error.fix) from None
        records = [replace(row, prompt=row.text) for row in rows]
    found = tuple(dict.fromkeys(prompt for record in records if (prompt := prompt_of(record))))
    if len(found) < LEAST:
        raise LichenError(
            f"{len(found)} questions are not enough to learn from",
            where=where if file is None else f"{where} {file}",
            fix=f"name a file with {LEAST} rows or more, with a column prompt, that are nobody's in the federation",
        )
    return found


def write_answers(
    file: Path,
    recipe: Recipe,
    writer: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    where: str,
    say: Callable[[str], None],
) -> int:
    """Write the model's answers, a row each; how many there are. A file that is there is left as it is.

    Args:
        file: Where to.
        recipe: Of the old run, in whose form it is prompted.
        writer: The model on the old base.
        tokenizer: Its tokenizer.
        prompts: The questions.
        where: What asks for answers, for errors.
        say: Called with lines of progress.

    Raises:
        LichenError: if it writes too few.
    """
    if file.exists():
        return len(file.read_text(encoding="utf-8").splitlines())
    say(f"the model on the old base answers {len(prompts):,} questions")
    form, rows = recipe.data.form, list[str]()
    ends = end_ids(writer, tokenizer, form)
    for prompt in prompts:
        text = generate_text(writer, tokenizer, ask_ids(tokenizer, form, prompt), Sampling(), ends=ends)
        if text:
            rows.append(json.dumps({"client": "server", "prompt": prompt, "completion": text}))
    if len(rows) < LEAST:
        what = f"the model answers {len(rows)} of {len(prompts)} questions with a word, too few to learn from"
        raise LichenError(what, where=where, fix="ask more questions, or use as-is or restart")
    write_atomic(file, ("\n".join(rows) + "\n").encode())
    return len(rows)
