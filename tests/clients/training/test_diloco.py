"""Long local stretches: equal to textbook loops with torch.optim, resumable, and safe to lose.

Legend: C clients, B rows, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lichen.algorithms.average import Average
from lichen.clients.training.diloco import Pace, Worker, fragment_of
from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.message import pack_message, take_client
from lichen.core.rounds import load_state, run
from lichen.core.seeds import derive, torch_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.models.objectives import Classification
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from support.flat import closed
from support.toy_cohorts import fold, job

NESTEROV = ServerSGD(0.7, momentum=0.9, nesterov=True)
ADAMW = ClientOptimizer("adamw", lr=0.02, weight_decay=0.1)
SGD = ClientOptimizer("sgd", lr=0.3)
STEPS = 3


@dataclass(frozen=True)
class Deep:
    """Four layers by name, small enough that every number can be followed."""

    classes: int = 3
    name: str = "deep"
    base: str = ""
    group: str = "deep"
    reference: bool = True

    @property
    def objective(self) -> Classification:
        return Classification(self.classes)

    def init(self, seed: int) -> Any:
        shapes = {"emb.weight": (5, 4), "h.0.w": (4, 4), "h.1.w": (4, 4), "h.2.w": (4, 4), "norm": (4,)}
        g = torch_generator(seed, "deep")
        return {n: torch.randn(s, generator=g, dtype=torch.float64) * 0.4 for n, s in shapes.items()}

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Any:
        return torch.stack(
            [forward(trees.take(trainable_C, c), x) for c, x in enumerate(batch["x_CBF"].double().unbind(0))]
        )

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Any:
        logits_CBK, labels_CB = self.logits(trainable_C, fixed, batch), batch["labels_CB"]
        each = [functional.cross_entropy(x, y, reduction="sum") for x, y in zip(logits_CBK, labels_CB, strict=True)]
        return torch.stack(each), (labels_CB >= 0).sum(1)


def forward(w: Any, x_BF: Any) -> Any:
    h = x_BF @ w["emb.weight"]
    for i in range(3):
        h = h + torch.tanh(h @ w[f"h.{i}.w"])
    return (h * w["norm"])[:, :3]


@dataclass(frozen=True)
class Rows:
    """Endless random rows: client c's step t of a round depends on (seed, c, t) alone."""

    steps: int = STEPS
    each: int = 4

    def shape(self, client: int) -> Any:
        return 0

    def batches(self, clients: int, seed: int) -> Any:
        for t in range(self.steps):
            gs = [torch_generator(seed, c, t) for c in clients]
            yield {
                "active_C": torch.ones(len(clients), dtype=torch.bool),
                "x_CBF": torch.stack([torch.randn(self.each, 5, generator=g) for g in gs]),
                "labels_CB": torch.stack([torch.randint(0, 3, (self.each,), generator=g) for g in gs]),
                "index_CB": torch.arange(self.each).repeat(len(clients), 1),
            }


@dataclass(frozen=True)
class Together:
    """The rows of several clients as the batches of one."""

    rows: Rows
    clients: tuple

    def shape(self, client: int) -> Any:
        return 0

    def batches(self, clients: int, seed: int) -> Any:
        for batch in self.rows.batches(self.clients, seed):
            yield {n: x[:1] if n == "active_C" else x.flatten(0, 1)[None] for n, x in batch.items()}


class All:
    def invite(self, weight_N: Any, seed: int) -> Any:
        return tuple(range(weight_N.shape[0]))


def federation(
    folder: Path,
    work: Any,
    server: Any,
    *,
    rounds: int,
    source: Any = None,
    block: int = 2,
    clients: int = 3,
    checkpoint: Any = None,
) -> Any:
    engine = LocalEngine(
        {"train": ClientTask(work=work, source=source or Rows())}, ClientStore(folder), block_size=block
    )
    algorithm = Average(
        aggregator=Mean("uniform"),
        optimizer=server,
        sampler=All(),
        weight_N=torch.ones(clients),
        valid=None,
        rounds=rounds,
    )
    reports = []
    state = run(
        algorithm,
        engine,
        lambda: Shared(Deep().init(0)),
        rounds=rounds,
        seed=7,
        checkpoint=checkpoint,
        observers=[reports.append],
    )
    return state, reports


