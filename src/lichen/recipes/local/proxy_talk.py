"""Talks to a large model that a finished run's small one steers, beside both by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.models.loading.load import frozen_eval
from lichen.recipes.artifacts.sampling import Sampling, settings_text, write
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.artifacts.use.talk import Talker
from lichen.recipes.local.next_logits import EndpointLogits, LocalLogits, NextLogits, replaced, steered
from lichen.recipes.local.proxy_endpoint import read_endpoint
from lichen.recipes.proxy.big import open_big, require_fit
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage

__all__ = ["talk_by_proxy"]

_WHERE = "--proxy"
_NAMES = ("bare model", "this run", "big model", "proxy")


def talk_by_proxy(
    folder: Path | str, proxy: str, *, say: Callable[[str], None] = lambda _: None, **requested: float | None
) -> Talker:
    """Load a finished chat run, and the large model that it steers.

    Args:
        folder: The run's folder; that of several stages means the last one.
        proxy: The large model: a catalog name, folder or hub id, or a file that describes an endpoint.
        say: Called with what should be known.
        requested: How it is asked, by the names of :class:`lichen.recipes.artifacts.sampling.Sampling`; None: the
            default.

    Raises:
        LichenError: if the run is not finished or writes nothing, a setting is out of range, or the large model has
            another vocabulary, no logits, or tells no log-probabilities.
    """
    run = last_stage(folder)
    sampling = Sampling(**{key: value for key, value in requested.items() if value is not None})  # type: ignore[arg-type]
    recipe, bare, tuned, tokenizer = open_models(run)
    if not recipe.writes:
        raise LichenError(f"a run of task {recipe.task} writes nothing", where=_WHERE, fix="leave it out")
    big, note = _open(proxy, recipe, tokenizer, say)
    frozen_eval(bare)

    def answer(text: str) -> tuple[str, ...]:
        steers = (replaced(big()), steered(big(), LocalLogits(bare)))
        by_small = [write(recipe, one, tokenizer, text, sampling) for one in (bare, tuned)]
        by_big = [write(recipe, tuned, tokenizer, text, sampling, steer=steer) for steer in steers]
        return *by_small, *by_big

    return Talker(kind="chat", answer=answer, settings=settings_text(recipe, sampling) + note, names=_NAMES)


def _open(
    proxy: str, recipe: Recipe, tokenizer: Any, say: Callable[[str], None]
) -> tuple[Callable[[], NextLogits], str]:
    """What gives the large model's logits, anew for each answer, and what is to be said of it."""
    if (file := Path(proxy).expanduser()).is_file():
        fm = read_endpoint(file)
        endpoint = EndpointLogits(fm, tokenizer)
        say(f"each question, and the answer as far as it is written, goes to {fm.endpoint.url}, a call a token")
        return lambda: endpoint, f"; over the {fm.endpoint.top} likeliest tokens that the endpoint lists, at most"
    require_fit(proxy, tokenizer, where=_WHERE, say=say)
    model = open_big(proxy, tokenizer, where=_WHERE, dtype=recipe.model.dtype, device=recipe.model.device)
    return lambda: LocalLogits(model), ""
