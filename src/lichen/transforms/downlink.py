"""What happens to a job on its way down to clients: nothing, a part for each capacity, or steps from what they hold.

A downlink is a value; what it remembers is a tree in the server's state. With :class:`Deltas` clients hold *views*: who
holds the newest is sent nothing, who holds an older one the steps since then, any other the whole view. So many steps
are kept as weigh less than the view itself: who is further behind gets that for less.

Legend: N clients of the roster, S steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.server import Submodel
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.transforms.codec import Chain
from lichen.transforms.delta import apply_delta, encode_delta, snapshot_name

__all__ = ["WHOLE", "Deltas", "Direct", "Downlink", "DownlinkState"]


class Downlink(Protocol):
    """How clients are brought the shared tensors; its state is empty where it remembers nothing."""

    @property
    def agreed(self) -> bool:
        """Clients make the first tensors themselves, and are not sent them."""
        ...

    def init(self, shared: Shared, clients: int, *, first: bool) -> Tree:
        """The state before anything was sent.

        Args:
            shared: The server's tensors.
            clients: How many the roster has.
            first: No round was before; a run may go on that had no such downlink.
        """
        ...

    def jobs(self, job: Job, state: Tree, *, whole: bool = False) -> tuple[Job, ...]:
        """The jobs that go out in this one's place; together they name its clients, each once.

        Args:
            job: Over the server's tensors.
            state: What is known of the clients.
            whole: All clients get the same tensors, as they judge what is kept.
        """
        ...

    def snapshot(self, shared: Shared, state: Tree) -> Shared:
        """What clients get who are sent all of ``shared``, the server's tensors."""
        ...

    def acknowledge(self, job: Job, clients: Sequence[int], state: Tree) -> Tree:
        """The state after these have answered a job that went out, in this round or a former one."""
        ...

    def advance(self, shared: Shared, state: Tree, seed: int) -> Tree:
        """The state after the server's step to ``shared``."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Direct:
    """Clients are sent the server's own tensors, weaker ones a part of them.

    Args:
        capacity: What weaker clients get in training; None: all get the same.
    """

    capacity: Submodel | None = None

    @property
    def agreed(self) -> bool:
        """The first tensors are sent, too."""
        return False

    def init(self, shared: Shared, clients: int, *, first: bool) -> Tree:
        """Nothing."""
        return {}

    def jobs(self, job: Job, state: Tree, *, whole: bool = False) -> tuple[Job, ...]:
        """The job, or one for each capacity."""
        if self.capacity is None or whole:
            return (job,)
        by_key: dict[Hashable, list[int]] = {}
        for client in job.clients:
            by_key.setdefault(self.capacity.key(client), []).append(client)
        return tuple(
            replace(job, clients=tuple(some), shared=self.capacity.extract(job.shared, key))
            for key, some in by_key.items()
        )

    def snapshot(self, shared: Shared, state: Tree) -> Shared:
        """The same."""
        return shared

    def acknowledge(self, job: Job, clients: Sequence[int], state: Tree) -> Tree:
        """Nothing."""
        return {}

    def advance(self, shared: Shared, state: Tree, seed: int) -> Tree:
        """Nothing."""
        return {}


WHOLE = Direct()
"""All clients are sent all tensors."""


@final
@dataclass(frozen=True, slots=True)
class Deltas:
    """Clients hold a view that follows the server's tensors by coded steps (:mod:`lichen.transforms.delta`).

    They train from it, and it is what is validated and kept.

    Args:
        chain: Codes the steps.
        agreed: Clients make the first view themselves.
    """

    chain: Chain
    _: KW_ONLY
    agreed: bool = False

    def init(self, shared: Shared, clients: int, *, first: bool) -> Tree:
        """A first view, which all hold if it is agreed on."""
        return DownlinkState.initial(shared, clients, agreed=self.agreed and first).tree()

    def jobs(self, job: Job, state: Tree, *, whole: bool = False) -> tuple[Job, ...]:
        """One, over the view."""
        return (DownlinkState.of(state).job(job),)

    def snapshot(self, shared: Shared, state: Tree) -> Shared:
        """The view."""
        return DownlinkState.of(state).snapshot

    def acknowledge(self, job: Job, clients: Sequence[int], state: Tree) -> Tree:
        """They hold that job's view, or a newer one."""
        if not clients:
            return state
        return DownlinkState.of(state).acknowledge(clients, job.snapshot).tree()

    def advance(self, shared: Shared, state: Tree, seed: int) -> Tree:
        """The view, one step on."""
        return DownlinkState.of(state).advance(shared, self.chain, seed).tree()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DownlinkState:
    """What is known of the clients' views.

    Attributes:
        snapshot: The newest: what every client that is asked for something will hold.
        name: Its digest.
        number: Steps that were ever taken to it.
        deltas: ``(digest of the snapshot before, what leads on)``, oldest first; the last leads to ``snapshot``.
        acked_N: int64, the number of the view each client holds; -1: none.
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
        deltas = [(name, Tree()) for name in names[:-1]]
        for name, x in trees.split(tree, "step/")[0].items():
            number, _, part = name.partition("/")
            deltas[int(number)][1][part] = x
        snapshot, _ = trees.split(tree, "view/")
        return cls(
            snapshot=Shared.of_flat(snapshot),
            name=names[-1],
            number=int(tree["number"]),
            deltas=tuple(deltas),
            acked_N=tree["held"],
        )
