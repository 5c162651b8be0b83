"""Collects what the model card of a run says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lichen.core.files.durable import write_atomic
from lichen.data.batches.text import start_id
from lichen.data.chat.chat_template import render
from lichen.data.sources.catalog import CATALOG, looks_like_hub_id
from lichen.present.charts.card import Card, card_text
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.contributions import CONTRIBUTIONS, read_contributions
from lichen.recipes.artifacts.inputs import row_digests
from lichen.recipes.assemble.class_names import class_names
from lichen.recipes.assemble.sides.fingerprints import fingerprint_count
from lichen.recipes.rows.prepare import is_private
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["write_adapter_card", "write_card"]

_QUESTION = "Hello, how are you?"


def write_adapter_card(run: Path, recipe: Recipe) -> None:
    """Write the card of a finished run's adapter, where there is one."""
    adapter_folder = run / "adapter"
    if not adapter_folder.is_dir():
        return
    tokenizer = None
    if recipe.writes:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    write_card(run, adapter_folder, recipe, tokenizer)


def write_card(
    run: Path, target: Path, recipe: Recipe, tokenizer: Any, *, called: str = "", student: str = "", use: str = ""
) -> None:
    """Write ``README.md`` beside a model.

    Args:
        run: The folder of a finished run.
        target: Where the model lies: an adapter, or a whole model.
        recipe: The run's.
        tokenizer: With the chat template of the run.
        called: What the folder will be called, where that is another name.
        student: The architecture of a student.
        use: Of a student: how it is loaded and asked.
    """
    config: Mapping[str, Any] = {}
    if (target / "adapter_config.json").is_file():
        config = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    name, chat = recipe.model.name or "", recipe.writes
    known = CATALOG.get(name)
    base_id = known.upstream if known else name if looks_like_hub_id(name) and not Path(name).exists() else ""
    own_words = recipe.model.scratch is not None and recipe.model.scratch.text is None and is_private(recipe)
    prompt, start = _prompt(recipe, tokenizer) if chat else ("", -1)
    cut = recipe.model.layers is not None or recipe.model.random
    nowhere = str(config.get("base_model_name_or_path", "")).rpartition(" (")[2].rstrip(")") if cut and config else ""
    card = Card(
        name=recipe.name,
        question=recipe.question or "",
        writes=chat,
        pipeline=task_of(recipe.task).pipeline,
        folder=called or target.name,
        base=Path(name).name or recipe.name,
        base_id=base_id,
        licence=known.licence if known else "",
        kind=str(config.get("peft_type", "merged")),
        low_rank=recipe.model.adapter.facts.low_rank,
        rank=max([int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())]) if config else 0,
        whole=tuple(config.get("modules_to_save") or ()),
        form=recipe.data.form,
        prompt=prompt,
        start=start,
        example_prompt=_QUESTION,
        max_length=recipe.data.max_length,
        classes=class_names(run),
        data="" if is_private(recipe) else recipe.data.name,
        rows=row_digests(run),
        own_words=own_words,
        nowhere=nowhere,
        summary=read_summary(run),
        values=read_contributions(run).totals if (run / CONTRIBUTIONS).is_file() else (),
        fingerprints=fingerprint_count(run),
        student=student,
        use=use,
    )
    write_atomic(target / "README.md", card_text(card).encode(), shared=True)


def _prompt(recipe: Recipe, tokenizer: Any) -> tuple[str, int]:
    """``(all that stands before an answer, the start token before it or -1)``, as ``lichen try`` asks."""
    if recipe.data.form in ("chat", "messages"):
        return render([{"role": "user", "content": _QUESTION}], tokenizer, ask=True), -1
    start = start_id(tokenizer)
    end = "\n" if recipe.data.form == "transcript" else ""
    return f"{tokenizer.convert_ids_to_tokens(start)}{_QUESTION}{end}", start