def textbook(rounds: int, *, fragments: int = 1, clients: int = 3, lr: float = (0.7, 0.9)) -> Any:
    """DiLoCo as one would write it down: a model a worker, torch.optim inside and out."""
    shared = {n: x.clone().requires_grad_() for n, x in Deep().init(0).items()}
    place = fragment_of({n: x.shape for n, x in shared.items()}, fragments)
    outer = [
        torch.optim.SGD([x for n, x in shared.items() if place[n] == f], lr=lr[0], momentum=lr[1], nesterov=True)
        for f in range(fragments)
    ]
    workers = [{n: x.detach().clone().requires_grad_() for n, x in shared.items()} for _ in range(clients)]
    inner = [torch.optim.AdamW(w.values(), lr=0.02, weight_decay=0.1) for w in workers]
    for r in range(rounds):
        batches = list(Rows().batches(range(clients), derive(7, "round", r)))
        for c, w in enumerate(workers):
            for batch in batches:
                inner[c].zero_grad()
                functional.cross_entropy(forward(w, batch["x_CBF"][c].double()), batch["labels_CB"][c]).backward()
                inner[c].step()
        now = [n for n in shared if place[n] == r % fragments]
        for n in now:
            shared[n].grad = sum(shared[n].detach() - w[n].detach() for w in workers) / clients
        outer[r % fragments].step()
        for w in workers:
            for n in now:
                w[n].data.copy_(shared[n].data)
    return {n: x.detach() for n, x in shared.items()}


@pytest.mark.parametrize("fragments", [1, 2, 4])
def test_equals_the_textbook_loop(tmp_path: Path, fragments: Any) -> None:
    work = Worker(Train(Deep(), optimizer=ADAMW), fragments=fragments)
    state, _ = federation(tmp_path, work, NESTEROV, rounds=6)
    expected = textbook(6, fragments=fragments)
    for name, x in expected.items():
        # The exact mean is held in units of 2^-40.
        torch.testing.assert_close(state.shared.trainable[name], x, rtol=0, atol=1e-10)
    assert not torch.allclose(state.shared.trainable["h.0.w"], Deep().init(0)["h.0.w"], atol=1e-2)


def test_one_step_with_plain_sgd_is_data_parallel_sgd(tmp_path: Path) -> None:
    """H = 1, inner SGD, outer SGD at rate 1: the mean of the workers' gradients in every step."""
    work = Worker(Train(Deep(), optimizer=SGD))
    state, _ = federation(tmp_path / "a", work, ServerSGD(1.0), rounds=12, source=Rows(1))
    pooled = Together(Rows(1), (0, 1, 2))
    parallel, _ = federation(tmp_path / "b", work, ServerSGD(1.0), rounds=12, source=pooled, clients=1)
    for name, x in parallel.shared.trainable.items():
        torch.testing.assert_close(state.shared.trainable[name], x, rtol=0, atol=1e-10)


def test_the_optimizer_lives_on_between_rounds_though_parameters_are_shared() -> None:
    work = Worker(Train(Deep(), optimizer=ADAMW))
    shared, batches = Deep().init(0), list(Rows(4).batches([0, 1], 1))
    _, own = fold(work, job(shared, [0, 1]), batches)
    assert set(own) == {"opt/step", *(f"opt/{m}/{n}" for m in "mv" for n in shared)}
    moved = {n: x + 0.1 for n, x in shared.items()}
    _, own = fold(work, job(moved, [0, 1], version=1), batches[:2], {**own, "best_value": torch.ones(2)})
    assert own["opt/step"].tolist() == [6, 6]
    assert own.pop("best_value").tolist() == [1, 1]
    for c in range(2):
        w = {n: x.clone().requires_grad_() for n, x in shared.items()}
        oracle = torch.optim.AdamW(w.values(), lr=0.02, weight_decay=0.1)
        for start, some in ((shared, batches), (moved, batches[:2])):
            for n, x in start.items():
                w[n].data.copy_(x)
            for batch in some:
                oracle.zero_grad()
                functional.cross_entropy(forward(w, batch["x_CBF"][c].double()), batch["labels_CB"][c]).backward()
                oracle.step()
        for n in shared:
            torch.testing.assert_close(own[f"opt/v/{n}"][c], oracle.state[w[n]]["exp_avg_sq"], rtol=1e-9, atol=1e-15)


