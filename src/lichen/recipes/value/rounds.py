"""Rounds of a recipe whose clients are valued."""

from __future__ import annotations

from pathlib import Path

from lichen.algorithms.average import Average
from lichen.algorithms.valued import Valued
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.evaluation.gradient import Gradient
from lichen.core.contracts.client import ClientTask, ClientWork
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.store import ClientStore
from lichen.data.batches.shards import EvalSource, Shard
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.experiment import lr_name
from lichen.recipes.assemble.parts import validators_of
from lichen.recipes.assemble.sides.limits import counting
from lichen.recipes.assemble.sides.server import ServerSide, participants
from lichen.recipes.assemble.sides.valuing.works import GRADIENT, OWN_VALUE, values_itself
from lichen.server.value.game import MOST_EXACT

__all__ = ["SPILL", "valued"]

SPILL = "messages"
"""Folder beside the checkpoint for messages of a round that memory does not hold."""


def valued(server: ServerSide, rounds: Average, folder: Path, lr: float) -> Valued:
    """The rounds, valued as the recipe says.

    Args:
        server: The server's side.
        rounds: The federation's.
        folder: Where they may leave messages until a round is over.
        lr: The clients' learning rate.

    Raises:
        LichenError: if all coalitions of a round are too many.
    """
    config = server.recipe.value
    assert config is not None
    if config.kind == "exact" and participants(server) > MOST_EXACT:
        raise LichenError(
            f"{participants(server)} clients in a round have 2^{participants(server)} coalitions",
            where="value.kind",
            fix=f"use gtg, or federation.clients_per_round up to {MOST_EXACT}",
        )
    judges, admission, own = validators_of(server), rounds.admission, None
    if config.rows == "public":
        assert server.labelled is not None
        own = _of_rows(server, server.labelled, folder)
        judges, admission = (0,), counting("valid", Evaluate(server.model), (server.labelled.size,))
    return Valued(
        rounds=rounds,
        kind=config.kind,
        of=config.of,
        every=config.every,
        spill=folder / SPILL,
        judges=judges,
        admission=admission,
        server=own,
        own_work=f"{OWN_VALUE} {lr_name(lr)}" if values_itself(server.recipe) else "",
    )


def _of_rows(server: ServerSide, rows: Shard, folder: Path) -> Engine:
    """The server's own rows, as client 0 of an engine."""
    source = EvalSource((rows,), batch_size=64, pad=server.pad, max_length=server.recipe.data.max_length)
    works: dict[str, ClientWork] = {"valid": Evaluate(server.model), GRADIENT: Gradient(server.model)}
    return LocalEngine(
        {name: ClientTask(work=work, source=source) for name, work in works.items()},
        ClientStore(folder / "none"),
        base=server.model.base,
        device=server.recipe.model.device,
    )
