"""DP-FedAvg: federated averaging whose every round is a release with noise, paid for before it begins.

A round is charged to the budget; each client comes by its own secret coin; clipped changes are summed, secret noise
comes into the sum once, and the sum is divided by the number of clients expected. A round to which nobody comes is one
like any other. What a report would say of clients is left out of it: who came, how many, what they lost and how long
they took are releases, too; bytes are told as they are expected.

References:
    H. Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang. "Learning Differentially Private Recurrent Language
    Models." ICLR 2018. https://arxiv.org/abs/1710.06963
    Martín Abadi et al. "Deep Learning with Differential Privacy." CCS 2016. https://arxiv.org/abs/1607.00133
    Yuqing Zhu and Yu-Xiang Wang. "Poisson Subsampled Rényi Differential Privacy." ICML 2019.
    https://proceedings.mlr.press/v97/zhu19c.html (why each client needs a coin of its own)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch

from lichen.algorithms.average import Average
from lichen.clients.masking.masked import Masked
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message, size
from lichen.core.replies import ATTENDED
from lichen.core.secret.randomness import SecretRandomness, Stream
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import innermost, layers, with_innermost
from lichen.server.private_mean import PrivateMean
from lichen.server.sampling import Everyone, SecretPoisson
from lichen.transforms.transform import Transformed

__all__ = ["Charges", "PrivateAverage"]


class Charges(Protocol):
    """What rounds are paid for with; see :class:`lichen.core.secret.budget.Budget`."""

    def charge(self, round_: int) -> int:
        """Pay for a round; the attempt at it."""
        ...

    def close(self, round_: int, attempt: int) -> None:
        """The charge is used up."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateAverage:
    """Federated averaging that protects clients.

    Attributes:
        inner: The averaging. Innermost in its aggregator is a :class:`~lichen.server.private_mean.PrivateMean`, whose
            noise and clip hold; it validates nothing, and steps in every round.
        sigma: σ, the noise in units of the clip.
        rate: q, the chance of each client in a round; 1: everybody comes.
        randomness: The secret coins and noise.
        budget: Pays for rounds.
        once: Does a thing that is to be done once: of several ranks the first does it, and all get what comes of it.

    Raises:
        LichenError: if the averaging validates, skips rounds or changes messages in no way that bounds them.
    """

    inner: Average
    sigma: float
    rate: float
    randomness: SecretRandomness
    budget: Charges
    once: Callable[[Callable[[], Any]], Any] = lambda do: do()

    def __post_init__(self) -> None:
        steps = self.inner.steps_always or self._mean().distributed  # a sum that is not opened is no release
        if self.inner.valid is not None or not steps or self.inner.history is not None:
            what = "a private averaging validates nothing, keeps no message and steps in every round"
            raise LichenError(what, where="privacy", fix="set valid=None, history=None and steps_always=True")

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round."""
        return self.inner.init(shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round, charged first.

        Raises:
            LichenError: if the budget does not pay for it; nothing was sent then.
        """
        number = state.round
        attempt = int(self.once(lambda: self.budget.charge(number)))

        def stream(sum_digest: str) -> Stream:
            self.once(lambda: self.budget.close(number, attempt))
            return self.randomness.stream("noise", number, attempt, sum_digest)

        if self._mean().distributed:  # the sum is opened before it comes here
            self.once(lambda: self.budget.close(number, attempt))
        declared = self._declared(state)
        layout = tuple((name, tuple(declared.tensors[name].shape)) for name in sorted(declared.tensors))
        private = replace(self._mean(), sigma=self.sigma, layout=layout, stream=stream)
        coins = self.randomness.stream("sampling", number, attempt)
        inner = replace(
            self.inner,
            aggregator=with_innermost(self.inner.aggregator, private),
            sampler=Everyone() if self.rate == 1 else SecretPoisson(self.rate, coins),
        )
        state, report = inner.round(state, engine, seed)
        return state, self._left(report, state, declared)

    def _mean(self) -> PrivateMean:
        found = innermost(self.inner.aggregator)
        if not isinstance(found, PrivateMean):
            raise LichenError("this aggregator makes no private mean", where="privacy", fix="put one innermost")
        return found

    def _work(self) -> Transformed:
        work = self.inner.admission.works.get(self.inner.work)
        for layer in layers(work):
            if isinstance(layer, Transformed):
                return layer
        raise LichenError("nothing bounds what clients send", where="privacy", fix="clip their messages")

    def _job(self, state: ServerState) -> Job:
        return Job(work=self.inner.work, shared=state.shared, version=state.round, clients=(0,), seed=0)

    def _declared(self, state: ServerState) -> Expected:
        """What a message of this round is before it is clipped and coded."""
        return self._work().inner.expected(self._job(state))

    def _left(self, report: Report, after: ServerState, declared: Expected) -> Report:
        """What is left of a report where nothing of it depends on a client but through the noise."""
        job = replace(self._job(after), version=report.round - 1)
        nothing = Message(
            group=declared.group,
            client_C=torch.zeros(1, dtype=torch.int64),
            version_C=torch.zeros(1, dtype=torch.int64),
            tensors={name: torch.zeros(1, *spec.shape, dtype=spec.dtype) for name, spec in declared.tensors.items()},
            weight_C=torch.ones(1, dtype=torch.float64),
        )
        for transform in self._work().transforms:
            nothing, _ = transform.on_client(nothing, {}, job, (0,))
        expected, up, down = self.rate * len(self.inner.weight_N), size(nothing), size(job)
        if isinstance(masked := self.inner.admission.works.get(self.inner.work), Masked):
            stages = masked.sizes(job)
            up, down = sum(up for up, _ in stages), down + sum(down for _, down in stages)
        metrics = {name: x for name, x in report.metrics.items() if name == "noise"}
        return Report(
            round=report.round,
            clients=(),
            metrics=metrics,
            tokens=None,
            bytes_up=round(expected * up),
            bytes_down=round(expected * down),
            attendance=ATTENDED,
        )
