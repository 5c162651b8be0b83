"""Says which models write answers from which another base could learn."""

from __future__ import annotations

from typing import Any

__all__ = ["NO_ANSWERS", "PREFERS", "TAKES", "writes_no_answers"]

PREFERS = "learned from better and worse answers, and the old model writes one answer to a question"
"""Why task prefer is not distilled."""

NO_ANSWERS = "writes no answers to questions, from which another base could learn"
"""Why nothing else than task chat is, nor every form of it."""

TAKES = "use as-is or restart; distil takes task chat in form transcript, chat or messages"


def writes_no_answers(recipe: Any) -> bool:
    """Whether its rows have no questions that a model of this recipe could be asked."""
    return not recipe.writes or recipe.data.form in ("plain", "stream")
