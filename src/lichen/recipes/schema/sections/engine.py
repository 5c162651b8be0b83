"""The ``engine`` section: where clients run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lichen.recipes.schema.federation import ClockConfig
from lichen.recipes.schema.model import Positive, Section
from lichen.recipes.schema.names import EngineName

__all__ = ["EngineConfig"]


class EngineConfig(Section):
    """Where clients run."""

    name: EngineName = Field(
        default="local",
        description="`local`: this process; `spawned`: clients behind pipes, in processes such as a real node's; "
        "`distributed`: ranks that share out the clients and add up their sums, on this machine or by torchrun on many",
    )
    clients_per_block: Positive | None = Field(
        default=None, description="clients side by side; none: as many as memory holds and the processor gains from"
    )
    packing: bool = Field(
        default=True,
        description="rows back to back without padding, several clients in one call; "
        "false: padded, a call a client, so that a client's numbers have the same bits in any company",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="keep only what goes into each layer and compute the rest again on the way back; "
        "none: when one client alone would not fit",
    )
    history: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="the server's state after every so many rounds, and the clients' private state that goes with it, "
        "stay in the run's folder, so that `lichen forget` need not begin at round 0; 0: the last two rounds alone",
    )
    nodes: Positive = Field(default=2, description="processes, for spawned and distributed")
    clock: ClockConfig | None = Field(
        default=None, description="virtual time, in which clients take long; none: they take the time they take"
    )
