"""What aggregators have in common that look at single messages: they have no half that a client could do.

Legend: C clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from lichen.core.contracts.server import Needs
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import Shared

__all__ = ["SingleMessages"]


class SingleMessages(ABC):
    """An aggregator whose :meth:`close` depends on more than a sum, so that no mask may lie over a message."""

    __slots__ = ()
    needs: ClassVar[Needs] = "single"

    @property
    @abstractmethod
    def one_version(self) -> bool:
        """Whether no message may be old."""

    @abstractmethod
    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``."""

    def lift(self, message: Message, discount_C: Tensor | None = None) -> Message:
        """Refused.

        Raises:
            LichenError: always.
        """
        raise LichenError(
            f"{type(self).__name__} needs single messages, and no masked sum holds them",
            where="aggregator",
            fix="use a rule that needs sums only, such as mean",
        )
