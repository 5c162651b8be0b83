"""A node whose clients train in rounds, and what hides their rows where noise does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, cast, final

from lichen.clients.masking.masked import Masked
from lichen.core.contracts.client import ClientTask, ClientWork, Dialogue
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.sides.clients import Secret
from lichen.recipes.assemble.sides.privacy import OwnAccounts
from lichen.recipes.assemble.sides.summed_scores import SUMMED_TEST
from lichen.recipes.assemble.sides.valuing.works import GRADIENT, OWN_VALUE

__all__ = ["Node", "RoundsNode"]


class Node(Protocol):
    """What answers jobs."""

    @property
    def base(self) -> str:
        """Digest of the frozen model."""
        ...

    @property
    def start(self) -> Shared:
        """What its clients begin from."""
        ...

    def client_tasks(self) -> dict[str, ClientTask]:
        """All that its clients can be asked to do."""
        ...


@final
@dataclass(frozen=True, slots=True)
class RoundsNode:
    """A node whose clients train in rounds.

    Args:
        experiment: What their tasks are made of.
        secret: What hides their rows, asked for when they are to train; None: nothing does.
        accounts: What they pay from for themselves, and their own secret; None: nobody but the server pays.
    """

    experiment: Experiment
    secret: Callable[[], Secret | None] = lambda: None
    accounts: OwnAccounts | None = None

    @property
    def base(self) -> str:
        """Digest of the frozen model."""
        return self.experiment.model.base

    @property
    def start(self) -> Shared:
        """What all begin from."""
        return self.experiment.start

    def client_tasks(self) -> dict[str, ClientTask]:
        """All that its clients can be asked to do; under privacy they train, and answer nothing that is their own."""
        recipe = self.experiment.recipe
        if recipe.privacy is None:
            return client_tasks(self.experiment)
        if recipe.noised is None:
            answered = {"roster", "train", "valid", SUMMED_TEST, GRADIENT, OWN_VALUE}
            made = client_tasks(self.experiment)
            return {name: task for name, task in made.items() if name.partition(" ")[0] in answered}
        secret = self.secret() if self.accounts is None else self.accounts.secret
        made = client_tasks(replace(self.experiment, clients=replace(self.experiment.clients, secret=secret)))
        train = {name: task for name, task in made.items() if name.startswith("train ")}
        if self.accounts is not None:
            train = {name: replace(task, work=self._paid(task.work)) for name, task in train.items()}
        return {"roster": made["roster"], **train}

    def _paid(self, work: ClientWork | Dialogue) -> ClientWork | Dialogue:
        """Training that its clients pay for, under its masks where it has some."""
        assert self.accounts is not None
        if isinstance(work, Masked):
            return replace(work, inner=self.accounts.paid(work.inner))
        return self.accounts.paid(cast(ClientWork, work))
