"""FedMKT's choice: a loop over texts and clients is the oracle; order, grouping and bytes change nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from lichen.core.errors import LichenError
from lichen.core.message import Message, concatenate_messages, take_client
from lichen.core.tree import digest, plain
from lichen.research.mutual.select import Select
from support.flat import closed

STARTS = (0, 2, 5, 5, 6)
MEMBER = Select(STARTS)


def tellings(clients: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return Message(
        group="tokens/x/3",
        client_C=torch.randperm(50, generator=g)[:clients],
        version_C=torch.zeros(clients, dtype=torch.int64),
        tensors={
            "index": torch.randint(-1, 99, (clients, 6, 3), generator=g, dtype=torch.int16),
            "prob": torch.rand(clients, 6, 3, generator=g).half(),
            # Few values, so that losses are often equal.
            "loss": torch.randint(0, 3, (clients, 4), generator=g).float(),
        },
        weight_C=torch.ones(clients, dtype=torch.float64),
    )


def outcome(total: Any, own: Any = None) -> Any:
    answers, metrics = closed(MEMBER, total, {} if own is None else {"answers.loss": own})
    return digest(answers), metrics


@given(clients=st.integers(1, 7), seed=st.integers(0, 999), own=st.lists(st.floats(-1, 3), min_size=4, max_size=4))
def test_equals_a_loop_over_texts(clients: int, seed: int, own: Any) -> None:
    message = tellings(clients, seed)
    answers, metrics = closed(MEMBER, MEMBER.add(MEMBER.zero(), message), {"answers.loss": torch.tensor(own)})
    believed = 0
    for n in range(4):
        told = [(float(message.tensors["loss"][c, n]), int(message.client_C[c]), c) for c in range(clients)]
        loss, client, c = min(told)
        here = slice(STARTS[n], STARTS[n + 1])
        assert float(answers["answers.loss"][n]) == loss
        if loss < torch.tensor(own[n]).item():
            believed += 1
            assert int(answers["answers.client"][n]) == client
            assert torch.equal(answers["answers.index"][here], message.tensors["index"][c, here])
            assert torch.equal(answers["answers.prob"][here], message.tensors["prob"][c, here])
        else:
            assert int(answers["answers.client"][n]) == -1
            assert bool((answers["answers.index"][here] == -1).all())
            assert not answers["answers.prob"][here].any()
    assert metrics == {"clients": clients, "believed": believed / 4}


@given(clients=st.integers(1, 7), seed=st.integers(0, 999))
def test_any_order_blocks_merging_and_bytes_give_the_same(clients: int, seed: int) -> None:
    message = tellings(clients, seed)
    whole = outcome(MEMBER.add(MEMBER.zero(), message))
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed)).tolist()
    line, left, right = MEMBER.zero(), MEMBER.zero(), MEMBER.zero()
    for at, c in enumerate(order):
        one = take_client(message, c)
        line = MEMBER.add(line, one)
        left, right = (MEMBER.add(left, one), right) if at % 2 else (left, MEMBER.add(right, one))
    tensors, header = MEMBER.dump(left)
    crossed = MEMBER.load(load(save(plain(tensors))), json.loads(json.dumps(header)))
    assert outcome(line) == whole
    assert outcome(MEMBER.merge(crossed, right)) == whole
    assert outcome(MEMBER.merge(right, crossed)) == whole
    block = concatenate_messages([take_client(message, c) for c in order])
    assert outcome(MEMBER.add(MEMBER.zero(), replace(block, weight_C=block.weight_C * 0.5))) == whole


def test_who_has_no_weight_or_no_loss_is_not_heard() -> None:
    message = tellings(3, 1)
    expected = outcome(
        MEMBER.add(MEMBER.zero(), concatenate_messages([take_client(message, 0), take_client(message, 1)]))
    )
    weightless = replace(message, weight_C=torch.tensor([1.0, 1.0, 0.0]).double())
    assert outcome(MEMBER.add(MEMBER.zero(), weightless)) == expected
    message.tensors["loss"][2] = math.nan
    answers, metrics = closed(MEMBER, MEMBER.add(MEMBER.zero(), message), {})
    assert digest(answers) == expected[0]
    assert metrics["clients"] == 3
    message.tensors["loss"][:] = math.nan
    answers, metrics = closed(MEMBER, MEMBER.add(MEMBER.zero(), message), {})
    assert metrics["believed"] == 0
    assert answers["answers.client"].tolist() == [-1] * 4


def test_refusals() -> None:
    message = tellings(2, 0)
    total = MEMBER.add(MEMBER.zero(), message)
    with pytest.raises(LichenError, match="do not compare"):
        MEMBER.add(total, replace(message, group="tokens/y/3"))
    with pytest.raises(LichenError, match="4 texts, 6 places"):
        MEMBER.add(total, replace(message, tensors={**message.tensors, "loss": torch.zeros(2, 5)}))
    with pytest.raises(LichenError, match="no tensor"):
        MEMBER.add(total, replace(message, tensors={}))
    with pytest.raises(LichenError, match="no client"):
        closed(MEMBER, MEMBER.zero(), {})
    with pytest.raises(LichenError, match="own losses"):
        closed(MEMBER, total, {"answers.loss": torch.zeros(2)})
    with pytest.raises(LichenError, match="no choice"):
        MEMBER.load({}, {"count": 1, "group": ""})
    with pytest.raises(LichenError, match="rise from 0"):
        Select((1, 2))