def test_one_fragment_is_no_streaming() -> None:
    shared, batches = Deep().init(0), list(Rows().batches([0, 1], 1))
    plain, own = fold(Worker(Train(Deep(), optimizer=ADAMW)), job(shared, [0, 1]), batches)
    one, kept = fold(Worker(Train(Deep(), optimizer=ADAMW), fragments=1), job(shared, [0, 1]), batches)
    assert pack_message(plain) == pack_message(one)
    assert trees.digest(own) == trees.digest(kept)
    fresh, _ = fold(Train(Deep(), optimizer=ADAMW), job(shared, [0, 1]), batches)
    assert pack_message(plain) == pack_message(fresh)


def test_a_fragment_at_a_time_leaves_the_others_and_their_momentum_alone(tmp_path: Path) -> None:
    work = Worker(Train(Deep(), optimizer=ADAMW), fragments=4)
    place = fragment_of({n: x.shape for n, x in Deep().init(0).items()}, 4)
    before, told = federation(tmp_path, work, NESTEROV, rounds=5, checkpoint=tmp_path / "s")
    after, more = federation(tmp_path, work, NESTEROV, rounds=6, checkpoint=tmp_path / "s")
    for name, fragment in place.items():
        same = fragment != 5 % 4
        assert torch.equal(before.shared.trainable[name], after.shared.trainable[name]) == same
        assert torch.equal(before.optimizer[f"m/{name}"], after.optimizer[f"m/{name}"]) == same
    whole, _ = fold(Worker(Train(Deep(), optimizer=ADAMW)), job(before.shared, [0]), Rows().batches([0], 1))
    part, _ = fold(work, job(before.shared, [0], version=1), Rows().batches([0], 1))
    assert {n for n in whole.tensors if place[n] == 1} == set(part.tensors) < set(whole.tensors)
    assert len({r.bytes_up for r in told + more}) > 1


def test_a_worker_that_was_away_takes_what_was_synchronised_meanwhile() -> None:
    work = Worker(Train(Deep(), optimizer=SGD), fragments=4)
    place = fragment_of({n: x.shape for n, x in Deep().init(0).items()}, 4)
    start = Deep().init(0)
    _, own = fold(work, job(start, [0], version=4), Rows().batches([0], 1))
    assert own["sync/since"].tolist() == [4]
    later = {n: x + 1 for n, x in start.items()}
    # Versions 6 and 9: rounds 4 and 5 synchronised fragments 0 and 1, then 4 to 8 all of them.
    for version, seen in ((6, {0, 1}), (8, {0, 1, 2, 3}), (9, {0, 1, 2, 3})):
        state = work.init(job(later, [0], version=version), [0], own)
        for name, x_C in state.train.params_C.items():
            expected = later[name] if place[name] in seen else own[f"params/{name}"][0]
            assert torch.equal(x_C[0], expected)


def lost_at(drop: Any, clients: int, seed: int) -> Any:
    work = Worker(Train(Deep(), optimizer=ADAMW), drop=drop)
    message, own = fold(work, job(Deep().init(0), clients, seed=seed), Rows().batches(clients, seed))
    return message, own


