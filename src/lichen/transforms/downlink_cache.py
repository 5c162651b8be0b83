"""A node's cache of the last snapshot of the shared tensors.

One view for each client that lives here, the newest it was sent; clients that hold the same one share its
tensors, and a view that nobody holds is forgotten. A view that was rebuilt from steps is checked by its
digest: it has the server's bits, or the job is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

from lichen.core.errors import LichenError
from lichen.core.message import Job, link
from lichen.core.wire.shared import Shared
from lichen.transforms.codec import Chain
from lichen.transforms.delta import apply_delta, snapshot_name

__all__ = ["SnapshotCache"]

RESEND = "start the run again with --resume: views are sent whole to a node that lacks them"


@final
class SnapshotCache:
    """The views of a node's clients.

    Args:
        chain: What the server codes steps with; None: it sends none.
        agreed: What every client holds before its first job.
    """

    def __init__(self, chain: Chain | None = None, agreed: Shared | None = None) -> None:
        self.chain = chain
        self.first = snapshot_name(agreed) if agreed is not None else ""
        self.trees: dict[str, Shared] = {} if agreed is None else {self.first: agreed}
        self.acked: dict[int, str] = {}

    def whole(self, job: Job) -> Job:
        """The job with ``shared``, which its clients hold from now on; jobs without a view pass as they are.

        Raises:
            LichenError: if this node lacks the view that the job goes on from, or gets to another one.
        """
        if not job.snapshot:
            return job
        shared = job.shared if link(job) == "full" else self.trees.get(job.snapshot)
        if shared is None:
            shared = self._rebuilt(job)
        self.trees[job.snapshot] = shared
        self.acked.update(dict.fromkeys(job.clients, job.snapshot))
        needed = {*self.acked.values(), self.first}
        self.trees = {name: tree for name, tree in self.trees.items() if name in needed}
        return replace(job, shared=shared)

    def _rebuilt(self, job: Job) -> Shared:
        before = next(iter(job.acked.values()))
        if before not in self.trees or link(job) == "same":
            raise LichenError(f"holds no view {before} of the shared tensors", where="node", fix=RESEND)
        if self.chain is None:
            raise LichenError("does not know how steps are coded", where="node", fix="start it with the same recipe")
        snapshot = self.trees[before]
        for _, payload in job.deltas:
            snapshot = apply_delta(snapshot, payload, self.chain)
        if snapshot_name(snapshot) != job.snapshot:
            raise LichenError(
                f"came to view {snapshot_name(snapshot)} instead of {job.snapshot}",
                where="node",
                fix="start server and nodes with one version of lichen and of torch, and one recipe",
            )
        return snapshot
