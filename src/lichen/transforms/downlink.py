"""Downlink compression: which snapshot each client holds, and the deltas to the newest.

Part of the server's state. A client that holds the newest view is sent nothing, one that holds an older
view the steps since then, any other the whole view. So many steps are kept as weigh less than the view
itself: who is further behind gets that for less.

Legend: N clients of the roster, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.transforms.codec import Chain
from lichen.transforms.delta import encode_step, take_step, view_name

__all__ = ["Links"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What is known of the clients' views.

    Attributes:
        view: The newest: what every client that is asked for something will hold.
        name: Its digest.
        number: Steps that were ever taken to it.
        steps: ``(digest of the view before, what leads on)``, oldest first; the last leads to ``view``.
        held_N: int64, the number of the view each client holds; -1: none.
    """

    view: Tree
    name: str
    number: int
    steps: tuple[tuple[str, Tree], ...]
    held_N: Tensor

    @classmethod
    def begin(cls, shared: Tree, clients: int, *, agreed: bool) -> Links:
        """Nothing was sent yet; ``agreed``: all hold ``shared``, as they can make it themselves."""
        held_N = torch.full((clients,), 0 if agreed else -1, dtype=torch.int64)
        return cls(view=dict(shared), name=view_name(shared), number=0, steps=(), held_N=held_N)

    def job(self, job: Job) -> Job:
        """The same job over the view, and what its clients know of that."""
        first = self.number - len(self.steps)
        names = {first + i: before for i, (before, _) in enumerate(self.steps)} | {self.number: self.name}
        numbers = self.held_N[list(job.clients)].tolist()
        held = {c: names[n] for c, n in zip(job.clients, numbers, strict=True) if n in names}
        return replace(job, shared=self.view, view=self.name, steps=self.steps, held=held)

    def told(self, clients: Sequence[int]) -> Links:
        """After these have been sent the view."""
        held_N = self.held_N.clone()
        held_N[list(clients)] = self.number
        return replace(self, held_N=held_N)

    def towards(self, shared: Tree, chain: Chain, seed: int) -> Links:
        """One step on."""
        payload = encode_step(shared, self.view, chain, seed)
        view = take_step(self.view, payload, chain)
        steps = (*self.steps, (self.name, payload))
        while steps and sum(trees.nbytes(step) for _, step in steps) >= trees.nbytes(view):
            steps = steps[1:]
        return replace(self, view=view, name=view_name(view), number=self.number + 1, steps=steps)

    def tree(self) -> Tree:
        """As tensors, for :class:`lichen.core.contracts.ServerState`."""
        out = trees.join("view/", self.view, {"held": self.held_N, "number": torch.tensor(self.number)})
        names = [*(before for before, _ in self.steps), self.name]
        out["names"] = torch.tensor([list(bytes.fromhex(name)) for name in names], dtype=torch.uint8)
        for i, (_, payload) in enumerate(self.steps):
            out = trees.join(f"step/{i}/", payload, out)
        return out

    @classmethod
    def of(cls, tree: Tree) -> Links:
        """Undo :meth:`tree`."""
        names = [bytes(row).hex() for row in tree["names"].tolist()]
        steps = tuple((name, trees.split(tree, f"step/{i}/")[0]) for i, name in enumerate(names[:-1]))
        view, _ = trees.split(tree, "view/")
        return cls(view=view, name=names[-1], number=int(tree["number"]), steps=steps, held_N=tree["held"])
