"""The workload in Flower's simulation: Ray actors that keep their model, FedAvg of the adapter.

Run it with the environment that ``setup.sh`` makes:
``FOLDER/flower/bin/python benchmarks/peers/flower_app/run.py --workload FOLDER --actors 2 --threads 1``
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import final

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
sys.path.extend([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])

import flower_client
import peft_loop
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from memory import PeakMemory


@final
class TimedFedAvg(FedAvg):
    """Flower's FedAvg, noting when each round is over and its mean loss."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.ended: list[float] = []
        self.loss: list[float] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.ended.append(time.perf_counter())
        self.loss.append(float(metrics["loss"]) if metrics else float("nan"))
        return arrays, metrics


def main() -> None:
    """Run the rounds and print one line."""
    parser = peft_loop.arguments("The workload in Flower's simulation.")
    parser.add_argument("--actors", type=int, default=2, help="Ray actors; --threads counts for each")
    options = parser.parse_args()
    folder = Path(options.workload).resolve()
    rows = peft_loop.read(folder)
    strategy, began = TimedFedAvg(len(rows.order)), [0.0]
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        first = peft_loop.start(peft_loop.build(rows, weights=False))
        asked = {name: getattr(options, name) for name in ("dtype", "padding", "threads")}
        config = ConfigRecord({"folder": str(folder), **asked})
        began[0] = time.perf_counter()
        strategy.start(grid, ArrayRecord(first), num_rounds=options.rounds, train_config=config)

    with PeakMemory() as memory:
        run_simulation(
            server,
            flower_client.app,
            num_supernodes=len(rows.order),
            backend_config={
                "init_args": {"num_cpus": options.actors * options.threads, "include_dashboard": False},
                "client_resources": {"num_cpus": options.threads, "num_gpus": 0.0},
            },
        )
    marks = [*began, *strategy.ended]
    seconds = [b - a for a, b in pairwise(marks)]
    if len(seconds) < options.rounds:
        raise SystemExit("the simulation ended before its last round; see its log above")
    more = {
        "whole_s": round(peft_loop.process_age(), 2),
        "peak_mib": memory.mib,
        "version": f"flwr {version('flwr')}, ray {version('ray')}, torch {version('torch')}",
    }
    print(peft_loop.result("flower", rows, options, seconds=seconds, loss=strategy.loss, **more))


if __name__ == "__main__":
    main()
