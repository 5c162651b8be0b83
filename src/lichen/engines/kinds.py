"""Every engine that a recipe can name: what it allows, how many processes it is, and how it is made.

Nothing heavy is imported before an engine is made, so that recipes are read fast. How to add an engine of your own, in
this table or by the entry point ``lichen.engines``: :mod:`lichen.declared` and ``docs/extending.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lichen.declared import Family, Need, Paper, Property

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lichen.core.contracts.engine import Engine
    from lichen.engines.local import LocalEngine
    from lichen.engines.pipe_sites import PipeSites
    from lichen.engines.ranks import Ranks

__all__ = ["DECIDES", "ENGINES", "EngineKind", "EngineSettings"]

DECIDES = frozenset({Property.ALL_ROWS, Property.ONE_SERVER})
"""Properties of a recipe that its engine may allow or not."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a recipe tells an engine.

    Attributes:
        local: Makes the engine of this process, with everything a client of the recipe can be asked.
        ranks: The ranks that run this program; one where nobody started more.
        command: Starts a process that serves jobs on standard input; see :mod:`lichen.engines.node`.
        nodes: Processes that the recipe asks for.
        children: Such processes that serve several engines of a run; None: an engine starts its own, and ends them.
        state: Name of the private state that the engine's jobs are for, where there are such.
        agreed: Digest of the tensors that all begin from, where changes alone are sent down; else empty.
    """

    local: Callable[[], LocalEngine]
    ranks: Ranks
    command: Sequence[str] = ()
    nodes: int = 1
    children: PipeSites | None = None
    state: str = ""
    agreed: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """Where clients run.

    Attributes:
        name: The word in a recipe, under ``engine.name``.
        summary: What it does, in one line.
        make: The engine, which is closed after use.
        papers: Where it comes from.
        needs: What the rest of the recipe must allow.
        allows: Which of :data:`DECIDES` hold with it.
        reads: Keys of the section ``engine`` that say something to it, and not to every engine; None: all.
        ranks: Several ranks run one program, each with its share of the clients.
        nodes: Clients live in processes beside this one, each of which opens the recipe for itself.
    """

    name: str
    summary: str
    make: Callable[[EngineSettings], AbstractContextManager[Engine]]
    papers: tuple[Paper, ...] = ()
    needs: tuple[Need, ...] = ()
    allows: frozenset[Property] = frozenset()
    reads: frozenset[str] | None = None
    ranks: bool = False
    nodes: bool = False


@contextmanager
def _local(settings: EngineSettings) -> Iterator[Engine]:
    yield settings.local()


@contextmanager
def _spawned(settings: EngineSettings) -> Iterator[Engine]:
    from lichen.engines.spawned import SpawnedEngine, over_children

    if settings.children is not None:
        with over_children(settings.children, state=settings.state, agreed=settings.agreed) as shared:
            yield shared
        return
    with SpawnedEngine(settings.command, nodes=settings.nodes, agreed=settings.agreed) as engine:
        yield engine


@contextmanager
def _distributed(settings: EngineSettings) -> Iterator[Engine]:
    from lichen.engines.distributed import DistributedEngine

    local = settings.local()
    yield local if settings.ranks.size == 1 else DistributedEngine(local, settings.ranks)


ENGINES = Family(
    "lichen.engines",
    EngineKind,
    decides=DECIDES,
    members=(
        EngineKind(
            name="local", summary="this process", make=_local, allows=DECIDES, reads=frozenset({"clients_per_block"})
        ),
        EngineKind(
            name="spawned",
            summary="processes that exchange bytes through pipes, each with its own clients",
            make=_spawned,
            allows=frozenset({Property.ONE_SERVER}),
            reads=frozenset({"nodes", "clients_per_block"}),
            nodes=True,
        ),
        EngineKind(
            name="distributed",
            summary="ranks that share out the clients and add up their sums",
            make=_distributed,
            allows=frozenset({Property.ALL_ROWS}),
            reads=frozenset({"nodes", "clients_per_block"}),
            ranks=True,
        ),
    ),
)
"""The engines in the order of the guide."""
