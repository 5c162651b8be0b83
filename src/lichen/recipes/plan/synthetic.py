"""Plans synthetic generation: texts, tokens, and seconds of a local model.

Some texts are written for the first token and for a few more; the rest is arithmetic. An endpoint is not asked, for its
calls may cost money. What help does beyond that and a plan does not count is said in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lichen.clients.distillation.sequence import prompt_of
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.help.foundation_models import FMRegistry, private_texts
from lichen.recipes.help.synthetic import writer_of
from lichen.recipes.plan.estimate import Cost, Estimate
from lichen.recipes.schema.recipe import Recipe

__all__ = ["with_writing"]

BATCH, PROBE_TOKENS = 32, 9
"""Texts that are tried at most, and tokens of each."""


def with_writing(found: Estimate, loaded: LoadedExperiment, folder: Path, say: Callable[[str], None]) -> Estimate:
    """A plan with a column ``writing`` where a model writes, and with notes on what is not counted.

    Args:
        found: The plan of everything else.
        loaded: The recipe with its rows.
        folder: For answers that are kept meanwhile; the caller removes it.
        say: Called with lines of progress.
    """
    recipe = loaded.experiment.recipe
    notes = [*found.notes, *_uncounted(recipe)]
    texts, max_new_tokens, remote, ask = _queries(loaded, folder, say)
    if not texts:
        return replace(found, notes=tuple(notes))
    notes.append(
        f"writing: {texts:,} texts of at most {max_new_tokens} tokens, {texts * max_new_tokens:,} tokens in all"
    )
    if remote:
        notes.append("writing: an endpoint is not timed, and its price is not known")
        return replace(found, notes=tuple(notes))
    rows = min(texts, BATCH)
    ask(1, 1)  # loads the model
    say(f"writing {rows} texts of {PROBE_TOKENS} tokens")
    first, longer = (_seconds(ask, rows, tokens) for tokens in (1, PROBE_TOKENS))
    each = max(longer - first, 0.0) / (PROBE_TOKENS - 1)
    seconds = (first + (max_new_tokens - 1) * each) * texts / rows
    cost = Cost(seconds=seconds, evaluate_tokens=float(texts * max_new_tokens))
    return replace(found, notes=tuple(notes), columns={"writing": cost, **found.columns})


def _queries(
    loaded: LoadedExperiment, folder: Path, say: Callable[[str], None]
) -> tuple[int, int, bool, Callable[[int, int], object]]:
    """``(texts, tokens of each at most, behind an endpoint, what writes some texts of some tokens)``."""
    recipe = loaded.experiment.recipe
    apart = recipe.model_copy(update={"cache_dir": str(folder / "kept")})
    foundation_models = FMRegistry(recipe=apart, say=say, private=lambda: private_texts(loaded.clients_data))
    if recipe.synthetic is not None:
        section = recipe.synthetic
        rounds = 1 + section.iterations * section.variations if section.kind == "evolution" else 1

        def write(rows: int, tokens: int) -> object:
            writer = replace(writer_of(loaded, foundation_models, section), max_new_tokens=tokens, max_attempts=1)
            return writer.write(loaded.classes[0], rows, seed=tokens)

        return (
            section.per_class * len(loaded.classes) * rounds,
            section.max_new_tokens,
            section.endpoint is not None,
            write,
        )
    plan = recipe.teacher
    if plan is None or plan.answer_format != "text":
        return 0, 0, False, lambda rows, tokens: None
    prompts = [prompt for record in loaded.public_split.unlabelled if (prompt := prompt_of(record))]

    def speak(rows: int, tokens: int) -> object:
        fm = foundation_models.writer(plan.name, plan.endpoint, plan.may_see, chat=not plan.plain).of("public")
        return fm.generate(prompts[:rows], seeds=[0] * rows, max_new_tokens=tokens, temperature=0.0)

    return len(prompts), plan.max_new_tokens, plan.endpoint is not None, speak


def _seconds(ask: Callable[[int, int], object], rows: int, tokens: int) -> float:
    start_time = time.perf_counter()
    ask(rows, tokens)
    return time.perf_counter() - start_time


def _uncounted(recipe: Recipe) -> list[str]:
    notes = []
    for key, section in (("teacher", recipe.teacher), ("synthetic", recipe.synthetic)):
        if section is not None and section.at != "clients":
            notes.append(f"{key}.at: the server's own {section.server_steps} steps are not counted")
    if recipe.teacher is not None and recipe.teacher.kind == "zero-shot" and recipe.teacher.answer_format != "text":
        notes.append("teacher: a language model that is asked in words takes at least as long")
    if recipe.semi is not None:
        notes.append("semi: the unlabelled rows of a step are not counted; a step takes some times as long")
    return notes
