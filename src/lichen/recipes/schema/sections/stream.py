"""The ``stream`` section: rows come period by period, and the model goes on from one to the next.

References: those of :mod:`lichen.recipes.tasks.streams.matrix` and :mod:`lichen.data.periods.reservoir`.
"""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, field_validator

from lichen.core.visible import clipped
from lichen.data.periods.lengths import length_of
from lichen.recipes.schema.model import Section

__all__ = ["RebaseConfig", "StreamConfig"]


def _as_text(name: object) -> object:
    """The name of a period as a text: years are numbers in YAML, and days are dates."""
    return str(name) if type(name) in (int, date) else name


class KeepConfig(Section):
    """What a period's result may cost, beside what was there, to be accepted."""

    recent: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="how much the loss on its validation rows may rise, as a share",
    )
    general: float = Field(
        default=0.02,
        ge=0,
        allow_inf_nan=False,
        description="how much the perplexity of compare.retention_text may rise, as a share",
    )


class RebaseConfig(Section):
    """Another base from some period on."""

    period: str = Field(description="the first period that is trained on it", examples=["2018-05"])
    model: str = Field(
        min_length=1,
        description="the new base: catalog name, local folder, GGUF file or hub id; other keys of `model` hold for it",
        examples=["newer/"],
    )
    how: Literal["as-is", "distil", "restart"] = Field(
        default="as-is",
        description="what its first period begins from; `as-is`: the adapter in force, on a base of the same "
        "vocabulary and shapes; `distil`: an adapter that has learned, at the server, what the model in force answers; "
        "`restart`: a new adapter",
    )
    prompts: str | None = Field(
        default=None,
        min_length=1,
        description="distil: a file of rows with a column `prompt`, nobody's in the federation, which are asked",
        examples=["questions.jsonl"],
    )

    _named = field_validator("period", mode="before")(_as_text)


class StreamConfig(Section):
    """Rows come period by period; each is scored before it is trained on, and the next begins from what came out."""

    by: str = Field(
        description="how long a period is: `month`, `year`, `7 days`, `20 years`, or `500 rows` after one another",
        examples=["month"],
    )
    period: str | None = Field(
        default=None,
        description="one period alone, by its name, as an ordinary run; none: all, one after the other",
        examples=["2018-05"],
    )
    replay: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the rows that it trained on before which a client trains on again",
    )
    replay_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of a period's training rows that are such rows, repeated if need be"
    )
    detect: Literal["none", "mmd", "page-hinkley", "adwin"] = Field(
        default="none",
        description="looks for drift before a period is trained on; `mmd`: its rows against those before, as the "
        "frozen model sees them; `page-hinkley`, `adwin`: clients watch their own losses, and a fifth of them must see "
        "them rise",
    )
    react: Literal["continue", "restart", "roll-back"] = Field(
        default="continue",
        description="`continue`: each period begins from what the last one ended with; `restart`: from where the first "
        "one did, with `detect` only after an alarm; `roll-back`: as `continue`, but a result that is worse than what "
        "was there is not gone on from",
    )
    keep: KeepConfig = Field(default=KeepConfig(), description="roll-back: what a result may cost to be accepted")

    rebase: RebaseConfig | None = Field(
        default=None, description="another base from some period on; none: one base for all periods"
    )

    _named = field_validator("period", mode="before")(_as_text)

    @field_validator("by")
    @classmethod
    def _known(cls, by: str) -> str:
        if length_of(by) is None:
            raise ValueError(f"{clipped(by, 60)!r} is no length of a period; use month, year, 20 years or 500 rows")
        return by
