"""Words of a recipe whose list is open: tasks, metrics, adapters, rules, methods and engines of other packages.

The schema names the built-in ones, so that they stand in the key tables; another word is accepted if an installed
package declares it (:mod:`lichen.tasks.registry`, :mod:`lichen.declared`,
:mod:`lichen.models.adapters.table`).
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PlainSerializer, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from lichen.clients.methods import METHODS
from lichen.declared import Family
from lichen.engines.kinds import ENGINES
from lichen.models.adapters.table import BUILT_IN, added
from lichen.server.robust.table import ROBUST
from lichen.server.rules import RULES
from lichen.tasks.registry import known_metrics, task_names, task_of

__all__ = [
    "AdapterName",
    "EngineName",
    "MethodName",
    "MetricName",
    "RobustName",
    "RuleName",
    "TaskName",
    "described_kinds",
]


def _task(value: Any, built_in: ValidatorFunctionWrapHandler) -> str:
    try:
        return str(built_in(value))
    except ValidationError:
        if not isinstance(value, str):
            raise
    names = task_names()
    if value in names:
        return task_of(value).name
    close = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.6)
    near = f"did you mean {close[0]!r}? " if close else ""
    shown = repr(value) if len(value) <= 40 else repr(value[:36]) + " ..."
    raise ValueError(f"task: the text {shown} is not a choice here; {near}use one of: {', '.join(names)}")


def _metric(value: Any, built_in: ValidatorFunctionWrapHandler) -> str:
    """Whether it is one of the recipe's own task is seen when the whole recipe is there."""
    return value if isinstance(value, str) and value in known_metrics() else str(built_in(value))


def _family(family: Family[Any]) -> Any:
    """The words of a family, its built-in ones as a list for the key tables."""

    def known(value: Any, built_in: ValidatorFunctionWrapHandler) -> str:
        try:
            return str(built_in(value))
        except ValidationError:
            if not isinstance(value, str) or value not in family.others():
                raise
        return str(family[value].name)

    return Annotated[Literal[tuple(family)], WrapValidator(known), PlainSerializer(str)]


def described_kinds() -> str:
    """The built-in kinds of adapter in one line, those of one meaning together."""
    meanings = dict.fromkeys(facts.means for facts in BUILT_IN.values())
    return "; ".join(
        f"{', '.join(f'`{word}`' for word, facts in BUILT_IN.items() if facts.means == means)}: {means}"
        for means in meanings
    )


def _adapter(value: Any, built_in: ValidatorFunctionWrapHandler) -> str:
    return value if isinstance(value, str) and value in added() else str(built_in(value))


if TYPE_CHECKING:
    AdapterName = str
    TaskName = str
    RuleName = str
    RobustName = str
    MethodName = str
    EngineName = str
    MetricName = str
else:
    RuleName = _family(RULES)
    RobustName = Literal[tuple(ROBUST)]
    MethodName = _family(METHODS)
    EngineName = _family(ENGINES)
    TaskName = Annotated[Literal["chat", "classify", "oneshot", "prefer"], WrapValidator(_task), PlainSerializer(str)]
    MetricName = Annotated[
        Literal["perplexity", "macro_f1", "accuracy", "preference", "likelihood"],
        WrapValidator(_metric),
        PlainSerializer(str),
    ]
    AdapterName = Annotated[Literal[tuple(BUILT_IN)], WrapValidator(_adapter), PlainSerializer(str)]
