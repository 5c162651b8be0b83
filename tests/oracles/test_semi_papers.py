"""FixMatch, FlexMatch and SemiFL's clients against loops in NumPy that are written from the papers' formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lichen.clients.training.fix_and_mix import FixAndMix
from lichen.clients.training.fixmatch import FixMatch
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore
from lichen.data.batches.augment import TextViews, WeaklyViewed, Words
from lichen.data.batches.scarce_labels import ScarceLabels
from lichen.data.batches.shards import ArrayShard, TextShard, TrainSource
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP, TextCNN
from support.toy_cohorts import Bigram, fold, job

FEATURES, CLASSES, LR = 6, 3, 0.5
MODEL = ImageMLP(FEATURES, hidden=(), classes=CLASSES)
TRAIN = Train(MODEL, optimizer=ClientOptimizer("sgd", lr=LR))

Params = tuple[np.ndarray, np.ndarray]


class Moved:
    """Views that an oracle can do by hand: rows move a little, or more."""

    BY: ClassVar = {"weak": 0.05, "strong": -0.4}

    def view(self, batch: Any, kind: Any, *, seed: int, clients: Any, step: int) -> Any:
        own = (batch["index_CB"] >= 0)[..., None]
        return {**batch, "x_CBF": torch.where(own, batch["x_CBF"] + self.BY[kind], batch["x_CBF"])}


def seen(x: np.ndarray, kind: str) -> np.ndarray:
    return x.astype(np.float64) + Moved.BY[kind]


def softmax(params: Params, x: np.ndarray) -> np.ndarray:
    z = x @ params[0].T + params[1]
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def gradient(params: Params, x: np.ndarray, target: np.ndarray) -> Params:
    """Of the summed cross entropy of rows against targets, whose rows sum to their weights."""
    error = softmax(params, x) * target.sum(1, keepdims=True) - target
    return error.T @ x, error.sum(0)


def start(seed: int = 1) -> tuple[Any, Params]:
    shared = {name: 4 * x for name, x in MODEL.init(seed).items()}
    return shared, (shared["layer0.weight"].double().numpy(), shared["layer0.bias"].double().numpy())


def shards(clients: int, known: int, seed: int = 0) -> list[ArrayShard]:
    """Shards of unequal sizes; the first ``known`` rows of each have labels."""
    rng = np.random.default_rng(seed)
    out = []
    for c in range(clients):
        y = rng.integers(0, CLASSES, 40 + 7 * c)
        x = rng.normal(size=(len(y), FEATURES)) + 1.5 * np.eye(CLASSES, FEATURES)[y]
        out.append(ArrayShard(x=x.astype(np.float32), labels=np.where(np.arange(len(y)) < known, y, -100)))
    return out


def check(message: Any, shared: Any, params: Params, c: int = 0) -> None:
    for name, end in zip(("layer0.weight", "layer0.bias"), params, strict=True):
        np.testing.assert_allclose((shared[name] + message.tensors[name][c]).numpy(), end, atol=1e-6, rtol=1e-6)


def match_loop(
    shard: ArrayShard, batches: Any, params: Params, *, tau: float, weight: float, used: np.ndarray | None
) -> tuple[Params, list[np.ndarray]]:
    """FixMatch, equations 3 and 4; with ``used`` FlexMatch, its algorithm 1: the last sure class of each row, or -1."""
    unlabelled, limits = int((shard.labels < 0).sum()), []
    for batch in batches:
        index = batch["index_CB"][0].numpy()
        known = [i for i in index if i >= 0 and shard.labels[i] >= 0]
        free = [i for i in index if i >= 0 and shard.labels[i] < 0]
        limit = np.full(CLASSES, tau)
        if used is not None:
            sigma = np.array([(used == k).sum() for k in range(CLASSES)])
            beta = sigma / max(sigma.max(), unlabelled - sigma.sum())
            limit = tau * beta / (2 - beta)
        limits.append(limit)
        one = np.eye(CLASSES)
        q = softmax(params, seen(shard.x[free], "weak"))
        found, sure = q.argmax(1), q.max(1)
        passed = sure >= limit[found]
        if used is not None:
            for i, k, p in zip(free, found, sure, strict=True):
                used[i] = k if p >= tau else used[i]
        parts = [
            gradient(params, seen(shard.x[known], "weak"), one[shard.labels[known]] / len(known)),
            gradient(params, seen(shard.x[free], "strong"), weight * passed[:, None] * one[found] / len(free)),
        ]
        params = (params[0] - LR * sum(p[0] for p in parts), params[1] - LR * sum(p[1] for p in parts))
    return params, limits


@pytest.mark.parametrize("by_class", [False, True])
def test_fixmatch_and_flexmatch_are_the_papers(by_class: bool) -> None:
    """Over two rounds: a client's counts of FlexMatch last from the first to the second."""
    (shard,) = shards(1, 6)
    source = ScarceLabels(TrainSource([shard], batch_size=3, steps=5), unlabelled_rows=8)
    shared, params = start()
    more: dict[str, Any] = {"rows": 40, "unlabelled": (34,)} if by_class else {}
    work, own = FixMatch(TRAIN, Moved(), threshold=0.8, weight=0.7, **more), None
    used = np.full(40, -1) if by_class else None
    for version in range(2):
        batches = list(source.batches((0,), version))
        message, own = fold(work, job(shared, (0,), version=version, seed=version), batches, own)
        params, limits = match_loop(shard, batches, params, tau=0.8, weight=0.7, used=used)
        check(message, shared, params)
        shared = {name: x + message.tensors[name][0] for name, x in shared.items()}
        assert 0 < float(message.metrics["pseudo"]) <= 40
        if used is not None:
            assert own["semi/table"][0].tolist() == used.tolist()
            low, high = np.stack(limits).min(), np.stack(limits).max()
            assert (low == 0, high > 0) == (version == 0, True)
        else:
            assert own is None
            assert float(message.metrics["pseudo"]) < 40


