"""FedAsync's step: the server's model and a client's are mixed, however old the one is that the client began with.

    w ← (1 - α_τ) w + α_τ w_k,   w_k = w_v + Δ_k

FedBuff adds Δ_k to the newest w. Mixing also draws w back to the tensors w_v of version v, from which the client began.

References:
    Cong Xie, Sanmi Koyejo and Indranil Gupta. "Asynchronous Federated Optimization." OPT 2020.
    https://arxiv.org/abs/1903.03934
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.timing.schedule import Schedule
from lichen.core.wire.shared import Shared

__all__ = ["mixed", "one_job", "step_of"]


def step_of(
    change: Shared, schedule: Schedule, jobs: Sequence[Job], clients: Sequence[int], versions: Sequence[int], now: Job
) -> Shared:
    """The change as it is, or where a schedule mixes models, the one that leads to the mixture.

    Args:
        change: What the answers of a step add up to.
        schedule: Says how models are mixed.
        jobs: All that may have been answered.
        clients: Who has answered.
        versions: Of the job that each has answered.
        now: A job with the server's newest tensors and version.

    Raises:
        LichenError: if models are mixed, and there are several answers.
    """
    if schedule.mixing is None:
        return change
    one = one_job(jobs, clients, versions)
    return mixed(change, one.shared, now.shared, schedule.mixing * schedule.discount(now.version - one.version))


def mixed(change: Shared, initial: Shared, shared: Shared, share: float) -> Shared:
    """The change that leads from ``shared`` to the mixture.

    Args:
        change: The client's, Δ.
        initial: What the client began with, w_v.
        shared: The server's newest, w.
        share: Of the client's model, α_τ.

    Raises:
        LichenError: if a tensor is of another shape than the client had, or it had none.

    >>> import torch
    >>> one = lambda x: Shared({"w": torch.tensor([float(x)])})
    >>> mixed(one(2), one(1), one(5), 0.5).trainable["w"]  # (5 + 3) / 2 - 5
    tensor([-1.])
    """
    out = {}
    for name, x in change.trainable.items():
        before = initial.trainable.get(name)
        if before is None or before.shape != x.shape or name not in shared.trainable:
            raise LichenError(
                f"tensor {name!r} is not what the client began with",
                where="federation.schedule.mixing",
                fix="use one layout for all clients, or leave mixing out",
            )
        now = shared.trainable[name].double()
        out[name] = (share * (x.double() + (before.double() - now))).to(x.dtype)
    return replace(change, trainable=out)


def one_job(jobs: Sequence[Job], clients: Sequence[int], versions: Sequence[int]) -> Job:
    """The job that the only answer of a step is to.

    Raises:
        LichenError: if there are several answers.
    """
    if len(clients) != 1:
        raise LichenError(
            f"{len(clients)} answers came at once, and models are mixed one by one",
            where="federation.schedule.mixing",
            fix="use an engine that answers client by client",
        )
    return next(job for job in jobs if job.version == versions[0] and clients[0] in job.clients)
