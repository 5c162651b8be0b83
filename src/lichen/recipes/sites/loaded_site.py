"""A site at its place in the roster: what its own clients can be asked, and of nobody else anything."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

from lichen.clients.masking.masked import Masked
from lichen.core.contracts.client import ClientTask, ClientWork, Dialogue, Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.masks.party import Identity
from lichen.core.wire.shared import Shared
from lichen.recipes.sites.own_models import LeftAtSite, Writer
from lichen.recipes.sites.rounds_node import Node

__all__ = ["LoadedSite"]


@final
@dataclass(frozen=True, slots=True)
class OwnClients:
    """A source of the site's own clients alone: a job for another is refused before anything is done.

    Args:
        inner: Gives the batches.
        own: The clients of this site.
    """

    inner: Source
    own: frozenset[int]

    def _check(self, clients: Sequence[int]) -> None:
        if others := [client for client in clients if client not in self.own]:
            raise LichenError(f"client {others[0]} is not of this site", where="data", fix="ask its own site")

    def shape(self, client: int) -> Hashable:
        """The inner source's, of a client of this site."""
        self._check([client])
        return self.inner.shape(client)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The inner source's, of clients of this site."""
        self._check(clients)
        return self.inner.batches(clients, seed)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSite:
    """A site at its place in the roster: a node of its own clients alone.

    Attributes:
        node: Answers; of other sites' clients it knows only that they are there.
        numbers: Its clients' numbers in the roster.
        identity: Signs for its clients under masks, and knows those of others; None: whoever carries keys is believed.
        write: Leaves its clients' own models as files when they are scored; None: there are none.
    """

    node: Node
    numbers: tuple[int, ...]
    identity: Identity | None = None
    write: Writer | None = None

    @property
    def base(self) -> str:
        """Digest of the frozen model."""
        return self.node.base

    @property
    def start(self) -> Shared:
        """What all begin from."""
        return self.node.start

    def client_tasks(self) -> dict[str, ClientTask]:
        """All that its clients can be asked to do, by their numbers in the roster; of others everything is refused."""
        own = frozenset(self.numbers)
        made = self.node.client_tasks()
        return {
            name: replace(task, work=self._known(name, task.work), source=OwnClients(task.source, own))
            for name, task in made.items()
        }

    def _known(self, name: str, work: ClientWork | Dialogue) -> ClientWork | Dialogue:
        """The work, whose masks are between clients who know one another; a score of own models leaves these."""
        if self.write is not None and name == "personal.test" and not isinstance(work, Dialogue):
            return LeftAtSite(work, self.write)
        return replace(work, identity=self.identity) if isinstance(work, Masked) else work
