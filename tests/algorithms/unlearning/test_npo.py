"""Negative preference optimization: loss and gradient by hand, and rounds of one client and the others in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from lichen.algorithms.average import Average
from lichen.algorithms.unlearning.alternate import Alternate
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.clients.unlearning.referenced import Referenced, reference_scores
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.engines.local import LocalEngine
from lichen.models.preference.negative import NegativePreferenceModel, negative_loss
from lichen.models.students.students import ImageMLP
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone
from support.small_experiment import experiment

BETA = 0.1


def published(ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """As open-unlearning (0.1.0) has it: DPO's loss with a win ratio of 0, times 2/β, in the mean of the rows."""
    win, lose = torch.zeros_like(ratio), ratio
    return -2 / beta * logsigmoid(beta * (win - lose)).mean()


def batch(clients: int = 2, rows: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (clients, rows), generator=draw)
    labels[0, 1] = -100
    index = torch.arange(rows).repeat(clients, 1)
    index[1, 3] = -1
    return {
        "active_C": torch.ones(clients, dtype=torch.bool),
        "x_CBF": torch.randn(clients, rows, 6, generator=draw),
        "labels_CB": labels,
        "index_CB": index,
        "reference_CB": -torch.rand(clients, rows, generator=draw) * 3,
    }


def test_loss_and_gradient_by_hand() -> None:
    """Of each client's real rows with a label; the gradient is -2σ(β r) times that of log π."""
    inner = ImageMLP(6, hidden=(8,), classes=3)
    model, some = NegativePreferenceModel(inner, beta=BETA), batch()
    params_C = {name: torch.stack([x, x + 0.1]).requires_grad_() for name, x in inner.init(0).items()}
    loss_C, count_C = model.loss(params_C, {}, some)
    assert count_C.tolist() == [3, 3]
    grads = torch.autograd.grad(loss_C.sum(), list(params_C.values()))
    for client, rows in ((0, [0, 2, 3]), (1, [0, 1, 2])):
        own = {name: x[client : client + 1].detach().requires_grad_() for name, x in params_C.items()}
        one = {name: x[client : client + 1] for name, x in some.items()}
        logits_RK = inner.logits(own, {}, one)[0][rows].double()
        logp_R = -cross_entropy(logits_RK, some["labels_CB"][client, rows], reduction="none")
        ratio_R = logp_R - some["reference_CB"][client, rows].double()
        mine = published(ratio_R, BETA)
        assert float((loss_C[client] / count_C[client]).detach()) == pytest.approx(float(mine.detach()), abs=1e-6)
        by_hand = (-2 / BETA * torch.log(1 / (1 + torch.exp(BETA * ratio_R)))).mean()
        assert float(by_hand.detach()) == pytest.approx(float(mine.detach()), abs=1e-12)
        slope_R = 2 * torch.sigmoid(BETA * ratio_R.detach())
        wanted = torch.autograd.grad((slope_R * logp_R).sum(), list(own.values()))
        for found, hand in zip(grads, wanted, strict=True):
            assert (found[client] - hand[0]).abs().max() < 1e-6
    losses_CB, counts_CB = model.losses(params_C, {}, some)
    assert torch.allclose(losses_CB.sum(1), loss_C)
    assert counts_CB.sum(1).tolist() == [3, 3]


def test_towards_no_beta_it_is_gradient_ascent_and_it_never_falls_below_nothing() -> None:
    ratio = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(negative_loss(ratio, 1e-6).sum(), ratio)
    assert (slope - 1).abs().max() < 1e-5
    assert float(negative_loss(torch.tensor(-1e6), BETA).detach()) == 0.0
    with pytest.raises(LichenError, match="not above 0"):
        NegativePreferenceModel(ImageMLP(6, classes=3), beta=0.0)
    model = NegativePreferenceModel(ImageMLP(6, classes=3))
    params_C = {name: torch.stack([x, x]) for name, x in model.init(0).items()}
    bare = {name: x for name, x in batch().items() if name != "reference_CB"}
    with pytest.raises(LichenError, match="without the reference"):
        model.loss(params_C, {}, bare)


