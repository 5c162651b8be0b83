"""The workload in pfl-research's simulated backend: one model, clients one after another, FedAvg of the adapter.

Run it with the environment that ``setup.sh`` makes:
``FOLDER/pfl/bin/python benchmarks/peers/pfl_app/run.py --workload FOLDER``; under
``FOLDER/pfl/bin/torchrun --nproc-per-node 2`` its own workers share the clients.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch

sys.path.extend([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])

import peft_loop
from memory import PeakMemory
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel


@final
class Lossy(torch.nn.Module):
    """PEFT's model with the ``loss`` pfl calls; it keeps every step's loss."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[float] = []

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        loss = self.inner(**batch).loss
        self.seen.append(loss.item())
        return loss

    def metrics(self, **batch: torch.Tensor) -> dict[str, Any]:
        raise NotImplementedError("nothing is evaluated here")


@final
class Unevaluated(FederatedAveraging):
    """pfl's FedAvg without the evaluation of every client that it does in its first round."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        quiet = None if contexts is None else tuple(replace(context, do_evaluation=False) for context in contexts)
        return quiet, model, metrics


def over_workers(*values: float) -> list[float]:
    """Each value summed over pfl's workers."""
    together = torch.tensor(values, dtype=torch.float64)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(together)
    return together.tolist()


@final
class Rounds(TrainingProcessCallback):
    """Notes when rounds end and their mean loss over all workers' clients."""

    def __init__(self, model: Lossy) -> None:
        self.model = model
        self.marks: list[float] = []
        self.loss: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.marks.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.marks.append(time.perf_counter())
        total, count = over_workers(sum(self.model.seen), len(self.model.seen))
        self.loss.append(total / count)
        self.model.seen.clear()
        return False, Metrics()


def main() -> None:
    """Run the rounds; the first worker prints one line."""
    options = peft_loop.arguments("The workload in pfl-research's simulated backend.").parse_args()
    torch.set_num_threads(options.threads)
    rows = peft_loop.read(Path(options.workload))
    collate = peft_loop.collator(rows, padding=options.padding)
    steps, batch = rows.order.shape[1:]
    clients = len(rows.order)

    def plain(batch_rows: Any) -> dict[str, torch.Tensor]:
        return dict(collate(batch_rows))  # pfl knows dictionaries, not what tokenizers return

    def dataset(client: int) -> PyTorchDataDataset:
        own: Any = [row for rows_of_step in rows.batches(client) for row in rows_of_step]
        return PyTorchDataDataset(own, user_id=str(client), collate_fn=plain)

    with PeakMemory() as memory:
        inner = peft_loop.build(rows, dtype=options.dtype)
        peft_loop.set_shared(inner, peft_loop.start(inner))
        lossy = Lossy(inner)

        def adamw(params: Any, lr: float) -> torch.optim.Optimizer:
            return torch.optim.AdamW([x for x in params if x.requires_grad], lr=lr, weight_decay=0.0)

        model = PyTorchModel(
            model=lossy,
            local_optimizer_create=adamw,
            central_optimizer=torch.optim.SGD([x for x in lossy.parameters() if x.requires_grad], lr=1.0),
        )
        data = FederatedDataset(dataset, MinimizeReuseUserSampler(list(range(clients))))
        backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
        rounds = Rounds(lossy)
        Unevaluated().run(
            NNAlgorithmParams(
                central_num_iterations=options.rounds,
                evaluation_frequency=options.rounds,
                train_cohort_size=clients,
                val_cohort_size=None,
            ),
            backend,
            model,
            model_train_params=NNTrainHyperParams(
                local_batch_size=batch,
                local_num_epochs=None,
                local_num_steps=steps,
                local_learning_rate=rows.said["lr"],
                local_max_grad_norm=rows.said["clip"],
            ),
            callbacks=[rounds],
            send_metrics_to_platform=False,
        )
    (peak,) = over_workers(memory.mib)
    if os.environ.get("RANK", "0") != "0":
        return
    seconds = [b - a for a, b in pairwise(rounds.marks)]
    more = {
        "workers": int(os.environ.get("WORLD_SIZE", "1")),
        "whole_s": round(peft_loop.process_age(), 2),
        "peak_mib": round(peak),
        "version": f"pfl {version('pfl')}, torch {version('torch')}",
    }
    print(peft_loop.result("pfl", rows, options, seconds=seconds, loss=rounds.loss, **more))


if __name__ == "__main__":
    main()
