"""A client's answers to public rows: in the shard's order, the same in any company, honest about failing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.clients.distillation.predict import Predict
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.message import Message, size, take_client
from lichen.core.tree import Tree
from lichen.data.batches.shards import ArrayShard, EvalSource
from support.toy_cohorts import Bigram, Softmax, fold, job

MODEL = Softmax(dtype=torch.float32)


def shard(rows: int) -> ArrayShard:
    x = np.random.default_rng(rows).normal(size=(rows, 5)).astype(np.float32)
    return ArrayShard(x, labels=np.full(rows, -100))


def ask(work: Predict, clients: tuple[int, ...], rows: int, own_C: Tree | None = None, batch: int = 4) -> Message:
    source = EvalSource(dict.fromkeys(clients, shard(rows)), batch_size=batch)
    return fold(work, job(MODEL.init(0), clients), source.batches(clients, 0), own_C)[0]


def mine(*seeds: int) -> Tree:
    return trees.join("params/", trees.stack([MODEL.init(s) for s in seeds]), {})


def expected(seed: int, rows: int) -> torch.Tensor:
    params = MODEL.init(seed)
    x = torch.from_numpy(shard(rows).x).double()
    return (x @ params["weight"].double().T + params["bias"].double()).log_softmax(-1)


@given(rows=st.integers(1, 13), batch=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_log_probabilities_come_in_the_shards_order_whatever_the_batches(rows: int, batch: int) -> None:
    message = ask(Predict(MODEL, rows=rows, personal=True), (4, 7), rows, mine(1, 2), batch)
    assert message.group == f"answers/{rows}/3"
    assert message.tensors["logits"].dtype == torch.float16
    for c, seed in enumerate((1, 2)):
        torch.testing.assert_close(message.tensors["logits"][c].double(), expected(seed, rows), rtol=0, atol=2e-3)


def test_alone_and_together_give_the_same_bytes() -> None:
    work = Predict(MODEL, rows=9, personal=True)
    both = ask(work, (4, 7), 9, mine(1, 2))
    for c, (client, seed) in enumerate(((4, 1), (7, 2))):
        alone = ask(work, (client,), 9, mine(seed))
        assert trees.digest(alone.tensors) == trees.digest(take_client(both, c).tensors)


def test_the_likeliest_alone_cost_fewer_bytes() -> None:
    whole = ask(Predict(MODEL, rows=50, personal=True), (0,), 50, mine(1))
    few = ask(Predict(MODEL, rows=50, personal=True, top_k=1), (0,), 50, mine(1))
    assert (few.group, few.tensors["index"].dtype) == ("answers/50/3/1", torch.int8)
    p_NK = expected(1, 50).exp()
    assert torch.equal(few.tensors["index"][0, :, 0].long(), p_NK.argmax(-1))
    torch.testing.assert_close(few.tensors["prob"][0, :, 0].double(), p_NK.amax(-1), rtol=0, atol=1e-3)
    assert size(whole) - size(few) == pytest.approx(50 * (6 - 3), abs=64)


def test_weights_are_what_was_said_and_who_has_not_trained_has_none() -> None:
    examples, counts = {3: 5.0, 4: 7.0}, {3: [1, 2, 3], 4: [0, 0, 4]}
    assert ask(Predict(MODEL, rows=2), (3, 4), 2).weight_C.tolist() == [1, 1]
    assert ask(Predict(MODEL, rows=2, examples=examples), (3, 4), 2).weight_C.tolist() == [5, 7]
    told = ask(Predict(MODEL, rows=2, counts=counts), (3, 4), 2)
    assert told.weight_C.tolist() == [6, 4]
    assert told.tensors["n"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert ask(Predict(MODEL, rows=2, personal=True), (3, 4), 2).weight_C.tolist() == [0, 0]
    assert ask(Predict(MODEL, rows=2, personal=True), (3, 4), 2, mine(1, 2)).weight_C.tolist() == [1, 1]


def test_a_client_whose_model_broke_says_nothing() -> None:
    own = mine(1, 2)
    own["params/weight"][0] = torch.nan
    message = ask(Predict(MODEL, rows=3, personal=True), (0, 1), 3, own)
    assert message.weight_C.tolist() == [0, 1]
    assert message.metrics["failed"].tolist() == [1, 0]
    assert not message.tensors["logits"][0].any()


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"rows": 0}, "0 public rows"),
        ({"rows": 3, "top_k": 4}, "4 of 3 classes"),
        ({"rows": 3, "model": Bigram()}, "answers no classes"),
    ],
)
def test_refuses_nonsense(more: dict[str, Any], fault: str) -> None:
    with pytest.raises(LichenError, match=fault):
        Predict(more.pop("model", MODEL), **more)


def test_refuses_other_public_rows_and_unknown_clients() -> None:
    for rows in (2, 4):
        with pytest.raises(LichenError, match=f"{rows} rows where 3"):
            ask(Predict(MODEL, rows=3), (0,), rows)
    with pytest.raises(LichenError, match="client 1 is not named"):
        ask(Predict(MODEL, rows=3, examples={0: 1.0}), (0, 1), 3)
