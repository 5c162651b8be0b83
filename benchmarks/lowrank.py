"""How far each way of averaging LoRA lands from the true mean change, after more and more local steps.

Clients hold real reviews, the model is MiniLM with LoRA on its non-square layers (384 x 1536). The truth
is dense algebra in float64: the weighted mean of each client's own ``s B_k A_k``. Prints one row for
every number of local steps: ``python benchmarks/lowrank.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lichen.clients.optimize import ClientOptimizer
from lichen.clients.train import Train
from lichen.core.contracts import Aggregator, Station
from lichen.core.fold import serve
from lichen.core.message import Job, Message
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.recipes.open import open_recipe
from lichen.recipes.read import read_recipe
from lichen.server.lowrank import FedEx, FedIT
from lichen.server.optimize import ServerSGD

STEPS = (1, 2, 4, 8, 16, 32)
RECIPE = (
    "data.max_clients=4",
    "model.adapter.targets=[intermediate.dense, output.dense]",
    "model.adapter.rank=4",
    "model.adapter.alpha=8",
)


def true_mean(messages: list[Message], shared: Tree, scale: float) -> dict[str, Tensor]:
    """The dense weighted mean of ``s B_k A_k``, float64, by layer."""
    out: dict[str, Tensor] = {}
    weight = sum(float(m.weight_C.sum()) for m in messages)
    for path in sorted(name.removesuffix(".lora_A") for name in shared if name.endswith(".lora_A")):
        A, B = shared[f"{path}.lora_A"].double(), shared[f"{path}.lora_B"].double()
        total = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
        for m in messages:
            for c in range(m.client_C.shape[0]):
                A_k = A + m.tensors[f"{path}.lora_A"][c].double()
                B_k = B + m.tensors[f"{path}.lora_B"][c].double()
                total += float(m.weight_C[c]) / weight * scale * (B_k @ A_k)
        out[path] = total
    return out


def held(shared: Tree, scale: float) -> dict[str, Tensor]:
    """The dense change that shared tensors stand for: ``s B A`` and the patch, by layer."""
    out: dict[str, Tensor] = {}
    for path in sorted(name.removesuffix(".lora_A") for name in shared if name.endswith(".lora_A")):
        total = scale * (shared[f"{path}.lora_B"].double() @ shared[f"{path}.lora_A"].double())
        if f"patch.{path}.dense" in shared:
            total += shared[f"patch.{path}.dense"].double()
        elif f"patch.{path}.left" in shared:
            total += shared[f"patch.{path}.left"].double() @ shared[f"patch.{path}.right"].double()
        out[path] = total
    return out


def error(got: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Relative Frobenius error over all layers."""
    wrong = sum(float((got[p] - true[p]).square().sum()) for p in true)
    return (wrong / sum(float(t.square().sum()) for t in true.values())) ** 0.5


def measure(opened: Any, steps: int, make: Callable[[], Aggregator], scale: float, folder: Any) -> float:
    """The error of one aggregator after one round of so many local steps."""
    bench = opened.bench
    work = Train(bench.model, optimizer=ClientOptimizer(name="adamw", lr=3e-3), clip=1.0)
    source = bench.training(bench.train, batch=4, steps=steps)
    clients = tuple(range(len(bench.train)))
    job = Job(work="train", shared=bench.start, version=0, clients=clients, seed=1)
    messages = list(serve(job, {"train": Station(work=work, source=source)}, ClientStore(folder)))
    aggregator = make()
    total = aggregator.zero()
    for message in messages:
        total = aggregator.add(total, message)
    change, _ = aggregator.close(total, bench.start)
    optimizer = ServerSGD(1.0)
    shared, _ = optimizer.update(change, optimizer.init(bench.start), bench.start)
    return error(held(shared, scale), true_mean(messages, bench.start, scale))


def main() -> None:
    """Print the table."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    opened = open_recipe(read_recipe("reviews-lora", RECIPE))
    adapter = opened.bench.recipe.model.adapter
    scale = adapter.alpha / adapter.rank
    shapes = {tuple(x.shape) for n, x in opened.bench.start.items() if n.endswith("lora_A")}
    print(f"{len(opened.owners)} clients, rank {adapter.rank}, A of shapes {sorted(shapes)}")
    print(f"{'local steps':>11}  {'FedIT error':>12}  {'FedEx error':>12}")
    with TemporaryDirectory() as folder:
        for steps in STEPS:
            it = measure(opened, steps, FedIT, scale, Path(folder))
            ex = measure(opened, steps, lambda: FedEx(scale), scale, Path(folder))
            print(f"{steps:>11}  {it:>12.3e}  {ex:>12.3e}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
