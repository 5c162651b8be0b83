"""A stream that goes on another base from some period on: the adapter in force as it is, distilled, or a new one.

What fits is looked at before anything is trained. Scores of language models are by token, so that their bases must have
one vocabulary; scores by row compare any two bases. A model is always scored on the base that it was made on.

Reference:
    Rana Muhammad Shahroz Khan, Pingzhi Li, Sukwon Yun, Zhenyu Wang, Shahriar Nirjon, Chau-Wai Wong and Tianlong Chen.
    "PortLLM: Personalizing Evolving Large Language Models with Training-Free and Portable Model Patches." ICLR 2025.
    https://arxiv.org/abs/2410.10870
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.data.sources.catalog import resolve_model
from lichen.recipes.assemble.bases.fit import require_fit
from lichen.recipes.assemble.bases.in_force import on_base
from lichen.recipes.assemble.model import foundation_of
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.streams.distilled import require_questions
from lichen.recipes.tasks.streams.scores import Scores

__all__ = ["Rebased", "require_base"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rebased:
    """The metric's mean over the clients' test rows of the first period on the new base.

    Attributes:
        period: Its name.
        model: The new base.
        how: What its run begins from, as the recipe says it.
        begins: The model that is: a period, ``START`` or ``DISTILLED``.
        answers: How many were learned; None where none were.
        before: Of the model in force before it, on the base that it was made on.
        beginning: Of what its run begins from, on the new base.
        after: Of what it ended with.
        accepted: Whether later periods go on on the new base.
    """

    period: str
    model: str
    how: str
    begins: str
    answers: int | None
    before: float | None
    beginning: float | None
    after: float | None
    accepted: bool

    def as_dict(self) -> dict[str, str | int | float | None]:
        """As JSON holds it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def summary(self) -> dict[str, str | float | None]:
        """As the summary holds it."""
        went = "" if self.answers is None else f", from {self.answers} answers"
        went += "" if self.accepted else ", rolled back"
        return {
            "stream.rebased": f"{self.period}: {Path(self.model).name or self.model}, {self.how}{went}",
            "stream.rebased.before": self.before,
            "stream.rebased.beginning": self.beginning,
            "stream.rebased.after": self.after,
        }


def require_base(scores: Scores) -> None:
    """Refuse a new base that cannot be trained from its period on; nothing where there is none, or it is in use.

    Args:
        scores: Opens a period on a base.

    Raises:
        LichenError: if the base does not fit.
    """
    periods, recipe = scores.periods, scores.periods.recipe
    rebase = None if recipe.stream is None else recipe.stream.rebase
    if rebase is None:
        return
    if periods.summary(rebase.period) is not None:
        return
    where = f"stream.rebase.model: {rebase.model}"
    try:
        resolve_model(rebase.model)
    except LichenError as error:
        raise LichenError(error.what, where="stream.rebase.model", fix=error.fix) from None
    require_questions(recipe, periods.distilled)
    _require_fit(recipe, on_base(recipe, rebase.model), where, same=rebase.how == "as-is")
    try:
        scores.open(rebase.period, rebase.model)  # or says which layer is not there
    except LichenError as error:
        raise LichenError(error.what, where=f"{where}: {error.where}", fix=error.fix) from None
    scores.clear()


def _require_fit(recipe: Recipe, moved: Recipe, where: str, *, same: bool) -> None:
    other = "use lichen rebase, which compares in bits a byte, and begin a new stream on its result"
    require_fit(
        moved,
        *foundation_of(recipe, resolve_model(str(recipe.model.name)), len(recipe.data.classes)),
        len(recipe.data.classes),
        vocabulary=same or recipe.writes,
        shapes=same,
        where=where,
        fix=other if recipe.writes else "use how: restart",
    )
