"""How far each way of aggregating LoRA lands from the true mean change, after more and more local steps.

Clients hold real reviews, the model is MiniLM with LoRA on its non-square layers (384 x 1536). The truth
is dense algebra in float64: the weighted mean of each client's own ``s B_k A_k``. One table is of the
deviation of averaging (FedIT) by local steps, one of every rule's error, for equal ranks and for unequal
ones, where one client has all directions and every block, and the others fewer of both. FlexLoRA is held
against the best matrix of its rank, and what it cuts off is told beside it; with room for all of the
clients' directions it is exact: ``python benchmarks/lowrank.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.server import Aggregator
from lichen.core.fold import serve
from lichen.core.message import Job, Message
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe
from lichen.server.lowrank.fedsvd import FedSVD
from lichen.server.lowrank.hetlora import HetLoRA
from lichen.server.lowrank.lowrank import FedEx, FedIT
from lichen.server.lowrank.redistribute import FlexLoRA, FLoRIST
from lichen.server.lowrank.stacking import FLoRA
from lichen.server.lowrank.submodel import Capacity
from lichen.server.optimize import ServerSGD

STEPS = (1, 2, 4, 8, 16, 32)
RULES_AFTER = 8
RANK = 4
RECIPE = (
    "data.max_clients=4",
    "model.adapter.target_modules=[intermediate.dense, output.dense]",
    f"model.adapter.rank={RANK}",
    f"model.adapter.alpha={2 * RANK}",
)
SCALING = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What clients answered, and what they were asked from: their own views of the shared tensors, by client."""

    shared: Tree
    views: dict[int, Tree]
    messages: list[Message]