def test_a_dropped_worker_goes_on_from_its_own_and_counts_for_nothing() -> None:
    clients, seed = list(range(8)), 3
    message, own = lost_at(0.5, clients, seed)
    lost = message.metrics["dropped"].bool()
    assert 0 < int(lost.sum()) < 8
    assert torch.equal(message.weight_C == 0, lost)
    assert torch.equal(message.metrics["failed"].bool(), lost)
    assert (message.metrics["tokens"] == 12).all()
    assert all(not x[lost].any() and x[~lost].any() for x in message.tensors.values())
    change, _ = closed(Mean("uniform"), Mean("uniform").add(Mean("uniform").zero(), message), Deep().init(0))
    for name, x in change.items():
        torch.testing.assert_close(x, message.tensors[name][~lost].mean(0), rtol=0, atol=1e-11)
    shared = {n: x + 1 for n, x in Deep().init(0).items()}
    work = Worker(Train(Deep(), optimizer=ADAMW), drop=0.5)
    initial_C = work.init(job(shared, clients, version=1, seed=9), clients, own).train.params_C
    for name, x_C in initial_C.items():
        for c in clients:
            assert torch.equal(x_C[c], own[f"params/{name}"][c] if lost[c] else shared[name])
    late_C = work.init(job(shared, clients, version=2, seed=9), clients, own).train.params_C
    assert all(torch.equal(x_C[c], shared[n]) for n, x_C in late_C.items() for c in clients)


def test_whether_an_answer_is_lost_depends_on_seed_and_client_alone() -> None:
    together = lost_at(0.5, list(range(6)), 3)[0]
    for c in range(6):
        assert pack_message(lost_at(0.5, [c], 3)[0]) == pack_message(take_client(together, c))
    draws = [lost_at(0.5, list(range(6)), seed)[0].metrics["dropped"] for seed in range(30)]
    assert 0.35 < float(torch.stack(draws).mean()) < 0.65
    assert "dropped" not in lost_at(0.0, [0], 3)[0].metrics


def test_a_round_that_loses_all_answers_changes_nothing_but_its_number(tmp_path: Path) -> None:
    work = Worker(Train(Deep(), optimizer=ADAMW), drop=0.9)
    before, told = Deep().init(0), []
    for rounds in range(1, 7):
        state, reports = federation(tmp_path, work, NESTEROV, rounds=rounds, clients=2, checkpoint=tmp_path / "s")
        if reports[0].metrics.get("failed") == 2:
            assert trees.digest(before) == trees.digest(state.shared.trainable)
            told.append(rounds)
        before = state.shared.trainable
    assert told
    assert state.round == 6


@pytest.mark.parametrize(("fragments", "drop"), [(1, 0.0), (2, 0.4)])
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, fragments: Any, drop: Any) -> None:
    pace = Pace("cosine", steps=STEPS, rounds=5, warmup=4)
    work = Worker(
        Train(Deep(), optimizer=ADAMW, gradient_steps=(Clip(0.5),)), fragments=fragments, drop=drop, pace=pace
    )
    whole, _ = federation(tmp_path / "a", work, NESTEROV, rounds=5, checkpoint=tmp_path / "a.s")
    federation(tmp_path / "b", work, NESTEROV, rounds=3, checkpoint=tmp_path / "b.s")
    saved = (tmp_path / "b.s").read_bytes()
    federation(tmp_path / "b", work, NESTEROV, rounds=4, checkpoint=tmp_path / "b.s")
    # As if the kill had come after the clients' work, and before the server's state was on disk.
    (tmp_path / "b.s").write_bytes(saved)
    assert load_state(tmp_path / "b.s").round == 3
    resumed, _ = federation(tmp_path / "b", work, NESTEROV, rounds=5, block=3, checkpoint=tmp_path / "b.s")
    assert trees.digest(whole.shared.flat()) == trees.digest(resumed.shared.flat())
    own = [ClientStore(tmp_path / name).load([0, 1, 2], 5) for name in "ab"]
    assert trees.digest(own[0]) == trees.digest(own[1])


