"""The column ``personal``: every client scored with a model of its own, in the place of the one that all share.

Where clients train their own tensors in the rounds, the models are those of the round whose shared tensors were kept.
Fine-tuning begins where the rounds have ended: each client goes on from the kept tensors by itself, and of several
numbers of steps it takes the one that is best on its validation rows.
"""

from __future__ import annotations

from lichen.algorithms.alone import Alone
from lichen.algorithms.finetune import Finetune
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.column import Column, admission_of
from lichen.recipes.assemble.experiment import lr_name, values_N
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.personal import stages_of
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.tasks.learning import Engines, EventObserver, go_rounds, observing, scored

__all__ = ["personal_column"]

NAME = "personal"


def personal_column(
    server: ServerSide, folder: RunFolder, observer: EventObserver, engines: Engines, federated: Column
) -> dict[str, Column]:
    """The column by its name; none where the recipe has no section ``personal``, or the shared model no scores.

    Args:
        server: The server's side.
        folder: The run folder.
        observer: Sees every stage.
        engines: Make an engine whose clients keep their private state in a store.
        federated: The finished column of the shared model.

    Raises:
        LichenError: if a client could not say its score, or was not there.
    """
    if federated.personal is not None:
        return {NAME: federated.personal}
    stages, lr = stages_of(server.recipe), federated.lr
    if not stages or lr is None or not len(federated.value_N):
        return {}
    engine = engines(ClientStore(folder.clients(NAME, lr_name(lr)), listed=True))
    admission, shared, count = admission_of(server), federated.shared or Shared(), len(stages)
    alone = Alone(
        clients=len(server.roster),
        rounds=count,
        valid="personal.valid",
        base=server.model.base,
        admission=admission,
    )
    go_rounds(
        server,
        Finetune(alone=alone, works=tuple(f"personal {lr_name(lr)}{at}" for at in stages)),
        engine,
        count,
        folder.checkpoint(NAME, lr_name(lr)),
        observing(observer, NAME, lr, count),
        folder.ranks.ask_first,
        folder.save,
        initial=shared,
        stop=lambda state: False,
    )
    metrics = folder.tree(
        NAME, lambda: scored(server, engine, shared, work="personal.test", version=2 * count, admission=admission)
    )
    return {NAME: Column(value_N=values_N(server.recipe, metrics), metrics=metrics, lr=lr)}