def fix_loop(shard: ArrayShard, batches: Any, params: Params, *, seed: int, client: int = 0, **more: Any) -> Params:
    """SemiFL, algorithm 1, a client: labels of the model as received, fix data and mix data, one share for a step."""
    tau, weight, a = more["tau"], more["weight"], more["a"]
    q = softmax(params, seen(shard.x, "weak"))
    found, fix = q.argmax(1), np.flatnonzero(q.max(1) >= tau)
    assert 0 < len(fix) < len(shard.x)
    order = np.concatenate([numpy_generator(seed, client, "fix", t).permutation(len(fix)) for t in range(9)])
    one, at = np.eye(CLASSES), 0
    for step, batch in enumerate(batches):
        mix = [i for i in batch["index_CB"][0].tolist() if i >= 0]
        size = min(len(mix), len(fix))
        rows, mix = fix[order[at : at + size]], mix[:size]
        at += size
        share = numpy_generator(seed, client, "mixup", step).beta(a, a)
        x = share * seen(shard.x[rows], "weak") + (1 - share) * seen(shard.x[mix], "weak")
        parts = [
            gradient(params, seen(shard.x[rows], "strong"), one[found[rows]] / size),
            gradient(params, x, weight * share * one[found[rows]] / size),
            gradient(params, x, weight * (1 - share) * one[found[mix]] / size),
        ]
        params = (params[0] - LR * sum(p[0] for p in parts), params[1] - LR * sum(p[1] for p in parts))
    return params


@pytest.mark.parametrize(("tau", "take"), [(0.8, 6), (0.97, 16)])
def test_a_client_of_semifl_is_the_papers(tau: float, take: int) -> None:
    """With more sure rows than a step takes, and with fewer."""
    (shard,) = shards(1, 0)
    source = ScarceLabels(TrainSource([shard], batch_size=1, steps=6), unlabelled_rows=take, replacement=True)
    shared, params = start()
    work = FixAndMix(TRAIN, Moved(), source, threshold=tau, weight=0.7, mixup=0.75)
    batches = list(source.batches((0,), 5))
    drawn = [i for batch in batches for i in batch["index_CB"][0, -take:].tolist()][:40]
    assert len(set(drawn)) < len(drawn)  # with replacement
    message, own = fold(work, job(shared, (0,), seed=5), batches)
    check(message, shared, fix_loop(shard, batches, params, seed=5, tau=tau, weight=0.7, a=0.75))
    sure = int((softmax(params, seen(shard.x, "weak")).max(1) >= tau).sum())
    assert own is None
    assert (message.metrics["unlabelled"].tolist(), message.metrics["pseudo"].tolist()) == ([40], [sure])
    assert message.weight_C.tolist() == [6 * min(take, sure)]


