"""Noisy votes: exact counts, the winner, the threshold, and what it all costs in privacy.

Legend: C clients, Q queries, K classes.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, size
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.engines.local import LocalEngine
from lichen.models.losses import answer_settings, distill_loss
from lichen.models.students.students import ImageMLP
from lichen.research.pate.label_vote import LabelVote
from lichen.research.pate.pate import NoisyMax, joint_sensitivity
from support.flat import closed


def _message(votes_CQ: Tensor, weights: list[float] | None = None) -> Message:
    clients = votes_CQ.shape[0]
    return Message(
        group="ballot",
        client_C=torch.arange(clients),
        version_C=torch.zeros(clients, dtype=torch.int64),
        tensors={"votes": votes_CQ.to(torch.int8)},
        weight_C=torch.tensor(weights or [1.0] * clients, dtype=torch.float64),
    )


def _answers(rule: NoisyMax, message: Message) -> tuple[list[int], list[float], dict[str, float]]:
    answers, metrics = closed(rule, rule.add(rule.zero(), message), {})
    return answers["answers.index"][:, 0].tolist(), answers["answers.prob"][:, 0].tolist(), metrics


@given(seed=st.integers(0, 500), clients=st.integers(1, 9), classes=st.integers(2, 6))
def test_without_noise_it_is_the_plurality_and_its_share(seed: int, clients: int, classes: int) -> None:
    votes = torch.randint(-1, classes, (clients, 8), generator=torch.Generator().manual_seed(seed))
    index, share, metrics = _answers(NoisyMax(classes, sigma=0.0, seed=1), _message(votes))
    for q in range(8):
        count = [int((votes[:, q] == k).sum()) for k in range(classes)]
        assert index[q] == count.index(max(count))
        assert share[q] == pytest.approx(max(count) / clients, abs=1e-3)
    assert metrics["sensitivity"] == math.inf
    assert metrics["answered"] == metrics["queries"] == 8


def test_noise_is_gaussian_of_its_size_drawn_once_and_by_seed() -> None:
    votes = torch.zeros(40, 4000, dtype=torch.int64)
    votes[:16] = 1  # 24 to 16
    sigma = 6.0
    rule = NoisyMax(2, sigma=sigma, seed=3)
    index, _, _ = _answers(rule, _message(votes))
    # The difference of two counts has noise of √2 σ, and the loser wins where it passes their distance.
    expected = NormalDist().cdf(-8 / (math.sqrt(2) * sigma))
    assert sum(index) / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000))
    assert _answers(rule, _message(votes))[0] == index
    assert _answers(NoisyMax(2, sigma=sigma, seed=4), _message(votes))[0] != index


def test_the_threshold_leaves_out_what_clients_disagree_on() -> None:
    votes = torch.zeros(30, 400, dtype=torch.int64)
    votes[:, 200:] = torch.arange(30)[:, None] % 3  # ten votes each
    rule = NoisyMax(3, sigma=1.0, seed=0, threshold=20.0, threshold_sigma=2.0)
    index, share, metrics = _answers(rule, _message(votes))
    assert index[:200] == [0] * 200
    assert index[200:] == [-1] * 200
    assert share[200:] == [0.0] * 200
    assert metrics["answered"] == 200
    assert metrics["sensitivity"] == pytest.approx(math.sqrt(400 * (2 / 1.0 + 1 / 4.0)))
    # Half of the counts that lie on the threshold pass it.
    edge = NoisyMax(3, sigma=1.0, seed=0, threshold=30.0, threshold_sigma=2.0)
    assert 70 < _answers(edge, _message(votes))[2]["answered"] < 130


def test_whether_a_text_is_answered_says_nothing_of_the_answer() -> None:
    """The noise on the counts and that on the largest of them, before it is held against the threshold, are apart."""
    votes = torch.arange(30).view(30, 1) % 2  # fifteen each, on the threshold
    told = [
        _answers(NoisyMax(2, sigma=3.0, seed=seed, threshold=15.0, threshold_sigma=3.0), _message(votes))[0][0]
        for seed in range(400)
    ]
    assert 140 < len([k for k in told if k >= 0]) < 260
    assert told.count(0) / (told.count(0) + told.count(1)) == pytest.approx(0.5, abs=0.14)


@given(seed=st.integers(0, 200))
def test_one_client_moves_the_counts_by_the_root_of_two_a_query(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randint(0, 4, (6, 9), generator=generator)
    other = votes.clone()
    other[2] = torch.randint(0, 4, (9,), generator=generator)
    rule = NoisyMax(4, sigma=1.0, seed=0)
    totals = [rule.add(rule.zero(), _message(v)).units_N for v in (votes, other)]
    assert totals[0] is not None
    assert totals[1] is not None
    moved = (totals[0] - totals[1]).double() * 2.0**-30
    assert float(moved.norm()) <= joint_sensitivity(9, sigma=1.0) + 1e-9
    assert float(moved.norm()) == pytest.approx(math.sqrt(2 * int((votes[2] != other[2]).sum())))


def test_epsilon_of_all_releases_at_once_is_that_of_one_after_the_other() -> None:
    accountant = pytest.importorskip("lichen.transforms.privacy")
    if importlib.util.find_spec("dp_accounting") is None:
        pytest.skip("dp-accounting is not installed")
    queries, sigma, delta = 50, 40.0, 1e-5
    mu = joint_sensitivity(queries, sigma=sigma)
    joined = accountant.epsilon([accountant.Gaussian(1.0, sensitivity=mu)], delta)
    each = accountant.Gaussian(sigma, sensitivity=math.sqrt(2), steps=queries)
    assert joined == pytest.approx(accountant.epsilon([each], delta), rel=1e-3)

    def chance(epsilon: float) -> float:  # Balle and Wang, 2018
        phi = NormalDist().cdf
        return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)

    assert chance(joined) == pytest.approx(delta, rel=0.02)


def test_a_ballot_counts_what_each_clients_own_model_says(tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = ImageMLP(4, hidden=(), classes=3)
    rng = np.random.default_rng(0)
    public = ArrayShard(rng.normal(size=(11, 4)).astype(np.float32), labels=np.full(11, -100, np.int64))
    store = ClientStore(tmp_path)
    own = [model.init(c) for c in range(3)]
    for c in (0, 1, 2):
        store.stage((c,), 1, {f"params/{name}": x[None] for name, x in own[c].items()})
    client_task = ClientTask(work=LabelVote(model, queries=11), source=EvalSource((public,) * 4, batch_size=4))
    engine = LocalEngine({"ballot": client_task}, store, block_size=2)
    job = Job(work="ballot", shared=Shared(model.init(9)), version=1, clients=(0, 1, 2, 3), seed=0)
    messages = list(drain(engine, job))
    rule = NoisyMax(3, sigma=0.0, seed=0)
    total = rule.zero()
    for message in messages:
        assert message.tensors["votes"].dtype == torch.int8
        total = rule.add(total, message)
        for c, votes in zip(message.client_C.tolist(), message.tensors["votes"], strict=True):
            params = own[c] if c < 3 else model.init(9)
            assert votes.tolist() == model.apply(params, torch.from_numpy(public.x)).argmax(-1).tolist()
    answers, metrics = closed(rule, total, {})
    assert metrics["clients"] == 4
    assert digest(answers) == digest(closed(rule, total, {})[0])
    assert size(messages[0]) < 600  # a byte a vote and the frame
    # Students learn from the winners as from any teacher; their share of the votes is the confidence.
    logits = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    loss, count = distill_loss(logits, torch.arange(11), {**answers, **answer_settings(hard=True)})
    log, win = logits.log_softmax(-1), answers["answers.index"][:, 0].long()
    torch.testing.assert_close(loss, -(answers["answers.prob"][:, 0].float() * log[torch.arange(11), win]).sum())
    assert int(count) == 11


def test_nonsense_is_refused() -> None:
    rule = NoisyMax(3, sigma=1.0, seed=0)
    with pytest.raises(LichenError, match="nobody voted"):
        closed(rule, rule.add(rule.zero(), _message(torch.zeros(1, 2), [0.0])), {})
    with pytest.raises(LichenError, match=r"outside -1\.\.2"):
        rule.add(rule.zero(), _message(torch.full((1, 2), 3)))
    with pytest.raises(LichenError, match="expected votes"):
        rule.add(rule.zero(), Message(**{**_fields(_message(torch.zeros(1, 2))), "tensors": {"w": torch.zeros(1, 2)}}))
    with pytest.raises(LichenError, match="come together"):
        NoisyMax(3, sigma=1.0, seed=0, threshold=2.0)
    with pytest.raises(LichenError, match=r"pate\.sigma"):
        NoisyMax(3, sigma=-1.0, seed=0)
    with pytest.raises(LichenError, match=r"ballot\.queries"):
        LabelVote(ImageMLP(4, hidden=(), classes=3), queries=0)


def _fields(message: Message) -> dict[str, object]:
    return {name: getattr(message, name) for name in message.__slots__}
