"""Coalitions are closed by the round's own aggregator, whatever it is, in any order of arrival, from memory or disk.

Legend: C clients.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core import tree as trees
from lichen.core.collecting.history import History
from lichen.core.collecting.round_messages import RoundMessages
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, concatenate_messages, take_client
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.server.lowrank.lowrank import FedEx, FedIT
from lichen.server.lowrank.redistribute import FlexLoRA
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.value.coalitions import Coalitions
from lichen.server.value.game import exact, leave_one_out

START = Shared({"a.lora_A": torch.linspace(-1, 1, 14).view(2, 7), "a.lora_B": torch.linspace(-0.5, 1, 6).view(3, 2)})
RULES: dict[str, Aggregator] = {"mean": Mean(), "fedit": FedIT(), "fedex": FedEx(2.0), "flexlora": FlexLoRA(seed=1)}
CLIENTS = (2, 3, 5, 11)


def sent() -> Message:
    """Four clients: the second is the first one's twin, the third sends zeros, the last weighs most."""
    g = torch.Generator().manual_seed(0)
    tensors = {name: 0.3 * torch.randn(4, *x.shape, generator=g) for name, x in START.trainable.items()}
    for x_C in tensors.values():
        x_C[1], x_C[2] = x_C[0], 0.0
    return Message(
        group="g",
        client_C=torch.tensor(CLIENTS),
        version_C=torch.zeros(4, dtype=torch.int64),
        tensors=tensors,
        weight_C=torch.tensor([2.0, 2.0, 3.0, 5.0]).double(),
    )


def retained(folder: Path, message: Message, order: tuple[int, ...] = (0, 1, 2, 3), *, memory: int = 1 << 20) -> Any:
    messages = RoundMessages(History(folder), memory=memory)
    job = Job(work="w", shared=START, version=0, clients=CLIENTS, seed=0)
    for place in order:
        messages.put(0, take_client(message, place), job)
    return messages


def coalitions(messages: RoundMessages, rule: Aggregator, **more: Any) -> Coalitions:
    step = lambda change: ServerSGD().update(change, {}, START)[0]  # noqa: E731
    return Coalitions(messages=messages, aggregator=rule, start=START, step=step, **more)


def utility(shared: Shared) -> float:
    """Of the layer's weight as a model would have it, so that patches count."""
    dense = shared.trainable["a.lora_B"].double() @ shared.trainable["a.lora_A"].double() * 2.0
    left, right = shared.patch.get("a.left"), shared.patch.get("a.right")
    dense = dense if left is None or right is None else dense + left.double() @ right.double()
    return -float((dense - 0.7).square().sum())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("of", ["cohort", "coalition"])
def test_all_clients_together_are_the_round(tmp_path: Path, rule: Aggregator, of: Any) -> None:
    message = sent()
    change, _ = rule.close(rule.add(rule.zero(), message), START)
    found = coalitions(retained(tmp_path, message), rule, of=of).change(frozenset(CLIENTS))
    assert digest(found.flat()) == digest(change.flat())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_order_and_place_of_messages_change_no_bit(tmp_path: Path, rule: Aggregator) -> None:
    message, digests = sent(), set[str]()
    whole = RoundMessages(History(tmp_path / "whole"))
    whole.put(0, message, Job(work="w", shared=START, version=0, clients=CLIENTS, seed=0))
    spilled = retained(tmp_path / "spilled", message, (1, 3, 0, 2), memory=100)
    assert len(list((tmp_path / "spilled").rglob("*.safetensors"))) > 1
    for messages in (whole, retained(tmp_path / "back", message, (3, 2, 1, 0)), spilled):
        game = coalitions(messages, rule)
        assert game.players == CLIENTS
        digests.add(
            digest(trees.join("2.", game.shared(frozenset({2, 5})).flat(), game.shared(frozenset({11})).flat()))
        )
    assert len(digests) == 1
    left = History(tmp_path / "spilled")
    left.put(
        0,
        replace(take_client(message, 0), client_C=torch.tensor([77])),
        Job(work="w", shared=START, version=0, clients=(77,), seed=0),
    )
    spilled.clear()
    assert not list((tmp_path / "spilled").rglob("*.safetensors"))
    assert spilled.clients == ()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_twins_are_equal_and_who_sends_nothing_gets_nothing(tmp_path: Path, rule: Aggregator) -> None:
    game = coalitions(retained(tmp_path, sent()), rule)
    for values in (exact, leave_one_out):
        found = values(game.players, lambda coalition: utility(game.shared(coalition))).value
        assert found[2] == found[3] != 0.0
        assert found[5] == 0.0
    slopes = game.slopes({name: torch.ones_like(x) for name, x in START.trainable.items()})
    assert slopes[2] == slopes[3] != 0.0
    assert slopes[5] == 0.0


def test_the_cohort_keeps_its_shares_and_a_coalition_makes_new_ones(tmp_path: Path) -> None:
    message, some = sent(), frozenset({2, 11})
    share = {"cohort": (2 / 12, 5 / 12), "coalition": (2 / 7, 5 / 7)}
    for of, (first, last) in share.items():
        change = coalitions(retained(tmp_path / of, message), Mean(), of=of).change(some).trainable  # type: ignore[arg-type]
        for name, x_C in message.tensors.items():
            torch.testing.assert_close(change[name], first * x_C[0] + last * x_C[3])


def test_the_empty_coalition_goes_on_along_the_servers_momentum(tmp_path: Path) -> None:
    momentum = {f"m/{name}": torch.ones_like(x) for name, x in START.trainable.items()}
    server = ServerSGD(momentum=0.5)
    for of in ("cohort", "coalition"):
        game = replace(
            coalitions(retained(tmp_path / of, sent()), Mean(), of=of),
            step=lambda change: server.update(change, momentum, START)[0],
        )
        for name, x in game.shared(frozenset()).trainable.items():
            torch.testing.assert_close(x, START.trainable[name] + 0.5)


def test_only_messages_that_count_are_players(tmp_path: Path) -> None:
    messages = retained(tmp_path, sent(), memory=100)
    messages.retain(0, (2, 11))
    assert messages.clients == (2, 11)
    with pytest.raises(LichenError, match="client 3 has no message"):
        messages.message(3)
    assert messages.message(11).weight_C.tolist() == [5.0]
    beside = History(tmp_path / "beside")
    both = RoundMessages(History(tmp_path / "spill"), history=beside)
    one = concatenate_messages([take_client(sent(), 0), take_client(sent(), 3)])
    both.put(4, one, Job(work="w", shared=START, version=4, clients=(2, 11), seed=0))
    both.retain(4, (11,))
    both.clear()
    assert (beside.rounds(), beside.clients(4)) == ([4], [11])
