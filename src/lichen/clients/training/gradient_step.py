"""The contract of a gradient step: a link of the chain between a client's gradients and its optimizer.

Links compose as optax's gradient transformations do: each takes the gradients that the link before it gives. On top
of that a link may keep private state from round to round, and may send tensors beside the client's change. Clipping,
FedProx's pull and weight decay keep nothing; SCAFFOLD's correction keeps the client's control variate and sends how
it has changed; FedDyn keeps its memory of gradients.

References:
    Matteo Hessel, David Budden, Fabio Viola, Mihaela Rosca, Eren Sezener and Tom Hennigan. "Optax: composable
    gradient transformation and optimisation, in JAX." 2020. https://github.com/google-deepmind/optax

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lichen.core.expected import TensorSpec
from lichen.core.message import Job
from lichen.core.tree import Tree

__all__ = ["GradientStep"]


class GradientStep(Protocol):
    """What happens to a client's gradients before its optimizer steps.

    Every tensor that differs by client has a leading client axis. A client's numbers depend on nothing but its own
    place in them, and in exact steps they have the same bits in any company.

    A link sees the gradient of the mean over a client's labelled rows or tokens. What needs each row's gradient
    (DP-SGD) stands before the chain, on :meth:`lichen.core.contracts.model.CohortModel.losses`.
    """

    @property
    def name(self) -> str:
        """Its private state is that under ``step/<name>/``."""
        ...

    def own(self, trainable_C: Tree) -> Tree:
        """What each client keeps, as it is at its first time, ``(C, ...)``; empty where nothing is kept.

        ``trainable_C`` are all trainable tensors, those too that this round freezes, so that the names are the
        same in every round.
        """
        ...

    def sends(self, trained: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
        """What leaves beside the change of the trained tensors: as :meth:`final` gives it, for one client."""
        ...

    def init(self, job: Job, clients: Sequence[int], params_C: Tree, own_C: Tree) -> Tree:
        """The state before the first step of a round.

        Args:
            job: What was asked, with its shared tensors, settings and seed.
            clients: Roster indices.
            params_C: Trained tensors as these clients begin.
            own_C: What they keep: that of :meth:`own`, or of the last :meth:`final`.
        """
        ...

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """``(grads_C, state)`` after this link.

        Args:
            grads_C: Gradients, with the names of ``params_C``.
            state: From :meth:`init` or the last update.
            params_C: Trained tensors now.
            active_C: bool ``(C,)``; the state of the others stays bit-unchanged, and their gradients are not used.
            exact: The same bits in any company, or fast.
        """
        ...

    def final(self, state: Tree, delta_C: Tree, steps_C: Tensor) -> tuple[Tree, Tree]:
        """``(sent_C, own_C)``: tensors that leave beside the change, and what of the private state is new.

        A client without a step sends zeros and keeps what it had. One whose numbers are not finite does so
        whatever is given here.

        Args:
            state: From the last update.
            delta_C: How far the trained tensors have moved since :meth:`init`.
            steps_C: Steps taken, float64 ``(C,)``.
        """
        ...