def train(loaded: Any, steps: int, folder: Path, *, frozen: tuple[str, ...] = (), weaker: bool = False) -> Round:
    """One round of so many local steps; with ``weaker`` clients, from what each of them gets."""
    experiment = loaded.experiment
    work = Train(
        experiment.model,
        optimizer=ClientOptimizer(name="adamw", lr=3e-3),
        gradient_steps=(Clip(1.0),),
        freeze_schedule=(frozen,) if frozen else (),
    )
    client_task = {
        "train": ClientTask(work=work, source=experiment.training(experiment.clients.train, batch=4, steps=steps))
    }
    clients = range(len(experiment.clients.train))
    capacity = Capacity(
        tuple(max(1, RANK // 2 ** (k if weaker else 0)) for k in clients),
        last_N=tuple(4 - k if weaker and k else None for k in clients),
        scaling=SCALING,
    )
    views = {client: capacity.extract(experiment.start, capacity.key(client)).flat() for client in clients}
    messages: list[Message] = []
    for client, view in views.items():
        job = Job(work="train", shared=Shared.of_flat(view), version=0, clients=(client,), seed=1)
        messages += serve(job, client_task, ClientStore(folder))
    return Round(shared=experiment.start.flat(), views=views, messages=messages)


def true_mean(done: Round) -> dict[str, Tensor]:
    """The dense weighted mean of ``s B_k A_k`` over the clients that sent a layer, float64, by layer."""
    out: dict[str, Tensor] = {}
    for path in layers(done.shared):
        some = [m for m in done.messages if any(name.startswith(f"{path}.lora_") for name in m.tensors)]
        weight = sum(float(m.weight_C) for m in some)
        for m in some:
            view = done.views[int(m.client_C)]
            B, A = (
                view[name].double() + (m.tensors[name][0].double() if name in m.tensors else 0)
                for name in (f"{path}.lora_B", f"{path}.lora_A")
            )
            out[path] = out.get(path, 0) + float(m.weight_C) / weight * SCALING * (B @ A)
    return out


def layers(shared: Tree) -> list[str]:
    """Names of the layers with an adapter."""
    return sorted(name.removesuffix(".lora_A") for name in shared if name.endswith(".lora_A"))


def held(shared: Tree) -> dict[str, Tensor]:
    """The dense change that shared tensors stand for: ``s B A`` and the patch, by layer."""
    out: dict[str, Tensor] = {}
    for path in layers(shared):
        total = SCALING * (shared[f"{path}.lora_B"].double() @ shared[f"{path}.lora_A"].double())
        if f"patch.{path}.dense" in shared:
            total += shared[f"patch.{path}.dense"].double()
        elif f"patch.{path}.left" in shared:
            total += shared[f"patch.{path}.left"].double() @ shared[f"patch.{path}.right"].double()
        out[path] = total
    return out


def best(true: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Each layer's best matrix of one rank, by a dense singular value decomposition."""
    out: dict[str, Tensor] = {}
    for path, x in true.items():
        U, sigma, V = torch.linalg.svd(x, full_matrices=False)
        out[path] = (U[:, :rank] * sigma[:rank]) @ V[:rank]
    return out


def error(got: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Relative Frobenius error over the layers of the truth."""
    wrong = sum(float((got[p] - true[p]).square().sum()) for p in true)
    return (wrong / sum(float(t.square().sum()) for t in true.values())) ** 0.5


def close(aggregator: Aggregator, messages: list[Message], shared: Tree) -> tuple[Tree, dict[str, float]]:
    """The shared tensors after the round, and the metrics."""
    total = aggregator.zero()
    for message in messages:
        total = aggregator.add(total, message)
    change, metrics = aggregator.close(total, Shared.of_flat(shared))
    optimizer = ServerSGD(1.0)
    before = Shared.of_flat(shared)
    return optimizer.update(change, optimizer.init(before), before)[0].flat(), metrics


def roomy(shared: Tree, rank: int) -> Tree:
    """The same adapter with room for more directions, which are zero."""
    out = dict(shared)
    for path in layers(shared):
        A, B = shared[f"{path}.lora_A"], shared[f"{path}.lora_B"]
        out[f"{path}.lora_A"] = torch.cat([A, A.new_zeros(rank - A.shape[0], A.shape[1])])
        out[f"{path}.lora_B"] = torch.cat([B, B.new_zeros(B.shape[0], rank - B.shape[1])], 1)
    return out


def rules(loaded: Any, folder: Path) -> None:
    """Print every rule's error after one round."""
    Row = tuple[str, Callable[[], Aggregator], str]
    both: tuple[Row, ...] = (
        ("FedIT", FedIT, ""),
        ("HetLoRA", HetLoRA, ""),
        ("FedEx", lambda: FedEx(SCALING), ""),
        ("FLoRA", lambda: FLoRA(SCALING), ""),
        ("FlexLoRA", FlexLoRA, "best"),
        ("FlexLoRA, roomy", FlexLoRA, "roomy"),
        ("FLoRIST 0.99", lambda: FLoRIST(0.99), ""),
    )
    halves: tuple[Row, ...] = (("FedSVD", lambda: FedSVD(FedIT()), ""),)
    print(f"\nafter {RULES_AFTER} local steps")
    print(f"{'':>16}  {'equal ranks':>12}  {'unequal':>12}  metrics of unequal")
    for frozen, some in (((), both), (("lora_A",), halves)):
        rounds = [train(loaded, RULES_AFTER, folder, frozen=frozen, weaker=weaker) for weaker in (False, True)]
        for name, make, against in some:
            errors = []
            for done in rounds:
                true, shared = true_mean(done), done.shared
                if against == "roomy":
                    shared = roomy(shared, RANK * len(done.messages))
                new, metrics = close(make(), done.messages, shared)
                errors.append(error(held(new), best(true, RANK) if against == "best" else true))
            told = ", ".join(f"{key} {metrics[key]:.3g}" for key in ("deviation", "lost", "rank") if key in metrics)
            print(f"{name:>16}  {errors[0]:>12.3e}  {errors[1]:>12.3e}  {told}", flush=True)


def main() -> None:
    """Print both tables."""
    loaded = open_recipe(read_recipe("reviews-lora", RECIPE))
    shapes = {tuple(x.shape) for n, x in loaded.experiment.start.trainable.items() if n.endswith("lora_A")}
    print(f"{len(loaded.clients_data)} clients, rank {RANK}, A of shapes {sorted(shapes)}")
    print(f"{'local steps':>11}  {'FedIT error':>12}  {'FedEx error':>12}")
    with TemporaryDirectory() as folder:
        for steps in STEPS:
            done = train(loaded, steps, Path(folder))
            true = true_mean(done)
            it, ex = (error(held(close(a, done.messages, done.shared)[0]), true) for a in (FedIT(), FedEx(SCALING)))
            print(f"{steps:>11}  {it:>12.3e}  {ex:>12.3e}", flush=True)
        rules(loaded, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