def test_the_rate_follows_the_federations_inner_steps() -> None:
    pace = Pace("cosine", steps=2, rounds=3, warmup=2)
    work = Worker(Train(Deep(), optimizer=SGD), pace=pace)
    shared, batches = Deep().init(0), list(Rows(2).batches([0], 1))
    for version in range(3):
        message, _ = fold(work, job(shared, [0], version=version, settings={"lr_scale": 0.5}), batches)
        w = {n: x.clone().requires_grad_() for n, x in shared.items()}
        for t, batch in enumerate(batches):
            loss = functional.cross_entropy(forward(w, batch["x_CBF"][0].double()), batch["labels_CB"][0])
            grads = torch.autograd.grad(loss, list(w.values()))
            lr = 0.3 * 0.5 * (1 / 3, 2 / 3, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5)[2 * version + t]
            w = {n: (x - lr * g).detach().requires_grad_() for (n, x), g in zip(w.items(), grads, strict=True)}
        for n, x in message.tensors.items():
            torch.testing.assert_close(x[0], w[n].detach() - shared[n], rtol=1e-9, atol=1e-14)


def test_a_worker_that_diverges_keeps_what_it_had() -> None:
    work = Worker(Train(Deep(), optimizer=ADAMW), fragments=2, drop=0.3)
    shared = Deep().init(0)
    _, before = fold(work, job(shared, range(2)), Rows().batches([0, 1], 1))
    batches = list(Rows().batches([0, 1], 2))
    batches[1]["x_CBF"][1, 0, 0] = torch.inf
    message, own = fold(work, job(shared, range(2), version=1), batches, before)
    assert message.weight_C[1] == 0
    assert message.metrics["failed"][1] == 1
    assert message.metrics["dropped"][1] == 0
    assert all(x.isfinite().all() for x in (*message.tensors.values(), *own.values()))
    for n in before:
        if n.startswith("opt/"):
            assert torch.equal(own[n][1], before[n][1])
            assert not torch.equal(own[n][0], before[n][0])


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.booleans(),
    st.integers(1, 10),
)
def test_fragments_part_the_layers_whole_and_about_evenly(layers: Any, ends: Any, fragments: Any) -> None:
    shapes = {
        f"m.layers.{i}.{part}": (4, size)
        for i, pair in enumerate(layers)
        for part, size in zip("ab", pair, strict=True)
    }
    if ends:
        shapes |= {"m.emb.weight": (7, 3), "m.norm": (3,)}
    count = len(layers) + ends
    if fragments > count:
        with pytest.raises(LichenError, match="cannot be parted"):
            fragment_of(shapes, fragments)
        return
    place = fragment_of(shapes, fragments)
    assert place.keys() == shapes.keys()
    assert set(place.values()) == set(range(fragments))
    for i in range(len(layers)):
        assert place[f"m.layers.{i}.a"] == place[f"m.layers.{i}.b"]
    sizes = [sum(torch.Size(s).numel() for n, s in shapes.items() if place[n] == f) for f in range(fragments)]
    largest = max([4 * (a + b) for a, b in layers] + [24] * ends)
    assert max(sizes) - min(sizes) <= largest
    assert fragment_of(dict(reversed(shapes.items())), fragments) == place


@pytest.mark.parametrize("bad", [{"fragments": 0}, {"drop": 1.0}, {"drop": -0.1}])
def test_refuses_values_out_of_range(bad: Any) -> None:
    with pytest.raises(LichenError, match=r"train\."):
        Worker(Train(Deep()), **bad)


def test_refuses_personal_training_and_state_of_another_model() -> None:
    with pytest.raises(LichenError, match="personal"):
        Worker(Train(Deep(), personal=True))
    with pytest.raises(LichenError, match="rounds of"):
        Pace(steps=0, rounds=3)
    with pytest.raises(LichenError, match="warmup"):
        Pace(steps=2, rounds=3, warmup=6)
    work = Worker(Train(Deep(), optimizer=ADAMW), fragments=2)
    shared = Deep().init(0)
    _, own = fold(work, job(shared, [0]), Rows().batches([0], 1))
    wider = {**own, "params/norm": torch.ones(1, 5)}
    with pytest.raises(LichenError, match="private state"):
        work.init(job(shared, [0], version=1), [0], wider)
    with pytest.raises(LichenError, match="private state"):
        replace(work, inner=Train(Deep(), optimizer=SGD)).init(job(shared, [0], version=1), [0], own)
