"""SCAFFOLD at the server: the mean change is stepped as usual, and the control variate follows the clients' own.

    x <- x + server_lr * mean_k (y_k - x),    c <- c + 1/N Σ_k (c_k' - c_k)

The first mean is over who came. The second is divided by the N clients of the whole roster, whoever was invited, so
that c stays the mean of all c_k. The clients' half is :mod:`lichen.clients.training.corrections.scaffold`.

References:
    Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank J. Reddi, Sebastian U. Stich and Ananda
    Theertha Suresh. "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning." ICML 2020.
    https://arxiv.org/abs/1910.06378 (algorithm 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from lichen.core import tree as trees
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import CONTROL, Shared
from lichen.core.wrapping import AroundAggregator
from lichen.server.by_name import by_name
from lichen.server.mean import Mean

__all__ = ["controlled", "with_controls"]


def with_controls(shared: Shared) -> Shared:
    """The shared tensors with a control variate of zeros for every trainable one."""
    return shared | Shared(frozen=trees.join(f"{CONTROL}.", trees.zeros_like(shared.trainable), {}))


def controlled(inner: Aggregator, *, clients: int) -> Aggregator:
    """An aggregator of changes, with the control variates that came beside them averaged over the roster.

    Args:
        inner: Of the model's change.
        clients: N, the clients of the roster.
    """
    return by_name({f"{CONTROL}.": _Controls(Mean("uniform", divisor=clients)), "": inner})


@final
@dataclass(frozen=True, slots=True)
class _Controls(AroundAggregator):
    """The sum over N, as the new value of frozen tensors."""

    @property
    def one_version(self) -> bool:
        """A client's step is corrected by the control variate that it was sent."""
        return True

    def before(self, message: Message) -> Message:
        """The message itself."""
        return message

    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """The new control variates; no metrics.

        Raises:
            LichenError: as the inner one, or if the server has no such control variate.
        """
        mean = self.inner.close(total, shared)[0].trainable
        old = shared.frozen
        wrong = next((name for name in mean if name not in old or old[name].shape != mean[name].shape), None)
        if wrong is not None:
            raise LichenError(
                f"the server has no tensor {wrong!r} of shape {tuple(mean[wrong].shape)}",
                where="aggregator.scaffold",
                fix="let the shared tensors begin as with_controls makes them",
            )
        return Shared(frozen={name: (old[name].to(x) + x).to(old[name]) for name, x in mean.items()}), {}
