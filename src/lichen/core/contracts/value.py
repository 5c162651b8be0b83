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
        value: By client, ascending; positive where its message made the loss smaller.
        before: The utility of no client's message.
        after: That of all of them.
        evaluations: Coalitions whose utility was asked for.
    """

    value: Mapping[int, float]
    before: float
    after: float
    evaluations: int

    @property
    def gap(self) -> float:
        """How much of ``after - before`` the values leave out (below 0: give too much); 0 for exact Shapley values.

        >>> RoundValue(value={0: 0.25, 4: 0.5}, before=-2.0, after=-1.0, evaluations=4).gap
        0.25
        """
        return math.fsum((self.after, -self.before, *(-x for x in self.value.values())))

    def dump(self) -> dict[str, Any]:
        """What JSON can write."""
        about = {"before": self.before, "after": self.after, "evaluations": self.evaluations}
        return {"value": [[client, value] for client, value in self.value.items()], **about}

    @classmethod
    def load(cls, about: Mapping[str, Any]) -> RoundValue:
        """Undo :meth:`dump`; what is damaged raises as dicts and numbers do."""
        return cls(
            value={int(client): float(value) for client, value in about["value"]},
            before=float(about["before"]),
            after=float(about["after"]),
            evaluations=int(about["evaluations"]),
        )