def forgetting(made: Experiment, folder: Path, *, spied: list[int] | None = None) -> LocalEngine:
    tasks = client_tasks(made)

    def scores(client: int) -> torch.Tensor:
        if spied is not None:
            spied.append(client)
        rows = made.clients.train[client].size
        source = made.evaluating(made.clients.train)
        return reference_scores(made.model, made.start, source, client, rows=rows)

    train = Train(NegativePreferenceModel(made.model, beta=BETA), optimizer=ClientOptimizer(name="sgd", lr=0.1))
    source = Referenced(tasks["train lr=0.1"].source, scores)
    return LocalEngine({**tasks, "npo": ClientTask(work=train, source=source)}, ClientStore(folder), block_size=3)


def alternate(made: Experiment, **more: Any) -> Alternate:
    average = Average(
        aggregator=Mean(),
        optimizer=ServerSGD(),
        sampler=Everyone(),
        weight_N=made.server.roster.rows_N("train"),
        rounds=4,
        work="train lr=0.1",
    )
    return Alternate(average, client=1, **more)


def test_the_client_and_the_others_take_turns(tmp_path: Path) -> None:
    made, seen, spied = experiment(), list[Any](), list[int]()
    there = forgetting(made, tmp_path, spied=spied)
    state = run(alternate(made), there, lambda: made.start, rounds=4, seed=5, observers=[seen.append])
    assert [report.clients for report in seen] == [(1,), (0, 2, 3), (1,), (0, 2, 3)]
    assert set(spied) == {1}
    rows = made.evaluating(made.clients.train)
    own, before = (
        reference_scores(made.model, shared, rows, 1, rows=made.clients.train[1].size).mean()
        for shared in (state.shared, made.start)
    )
    first = run(alternate(made), there, lambda: made.start, rounds=1, seed=5)
    lower = reference_scores(made.model, first.shared, rows, 1, rows=made.clients.train[1].size).mean()
    assert lower < before
    assert own > lower  # the others' rows are alike here


def test_factors_scale_the_steps_of_their_own_rounds(tmp_path: Path) -> None:
    made = experiment()
    there = forgetting(made, tmp_path)
    moved = []
    for rate in (1.0, 0.5):
        state = run(alternate(made, forget_rate=rate), there, lambda: made.start, rounds=1, seed=5)
        moved.append(sum(float((x - made.start.trainable[n]).norm()) for n, x in state.shared.trainable.items()))
    assert moved[1] == pytest.approx(moved[0] / 2, rel=0.1)
    still = run(alternate(made, forget_rate=0.0), there, lambda: made.start, rounds=1, seed=5)
    assert all(torch.equal(x, made.start.trainable[n]) for n, x in still.shared.trainable.items())


def test_scores_stand_beside_their_rows() -> None:
    made = experiment()
    source = Referenced(made.evaluating(made.clients.train), lambda client: torch.arange(20.0) + 100 * client)
    for client in (0, 2):
        for some in source.batches((client,), 0):
            index_B, score_B = some["index_CB"][0], some["reference_CB"][0]
            wanted = torch.where(index_B >= 0, index_B + 100.0 * client, torch.zeros(()))
            assert torch.equal(score_B, wanted)
    assert source.shape(0) == made.evaluating(made.clients.train).shape(0)
    scores = reference_scores(made.model, made.start, made.evaluating(made.clients.train), 3, rows=12)
    x, y = torch.tensor(made.clients.train[3].x), torch.tensor(made.clients.train[3].labels)
    params = {name: value[None] for name, value in made.start.trainable.items()}
    logits = made.model.logits(params, {}, {"x_CBF": x[None], "active_C": torch.ones(1, dtype=torch.bool)})[0]
    assert torch.allclose(scores, -cross_entropy(logits, y, reduction="none"), atol=1e-6)