def test_tokens_are_mixed_before_the_last_layer() -> None:
    """A student of texts: the same loss, with the mixed rows' logits in place of those of a mixed row."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 40, n).astype(np.int32) for n in rng.integers(4, 12, 20)]
    shard = TextShard(ids, labels=np.full(20, -100), kind="classify")
    model = TextCNN(48, width=8, classes=3)
    source = ScarceLabels(TrainSource([shard], batch_size=1, steps=1, pad=1), unlabelled_rows=5, replacement=True)
    views = TextViews(1, strong=Words(drop=0.3, swap=0.2))
    shared = {name: 3 * x for name, x in model.init(2).items()}
    (batch,) = source.batches((0,), 4)
    asked = job(shared, (0,), seed=4)
    threshold = 0.45
    train = Train(model, optimizer=ClientOptimizer("sgd", lr=LR))
    message, _ = fold(FixAndMix(train, views, source, threshold=threshold, weight=0.7), asked, [batch])

    every = list(source.unlabelled(0))
    q = torch.cat([model.apply(shared, b["input_ids_CBT"][0], b["attention_mask_CBT"][0]) for b in every]).softmax(-1)
    (sure, found), index = q.max(-1), torch.cat([b["index_CB"][0] for b in every])
    fix = index[(index >= 0) & (sure >= threshold)]
    assert 5 < len(fix) < 20
    rows = fix[numpy_generator(4, 0, "fix", 0).permutation(len(fix))[:5]]
    mix = batch["index_CB"][0, -5:]
    share = numpy_generator(4, 0, "mixup", 0).beta(0.75, 0.75)
    names = ("input_ids_CBT", "attention_mask_CBT")
    flat = {name: torch.cat([b[name][0] for b in every]) for name in names}
    fixed = {**{name: flat[name][rows][None] for name in names}, "index_CB": rows[None]}
    strong = views.view(fixed, "strong", seed=4, clients=(0,), step=0)
    leaves = {name: x.clone().requires_grad_() for name, x in shared.items()}
    z, z_fix, z_mix = (
        model.apply(leaves, *(some[name] for name in names))
        for some in (
            {name: strong[name][0] for name in names},
            {name: flat[name][rows] for name in names},
            {name: flat[name][mix] for name in names},
        )
    )
    mixed = share * z_fix + (1 - share) * z_mix
    loss = torch.nn.functional.cross_entropy(z, found[rows])
    loss = loss + 0.7 * share * torch.nn.functional.cross_entropy(mixed, found[rows])
    loss = loss + 0.7 * (1 - share) * torch.nn.functional.cross_entropy(mixed, found[mix])
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(message.tensors[name][0], -LR * grad, rtol=1e-5, atol=1e-6)


def works(source: ScarceLabels) -> dict[str, Any]:
    return {
        "fixmatch": FixMatch(TRAIN, Moved(), threshold=0.7),
        "flexmatch": FixMatch(TRAIN, Moved(), threshold=0.7, rows=54, unlabelled=(34, 41, 48)),
        "semifl": FixAndMix(TRAIN, Moved(), source, threshold=0.8),
    }


@pytest.mark.parametrize("kind", ["fixmatch", "flexmatch", "semifl"])
def test_blocks_of_any_size_and_a_second_start_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """Three clients over three rounds, side by side or not; another process goes on where the first one ended."""
    steps = {0: 3, 1: 2, 2: 4}
    source = ScarceLabels(
        TrainSource(shards(3, 0 if kind == "semifl" else 6), batch_size=3, steps=steps),
        unlabelled_rows=8,
        replacement=kind == "semifl",
    )
    task, clients, results = ClientTask(work=works(source)[kind], source=source), (0, 1, 2), []
    for block in (3, 2, 1):
        shared, _ = start()
        for version in range(3):
            # A new engine a round: all that lasts is in the store.
            engine = LocalEngine({"w": task}, ClientStore(tmp_path / str(block)), block_size=block)
            messages = list(drain(engine, job(shared, clients, version=version, seed=version)))
            order = np.argsort(torch.cat([m.client_C for m in messages]).numpy())
            change = {name: torch.cat([m.tensors[name] for m in messages])[order] for name in shared}
            counts = torch.cat([m.metrics["pseudo"] for m in messages])[order]
            assert bool((counts > 0).all())
            shared = {name: x + change[name].mean(0) for name, x in shared.items()}
        results.append({**shared, **change, "counts": counts, **(engine.store.load(clients, 3) or {})})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


def test_a_client_that_is_sure_of_nothing_or_has_no_row_does_not_step() -> None:
    local = [*shards(1, 0), ArrayShard(x=np.zeros((0, FEATURES), np.float32), labels=np.zeros(0, np.int64))]
    source = ScarceLabels(TrainSource(local, batch_size=1, steps=2), unlabelled_rows=4, replacement=True)
    shared, _ = start()
    for clients, threshold in (((0, 1), 1.0), ((1,), 0.0)):
        work = FixAndMix(TRAIN, Moved(), source, threshold=threshold)
        message, _ = fold(work, job(shared, clients), source.batches(clients, 1))
        assert message.weight_C.tolist() == message.metrics["steps"].tolist() == [0] * len(clients)
        assert all(float(x.abs().max()) == 0 for x in message.tensors.values())
        assert message.metrics["failed"].tolist() == [0] * len(clients)


def test_what_is_out_of_range_is_refused() -> None:
    source = ScarceLabels(TrainSource(shards(1, 0), batch_size=1, steps=1), unlabelled_rows=4)
    for bad in ({"threshold": -0.1}, {"weight": 0.0}, {"mixup": float("inf")}):
        with pytest.raises(LichenError, match=rf"semi\.{next(iter(bad))}"):
            FixAndMix(TRAIN, Moved(), source, **bad)
    with pytest.raises(LichenError, match="language model"):
        FixAndMix(Train(Bigram()), Moved(), source)


def test_a_weakly_viewed_source_moves_its_rows() -> None:
    source = TrainSource(shards(1, 40), batch_size=4, steps=2)
    pairs = zip(source.batches((0,), 3), WeaklyViewed(source, Moved()).batches((0,), 3), strict=True)
    for plain, moved in pairs:
        torch.testing.assert_close(moved["x_CBF"], plain["x_CBF"] + 0.05)
    assert WeaklyViewed(source, Moved()).shape(0) == source.shape(0)
