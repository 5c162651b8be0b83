"""Preferences: what a loss of pairs, or of rated rows, does not go beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.models.preference.kinds import PREFERENCES
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model

__all__ = ["PREFER"]

LEAST_BATCH = 4
"""Rows of a batch from which KTO takes the mean reward of mismatched rows; of fewer it is noise."""


FEW = f"kto holds rewards against a mean over the rows of the batch, which is noise with fewer than {LEAST_BATCH} rows"


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "remove it, or use task: chat") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix, where=key)


def _of_batch(recipe: Any) -> bool:
    return bool(recipe.preference.facts.of_batch)


PREFER: tuple[Feature, ...] = (
    of_shared_model(
        "prefer.kind",
        lambda recipe: recipe.prefers,
        summary="preferences: DPO, KTO, ORPO or SimPO on pairs of answers, or on rated ones",
        papers=tuple(paper for kind in PREFERENCES.values() for paper in kind.papers),
        clashes=(
            _clash(
                "data.form",
                lambda r: r.data.form == "stream",
                "a stream has no single answers, of which one could be better",
                "use plain, transcript, chat or messages",
            ),
            _clash(
                "compare.forms", lambda r: r.compare.forms, "the bare model is scored in the form of its rows alone"
            ),
            _clash(
                "data.partition.by",
                lambda r: (r.preference.min_good or r.preference.min_bad) and r.data.partition.by != "client",
                "rows are dealt out, and prefer.min_good and prefer.min_bad are of the data's own clients",
                "use by: client, or leave the two out",
            ),
            _clash("data.public", lambda r: r.data.public is not None, "nothing learns preferences from public rows"),
            _clash(
                "federation.repair",
                lambda r: r.federation.repair is not None,
                "a repair tunes on single answers, and this loss is of preferences",
            ),
            _clash(
                "fingerprint",
                lambda r: r.fingerprint is not None,
                "a secret pair has no worse answer to be held against",
            ),
            _clash("audit.canaries", lambda r: r.audit is not None, "a canary has no worse answer to be held against"),
            _clash(
                "attack.kind",
                lambda r: r.attack is not None and r.attack.facts.on == "rows",
                "liars would change one answer of each row and not the other",
                "use an attack of messages, or remove it",
            ),
            _clash(
                "privacy.unit",
                lambda r: r.noised is not None and r.noised.unit == "row",
                "rows are clipped one by one, and this loss holds answers against each other and the reference",
                "use privacy.unit: client, or task: chat",
            ),
            _clash(
                "optimizer.name",
                lambda r: r.method.asks_only,
                "a prompt that is found by asking is scored by the likelihood of answers alone",
                "use another optimizer.name",
            ),
            _clash(
                "personal.kind",
                lambda r: r.personal is not None and r.personal.kind in ("feddpa", "fedalt"),
                "two adapters side by side are scored by the likelihood of rows alone",
                "use finetune, ditto, apfl, fedala or norms",
            ),
            _clash(
                "federation.batch_size",
                lambda r: _of_batch(r) and r.federation.batch_size < LEAST_BATCH,
                FEW,
                f"use {LEAST_BATCH} or more",
            ),
            _clash(
                "compare.pooled_batch_size",
                lambda r: _of_batch(r) and (r.compare.pooled_batch_size or LEAST_BATCH) < LEAST_BATCH,
                FEW,
                f"use {LEAST_BATCH} or more",
            ),
            _clash(
                "federation.gradient_accumulation_steps",
                lambda r: _of_batch(r) and r.federation.gradient_accumulation_steps > 1,
                "kto's loss is of a whole batch, and pieces of one have other means",
                "remove it, and raise federation.batch_size",
            ),
        ),
    ),
)
