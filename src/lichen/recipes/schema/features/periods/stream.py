"""Streams: what goes with a model that goes on from one period to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import Clash, of_shared_model
from lichen.recipes.schema.features.periods.answers import NO_ANSWERS, TAKES, writes_no_answers

__all__ = ["STREAM"]


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "", *, where: str = "") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix or "remove it, or stream", where=where or key)


def _distils(recipe: Any) -> bool:
    rebase = recipe.stream.rebase
    return rebase is not None and rebase.how == "distil"


def _in_all(used: Callable[[Any], object], recipe: Any) -> bool:
    """Whether a key is in use where all periods are trained, one after the other."""
    return recipe.streams and bool(used(recipe))


STREAM = (
    of_shared_model(
        "stream",
        lambda recipe: recipe.stream is not None,
        Need(Property.GRADIENTS, "goes on from an adapter that was trained, and {who} searches", "use adamw or sgd"),
        summary="periods one after the other: scored, then trained on, with rows of the past and roll-back",
        papers=(
            Paper(short="Dawid JRSS A 1984", url="https://doi.org/10.2307/2981683"),
            Paper(short="Lopez-Paz and Ranzato NIPS 2017", url="https://arxiv.org/abs/1706.08840"),
            Paper(short="Chaudhry et al. 2019", url="https://arxiv.org/abs/1902.10486"),
        ),
        clashes=(
            _clash(
                "model.name",
                lambda r: r.model.name is None or r.model.adapter.facts.whole,
                "a period goes on from the adapter of the one before it, and nothing else",
                "name a foundation model in model.name, and train an adapter, such as model.adapter.kind: lora",
            ),
            _clash(
                "task",
                lambda r: r.task == "oneshot",
                "is solved anew from all rows at once, and goes on from nothing",
                "use task: classify or chat",
            ),
            _clash(
                "task",
                lambda r: r.streams and r.prefers,
                "each period's run holds answers against what it begins from, so that scores of several do not compare",
                "use task: chat, or train one period alone: stream.period",
            ),
            _clash(
                "data.classes",
                lambda r: r.classifies and not r.data.classes,
                "a period may have no row of some class, and all periods must have the same ones",
                "list all classes",
            ),
            _clash(
                "data.public",
                lambda r: r.data.public is not None,
                "public rows would be others in each period",
                "remove it",
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.patch is not None or r.aggregation.local_params,
                "leaves more than an adapter, from which the next period could not go on",
                "use fedit, mean, ffa or rolora",
            ),
            _clash(
                "data.valid",
                lambda r: r.stream.react == "roll-back" and not r.data.valid,
                "roll-back judges by validation rows, of which clients have none",
                "set data.valid, or use stream.react: continue",
            ),
            _clash(
                "stream.rebase.how",
                lambda r: (
                    r.stream.rebase is not None
                    and r.stream.rebase.how != "restart"
                    and (r.stream.react, r.stream.detect) == ("restart", "none")
                ),
                "every period begins anew, so that no adapter goes on another base",
                "use how: restart, or another stream.react",
            ),
            _clash("stream.rebase.how", lambda r: _distils(r) and writes_no_answers(r), NO_ANSWERS, TAKES),
            _clash(
                "stream.rebase.prompts",
                lambda r: _distils(r) and r.stream.rebase.prompts is None,
                "a stream has no public rows whose questions could be asked",
                "name a file of rows with a column prompt, that are nobody's in the federation",
            ),
            _clash(
                "stream.rebase.model",
                lambda r: r.stream.rebase is not None and r.stream.rebase.model == r.model.name,
                "is the base that the stream begins on",
                "name another one, or remove stream.rebase",
            ),
            *(
                _clash(key, used, what)
                for key, used, what in (
                    ("teacher", lambda r: r.teacher is not None, "a teacher is of one run"),
                    ("synthetic", lambda r: r.synthetic is not None, "written rows are of one run"),
                    ("semi", lambda r: r.semi is not None, "rows without labels are of one run"),
                    ("privacy", lambda r: r.noised is not None, "what each period spends is not added up yet"),
                    ("audit", lambda r: r.audit is not None, "canaries are of one run"),
                    ("fingerprint", lambda r: r.fingerprint is not None, "secret pairs are of one run"),
                    ("data.labels", lambda r: r.data.labels is not None, "labels are hidden within one run"),
                    ("data.cards", lambda r: r.data.cards is not None, "cards of clients are of one run"),
                )
            ),
            *(
                _clash(key, partial(_in_all, used), what, "remove it, or train one period alone: stream.period")
                for key, used, what in (
                    (
                        "privacy",
                        lambda r: r.masked is not None,
                        "a stream scores every client by itself, and under masks nobody learns one client's score",
                    ),
                    ("value", lambda r: r.value is not None, "values of several periods are not added up yet"),
                    ("personal", lambda r: r.personal is not None, "own models do not go on to the next period"),
                    (
                        "federation.reward",
                        lambda r: r.federation.reward != "none",
                        "own models do not go on to the next period",
                    ),
                )
            ),
        ),
    ),
)
