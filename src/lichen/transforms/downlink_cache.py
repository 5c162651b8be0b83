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
from lichen.core.tree import Tree
from lichen.transforms.codec import Chain
from lichen.transforms.delta import take_step, view_name

__all__ = ["Views"]

RESEND = "start the run again with --resume: views are sent whole to a node that lacks them"


@final
class Views:
    """The views of a node's clients.

    Args:
        chain: What the server codes steps with; None: it sends none.
        agreed: What every client holds before its first job.
    """

    def __init__(self, chain: Chain | None = None, agreed: Tree | None = None) -> None:
        self.chain = chain
        self.first = view_name(agreed) if agreed is not None else ""
        self.trees: dict[str, Tree] = {} if agreed is None else {self.first: agreed}
        self.held: dict[int, str] = {}

    def whole(self, job: Job) -> Job:
        """The job with ``shared``, which its clients hold from now on; jobs without a view pass as they are.

        Raises:
            LichenError: if this node lacks the view that the job goes on from, or gets to another one.
        """
        if not job.view:
            return job
        shared = job.shared if link(job) == "full" else self.trees.get(job.view)
        if shared is None:
            shared = self._rebuilt(job)
        self.trees[job.view] = shared
        self.held.update(dict.fromkeys(job.clients, job.view))
        needed = {*self.held.values(), self.first}
        self.trees = {name: tree for name, tree in self.trees.items() if name in needed}
        return replace(job, shared=shared)

    def _rebuilt(self, job: Job) -> Tree:
        before = next(iter(job.held.values()))
        if before not in self.trees or link(job) == "same":
            raise LichenError(f"holds no view {before} of the shared tensors", where="node", fix=RESEND)
        if self.chain is None:
            raise LichenError("does not know how steps are coded", where="node", fix="start it with the same recipe")
        view = self.trees[before]
        for _, payload in job.steps:
            view = take_step(view, payload, self.chain)
        if view_name(view) != job.view:
            raise LichenError(
                f"came to view {view_name(view)} instead of {job.view}",
                where="node",
                fix="start server and nodes with one version of lichen and of torch, and one recipe",
            )
        return view
