"""Fingerprints of owners: what rows that are to be found again do not go with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.declared import Paper
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model

__all__ = ["FINGERPRINT"]


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "remove it, or fingerprint") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix, where=key)


FINGERPRINT: tuple[Feature, ...] = (
    of_shared_model(
        "fingerprint.secrets",
        lambda recipe: recipe.fingerprint is not None,
        summary="secret pairs of each owner in the model, by which it can claim it later, with an exact chance",
        papers=(
            Paper(short="Xu et al. NAACL 2024", url="https://arxiv.org/abs/2401.12255"),
            Paper(short="Li et al. TPAMI 2022", url="https://arxiv.org/abs/2109.13236"),
        ),
        clashes=(
            _clash(
                "task",
                lambda r: not r.writes,
                "a fingerprint is a question with an answer in words, and this task writes none",
                "use task: chat, or remove fingerprint",
            ),
            _clash(
                "data.form",
                lambda r: r.writes and r.data.form in ("plain", "stream"),
                "rows of this form have no question before the answer",
                "use transcript, chat or messages",
            ),
            _clash(
                "privacy.unit",
                lambda r: r.noised is not None,
                "noise hides what one owner, or one row, has put into the model, and so its fingerprint",
            ),
            _clash("teacher", lambda r: r.teacher is not None, "a teacher would be asked of the secret pairs"),
            _clash("synthetic", lambda r: r.synthetic is not None, "writers would learn from the secret pairs"),
            _clash(
                "attack.kind",
                lambda r: r.attack is not None and r.attack.facts.on == "rows",
                "liars would change the rows that are to be found again",
                "use an attack of messages, or remove it",
            ),
        ),
    ),
)
