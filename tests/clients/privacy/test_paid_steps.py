"""Clients pay for training before a row is read: never less than what has left, and never past their limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lichen.clients.privacy.paid_steps import PaidSteps
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.secret.budget import Budget
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from support.toy_cohorts import job

BATCHES: list[Batch] = [{"x": torch.zeros(1)}, {"x": torch.ones(1)}]


class Work:
    """Says what it was asked, and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.said = fails, list[str]()

    def _say(self, what: str) -> None:
        self.said.append(what)
        if what == self.fails:
            raise LichenError("is not finite", where=what)

    def expected(self, job: Job) -> Expected:
        return Expected(group="")

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> tuple[int, ...]:
        self._say("init")
        return tuple(clients)

    def step(self, state: tuple[int, ...], batch: Batch) -> tuple[int, ...]:
        self._say("step")
        return state

    def final(self, state: tuple[int, ...]) -> tuple[Message, Tree | None]:
        self._say("final")
        ids = torch.tensor(state)
        return Message(group="", client_C=ids, version_C=ids, tensors={}, weight_C=torch.ones(len(state))), None


def account(folder: Path, client: int) -> Budget:
    return Budget(folder / f"{client}.jsonl", terms={"sigma": 1.0}, limit=2, gaps=True)


def train(folder: Path, version: int, clients: tuple[int, ...], *, fails: str = "", upto: int = 3) -> Work:
    """A training as engines fold it, broken off after so many calls."""
    inner = Work(fails)
    work = PaidSteps(inner, lambda client: account(folder, client))
    asked = replace(job(Shared({}), clients), version=version)
    state = work.init(asked, clients, None)
    for batch in BATCHES[:upto]:
        state = work.step(state, batch)
    if upto > len(BATCHES):
        work.final(state)
    return inner


def charges(folder: Path) -> list[int]:
    return [account(folder, client).charges for client in range(3)]


def test_each_client_pays_for_the_rounds_it_was_asked_in(tmp_path: Path) -> None:
    train(tmp_path, 0, (0, 1))
    train(tmp_path, 3, (1, 2))
    assert charges(tmp_path) == [1, 2, 1]


def test_what_was_broken_off_goes_on_with_its_charge_and_what_left_is_charged_again(tmp_path: Path) -> None:
    train(tmp_path, 0, (0,), upto=1)
    train(tmp_path, 0, (0,))
    assert charges(tmp_path)[0] == 1
    train(tmp_path, 0, (0,))
    assert charges(tmp_path)[0] == 2


@pytest.mark.parametrize("where", ["init", "step", "final"])
def test_why_there_is_no_message_is_told_and_so_is_paid_for(where: str, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="not finite"):
        train(tmp_path, 0, (0,), fails=where)
    train(tmp_path, 0, (0,))
    assert charges(tmp_path)[0] == 2


def test_what_would_pass_epsilon_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    train(tmp_path, 0, (0,))
    train(tmp_path, 5, (0,))
    inner = Work()
    with pytest.raises(LichenError, match="would pass ε"):
        PaidSteps(inner, lambda client: account(tmp_path, client)).init(job(Shared({}), (0,)), (0,), None)
    assert inner.said == []
