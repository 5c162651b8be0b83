"""The discriminant against scikit-learn on the pooled rows, and its independence of the partition.

Legend: N rows, d features, K classes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from lichen.clients.statistics.sufficient import Statistics
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, take_client
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.server.lda import NEVER, Lda
from lichen.server.optimize import ServerSGD
from support.flat import closed, updated

BITS = 18


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray((x * 2**BITS).round() / 2**BITS)


def told(parts: list[ArrayShard], classes: int, *, bias: bool = True) -> list[Message]:
    """What clients with these rows send, through the real work."""
    work = Statistics(lambda batch: batch["x_CBF"], classes=classes, width=parts[0].x.shape[-1], bias=bias, bits=BITS)
    messages = []
    for client, part in enumerate(parts):
        state = work.init(Job(work="s", shared=Shared(), version=0, clients=(client,), seed=0), (client,), None)
        for batch in EvalSource({client: part}, batch_size=64).batches((client,), 0):
            state = work.step(state, batch)
        messages.append(work.final(state)[0])
    return messages


def head(member: Lda, messages: list[Message]) -> tuple[Tensor, Tensor]:
    total = member.zero()
    for message in messages:
        total = member.add(total, message)
    change, _ = closed(member, total, {})
    return change["head.weight"], change["head.bias"]


def rows(seed: int, *, classes: int = 4, d: int = 6, n: int = 80) -> ArrayShard:
    rng = np.random.default_rng(seed)
    labels = np.concatenate(
        [np.arange(2 * classes) % classes, rng.choice(classes, size=n - 2 * classes, p=[0.5, 0.3, 0.15, 0.05])]
    )
    mix = rng.normal(size=(d, d))
    x = rng.normal(size=(n, d)) @ mix + rng.normal(size=(classes, d))[labels]
    return ArrayShard(rounded(x).astype(np.float32), labels=labels)


def split(shard: ArrayShard, cuts: list[int]) -> list[ArrayShard]:
    edges = sorted({0, shard.size, *(c % shard.size for c in cuts)})
    return [shard.between(a, b) for a, b in pairwise(edges)]


@given(seed=st.integers(0, 2**16), shrinkage=st.sampled_from([0.0, 0.1, 0.7, 1.0]), bias=st.booleans())
@settings(max_examples=20, deadline=None)
def test_equals_sklearn_on_the_pooled_rows(seed: int, shrinkage: float, bias: bool) -> None:
    shard = rows(seed)
    x = rounded(shard.x.astype(np.float64))
    weight_Kd, bias_K = head(Lda(shrinkage, bias=bias), told(split(shard, [11, 40, 55]), 4, bias=bias))
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, shard.labels)
    np.testing.assert_allclose(weight_Kd.numpy(), oracle.coef_, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(bias_K.numpy(), oracle.intercept_, atol=1e-6, rtol=1e-6)
    other = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage).fit(x, shard.labels)
    ours_NK = (torch.from_numpy(x) @ weight_Kd.T + bias_K).softmax(-1)
    np.testing.assert_allclose(ours_NK.numpy(), other.predict_proba(x), atol=1e-6)


@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(1, 79), max_size=6))
@settings(max_examples=20, deadline=None)
def test_any_partition_order_and_pairing_gives_the_same_bytes(seed: int, cuts: list[int]) -> None:
    shard, member = rows(seed), Lda()
    whole = digest(dict(zip("wb", head(member, told([shard], 4)), strict=True)))
    order = np.random.default_rng(seed).permutation(shard.size)
    mixed = ArrayShard(shard.x[order], labels=shard.labels[order])
    messages = told(split(mixed, cuts), 4)
    assert digest(dict(zip("wb", head(member, messages[::-1]), strict=True))) == whole
    left, right = member.zero(), member.zero()
    for at, message in enumerate(messages):
        left, right = (member.add(left, message), right) if at % 2 else (left, member.add(right, message))
    change, _ = closed(member, member.merge(right, left), {})
    assert digest({"w": change["head.weight"], "b": change["head.bias"]}) == whole


def test_digits_split_by_class_are_told_as_well_as_together() -> None:
    x, y = load_digits(return_X_y=True)
    x = rounded(x / 128).astype(np.float32)
    parts = [ArrayShard(x[:1200][y[:1200] == k], labels=y[:1200][y[:1200] == k]) for k in range(10)]
    weight_Kd, bias_K = head(Lda(0.1), told(parts, 10))
    scores_NK = torch.from_numpy(x[1200:]).double() @ weight_Kd.T + bias_K
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(x[:1200].astype(np.float64), y[:1200])
    right = float((scores_NK.argmax(-1).numpy() == y[1200:]).mean())
    assert right == pytest.approx(oracle.score(x[1200:].astype(np.float64), y[1200:]))
    assert right > 0.88


def test_fewer_rows_than_features_and_a_class_nobody_has() -> None:
    shard = rows(0, d=40, n=12)
    few = ArrayShard(shard.x[shard.labels != 3], labels=shard.labels[shard.labels != 3])
    for shrinkage in (0.0, 0.2):
        weight_Kd, bias_K = head(Lda(shrinkage), told([few], 4))
        assert bool(weight_Kd.isfinite().all())
        assert not weight_Kd[3].any()
        assert float(bias_K[3]) == NEVER
        scores_NK = torch.from_numpy(few.x).double() @ weight_Kd.T + bias_K
        assert 3 not in scores_NK.argmax(-1)


def test_steps_from_any_head_to_the_same_one() -> None:
    member, messages = Lda(), told([rows(1)], 4)
    total = member.add(member.zero(), messages[0])
    weight_Kd, bias_K = head(member, messages)
    shared = {"head.weight": torch.randn(4, 6), "head.bias": torch.randn(4), "other": torch.ones(1)}
    change, metrics = closed(member, total, shared)
    after, _ = updated(ServerSGD(), change, {}, shared)
    torch.testing.assert_close(after["head.weight"], weight_Kd.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after["head.bias"], bias_K.float(), rtol=1e-5, atol=1e-5)
    assert metrics == {"clients": 1, "examples": 80}


def test_refuses_nonsense() -> None:
    message = told([rows(1)], 4)[0]
    with pytest.raises(LichenError, match="out of range"):
        Lda(1.5)
    with pytest.raises(LichenError, match="no client contributed"):
        closed(Lda(), Lda().zero(), {})
    broken = take_client(message, 0)
    del broken.tensors["n"]
    with pytest.raises(LichenError, match="work Statistics"):
        Lda().add(Lda().zero(), broken)
    total = Lda().add(Lda().zero(), told([rows(1)], 4)[0])
    with pytest.raises(LichenError, match="the statistics give"):
        closed(Lda(), total, {"head.weight": torch.zeros(4, 9)})
