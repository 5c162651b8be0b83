"""Handwritten digits among clients of three unlike networks, each of whom mostly sees a few of the digits."""

from __future__ import annotations

from functools import cache

import numpy as np
from sklearn.datasets import load_digits

from lichen.clients.distillation.private_models import LocalInit, private_client_tasks
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import CohortModel
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, TrainSource
from lichen.models.students.students import ImageMLP

KINDS = {"deep": (0, 3), "wide": (1, 4), "narrow": (2, 5)}
CLIENTS = 6


@cache
def models() -> dict[str, CohortModel]:
    return {
        "deep": ImageMLP(64, hidden=(24, 24), classes=10, name="deep"),
        "wide": ImageMLP(64, hidden=(48,), classes=10, name="wide"),
        "narrow": ImageMLP(64, hidden=(6,), classes=10, name="narrow"),
    }


@cache
def shards() -> tuple[tuple[ArrayShard, ...], ArrayShard, ArrayShard]:
    """``(every client's rows, public rows, test rows)``."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16 - 0.3).astype(np.float32)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(y))
    public, test, rest = order[:400], order[400:900], order[900:]
    share = rng.dirichlet(np.full(CLIENTS, 0.5), size=10)
    owner = np.array([rng.choice(CLIENTS, p=share[y[i]]) for i in rest])
    own = tuple(ArrayShard(x[rest[owner == c][:60]], labels=y[rest[owner == c][:60]]) for c in range(CLIENTS))
    return own, ArrayShard(x[public], labels=y[public]), ArrayShard(x[test], labels=y[test])


def train(kind: str, *, personal: bool, lr: float = 0.02) -> Train:
    return Train(models()[kind], optimizer=ClientOptimizer("adamw", lr=lr), personal=personal)


def local(steps: int = 30) -> TrainSource:
    return TrainSource(shards()[0], batch_size=20, steps=steps)


def everyone(shard: ArrayShard) -> EvalSource:
    """The same rows for all clients."""
    return EvalSource(dict.fromkeys(range(CLIENTS), shard), batch_size=500)


def client_tasks(*, digest_steps: int = 40, steps: int = 30) -> dict[str, ClientTask]:
    """Those of private models that exchange answers."""
    own, public, test = shards()
    out: dict[str, ClientTask] = {}
    for kind, model in models().items():
        start = model.init(0)
        out |= private_client_tasks(
            kind,
            train(kind, personal=True),
            start=Shared.of_flat(start),
            own=local(steps),
            public=public,
            clients=KINDS[kind],
            digest_steps=digest_steps,
            counts={c: np.bincount(own[c].labels, minlength=10).tolist() for c in range(CLIENTS)},
        )
        judge = LocalInit(Evaluate(model, personal=True), start=Shared.of_flat(start))
        out[f"valid/{kind}"] = ClientTask(work=judge, source=everyone(test))
    return out
