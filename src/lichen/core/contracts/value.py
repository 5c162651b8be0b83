"""What the clients of a round contributed to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

__all__ = ["RoundValue", "Utility"]

Utility = Callable[[frozenset[int]], float]
"""The utility v(S) of a coalition S: minus the loss of the model that these clients' messages alone would have made."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RoundValue:
    """The players of a round and what each contributed, in units of the loss.

    Attributes:
        value: By client, ascending; positive where its message made the loss smaller. Nobody's where each client
            keeps its own.
        before: The utility of no client's message; None where it is not asked for.
        after: That of all of them.
        evaluations: Coalitions whose utility was asked for.
        total: What all values add up to, where each client keeps its own.
    """

    value: Mapping[int, float]
    before: float | None
    after: float | None
    evaluations: int
    total: float | None = None

    @property
    def sum(self) -> float:
        """What the values add up to."""
        return math.fsum(self.value.values()) if self.total is None else self.total

    @property
    def gap(self) -> float | None:
        """How much of ``after - before`` the values leave out (below 0: give too much); 0 for exact Shapley values.

        None where nobody asked what they are.

        >>> RoundValue(value={0: 0.25, 4: 0.5}, before=-2.0, after=-1.0, evaluations=4).gap
        0.25
        """
        if self.after is None or self.before is None:
            return None
        values = self.value.values() if self.total is None else (self.total,)
        return math.fsum((self.after, -self.before, *(-x for x in values)))

    def dump(self) -> dict[str, Any]:
        """What JSON can write."""
        about = {"before": self.before, "after": self.after, "evaluations": self.evaluations}
        hidden = {} if self.total is None else {"total": self.total}
        return {"value": [[client, value] for client, value in self.value.items()], **about, **hidden}

    @classmethod
    def load(cls, about: Mapping[str, Any]) -> RoundValue:
        """Undo :meth:`dump`; what is damaged raises as dicts and numbers do."""
        return cls(
            value={int(client): float(value) for client, value in about["value"]},
            before=_number(about["before"]),
            after=_number(about["after"]),
            evaluations=int(about["evaluations"]),
            total=_number(about.get("total")),
        )


def _number(x: Any) -> float | None:
    return None if x is None else float(x)
