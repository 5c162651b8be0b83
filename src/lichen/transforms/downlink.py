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
from lichen.core.wire.shared import Shared
from lichen.transforms.codec import Chain
from lichen.transforms.delta import apply_delta, encode_delta, snapshot_name

__all__ = ["DownlinkState"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DownlinkState:
    """What is known of the clients' views.

    Attributes:
        snapshot: The newest: what every client that is asked for something will hold.
        name: Its digest.
        number: Steps that were ever taken to it.
        deltas: ``(digest of the snapshot before, what leads on)``, oldest first; the last leads to ``snapshot``.
        held_N: int64, the number of the view each client holds; -1: none.
    """

    snapshot: Shared
    name: str
    number: int
    deltas: tuple[tuple[str, Tree], ...]
    acked_N: Tensor

    @classmethod
    def initial(cls, shared: Shared, clients: int, *, agreed: bool) -> DownlinkState:
        """Nothing was sent yet; ``agreed``: all hold ``shared``, as they can make it themselves."""
        acked_N = torch.full((clients,), 0 if agreed else -1, dtype=torch.int64)
        return cls(snapshot=shared, name=snapshot_name(shared), number=0, deltas=(), acked_N=acked_N)

    def job(self, job: Job) -> Job:
        """The same job over the view, and what its clients know of that."""
        names = self._names()
        numbers = self.acked_N[list(job.clients)].tolist()
        acked = {c: names[n] for c, n in zip(job.clients, numbers, strict=True) if n in names}
        return replace(job, shared=self.snapshot, snapshot=self.name, deltas=self.deltas, acked=acked)

    def acknowledge(self, clients: Sequence[int], name: str | None = None) -> DownlinkState:
        """After these have answered a job over the view of this name, by default the newest.

        Who holds a newer one keeps that. A view from which no step is kept leads nowhere: it is no news.
        """
        numbers = [number for number, known in self._names().items() if name in (None, known)]
        if not numbers:
            return self
        acked_N = self.acked_N.clone()
        acked_N[list(clients)] = acked_N[list(clients)].clamp(min=max(numbers))
        return replace(self, acked_N=acked_N)

    def _names(self) -> dict[int, str]:
        """The newest view's name, and those of views from which steps lead there, by number."""
        first = self.number - len(self.deltas)
        return {first + i: before for i, (before, _) in enumerate(self.deltas)} | {self.number: self.name}

    def advance(self, shared: Shared, chain: Chain, seed: int) -> DownlinkState:
        """One step on."""
        payload = encode_delta(shared, self.snapshot, chain, seed)
        snapshot = apply_delta(self.snapshot, payload, chain)
        deltas = (*self.deltas, (self.name, payload))
        while deltas and sum(trees.nbytes(step) for _, step in deltas) >= snapshot.nbytes:
            deltas = deltas[1:]
        return replace(self, snapshot=snapshot, name=snapshot_name(snapshot), number=self.number + 1, deltas=deltas)

    def tree(self) -> Tree:
        """As tensors, for :class:`lichen.core.contracts.algorithm.ServerState`."""
        out = trees.join("view/", self.snapshot.flat(), {"held": self.acked_N, "number": torch.tensor(self.number)})
        names = [*(before for before, _ in self.deltas), self.name]
        out["names"] = torch.tensor([list(bytes.fromhex(name)) for name in names], dtype=torch.uint8)
        for i, (_, payload) in enumerate(self.deltas):
            out = trees.join(f"step/{i}/", payload, out)
        return out

    @classmethod
    def of(cls, tree: Tree) -> DownlinkState:
        """Undo :meth:`tree`."""
        names = [bytes(row).hex() for row in tree["names"].tolist()]
        deltas = tuple((name, trees.split(tree, f"step/{i}/")[0]) for i, name in enumerate(names[:-1]))
        snapshot, _ = trees.split(tree, "view/")
        return cls(
            snapshot=Shared.of_flat(snapshot),
            name=names[-1],
            number=int(tree["number"]),
            deltas=deltas,
            acked_N=tree["held"],
        )
