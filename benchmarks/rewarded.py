"""What models clients earn by CGSV: honest ones, one with random labels, a twin, and one that sends zeros.

The clients of ``valued.py``: five honest owners, one whose labels are drawn, one that sends zeros for its rows,
and a twin that has the first one's rows, in an order of its own. Each trains a model of its own, is paid in coordinates
of the common change (β from little to all), and is scored on 300 rows of all classes; beside it training alone, and the
model of plain averaging, which all would share.

``python benchmarks/rewarded.py --run 0 1 2`` takes these seeds, seconds each, and keeps ``results/rewarded.json``;
``python benchmarks/rewarded.py`` prints who has what.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from valued import NOISE, PUBLIC, RIDER, ROUNDS, TWIN, clients_of, rows

from lichen import fl
from lichen.algorithms.rewarded import EachItsOwn, Rewarded
from lichen.clients.evaluation.evaluate import measure
from lichen.core import tree as trees
from lichen.server.fairness.cgsv import shares

RESULTS = Path(__file__).with_name("results") / "rewarded.json"
BETAS = (1.0, 10.0, 100.0)
HONEST = (0, 1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Only:
    """Invites one client."""

    client: int

    def invite(self, weight_N: torch.Tensor, seed: int) -> tuple[int, ...]:
        return (self.client,)


def zeros(reply: fl.Reply, job: fl.Job) -> Iterator[fl.Reply]:
    """The rider's messages."""
    message = reply.message
    assert message is not None
    if reply.clients == (RIDER,):
        reply = replace(reply, message=replace(message, tensors=trees.zeros_like(message.tensors)))
    yield reply


def run(seed: int) -> dict[str, Any]:
    """Accuracy of every client's model, alone and at each β, of the shared one, and the shares that were paid last."""
    public, shards = rows(seed)
    clients = clients_of(shards, "plain")
    model = fl.ImageMLP(64, hidden=(64,), classes=10)
    train = fl.Train(model, optimizer=fl.ClientOptimizer(name="sgd", lr=0.1, momentum=0.9))
    source = fl.TrainSource(clients, batch_size=16, steps=0, epochs=2)
    (batch,) = fl.EvalSource((public,), batch_size=PUBLIC).batches((0,), 0)
    start = fl.Shared(model.init(seed))

    def accuracy(tensors: fl.Tree) -> float:
        confusion = measure(model, trees.broadcast(tensors, 1), {}, batch)["confusion"][0]
        return float(confusion.diagonal().sum() / confusion.sum())

    with tempfile.TemporaryDirectory() as folder:
        local = fl.LocalEngine(
            {"train": fl.ClientTask(work=train, source=source)}, fl.ClientStore(Path(folder)), block_size=1
        )
        engine = fl.AroundEngine(local, on_reply=zeros)
        plain = fl.Average(
            aggregator=fl.Mean(),
            optimizer=fl.ServerSGD(),
            sampler=fl.Everyone(),
            weight_N=torch.tensor([float(shard.size) for shard in clients]),
            rounds=ROUNDS,
            valid=None,
        )

        def rounds(algorithm: Any) -> Any:
            return fl.run(algorithm, engine, lambda: start, rounds=ROUNDS, seed=seed)

        found: dict[str, list[float]] = {}
        paid: dict[str, list[float]] = {}
        alone = [rounds(replace(plain, sampler=Only(client))) for client in range(len(clients))]
        found["alone"] = [accuracy(state.shared.trainable) for state in alone]
        for beta in BETAS:
            own = Rewarded(rounds=replace(plain, downlink=EachItsOwn()), beta=beta, spill=Path(folder) / "spill")
            state = rounds(own)
            models_N = trees.split(state.downlink, "now/")[0]
            found[f"{beta:g}"] = [accuracy(trees.take(models_N, client)) for client in range(len(clients))]
            paid[f"{beta:g}"] = shares(state.downlink["reputation"], beta).tolist()
        shared = accuracy(rounds(plain).shared.trainable)
    return {"rows": [shard.size for shard in clients], "accuracy": found, "paid": paid, "shared": shared}


def table(seeds: dict[str, Any]) -> None:
    """Who has what accuracy; several numbers are the seeds."""
    settings = ["alone", *(f"{beta:g}" for beta in BETAS)]
    heads = ["alone", *(f"β = {one}" for one in settings[1:]), "plain averaging"]
    print(f"| client | {' | '.join(heads)} | share of the change at β = {settings[1]} |")
    print("|---|" + "---:|" * (len(heads) + 1))
    who: dict[str, Callable[[list[float]], float]] = {
        "honest, the best of five": lambda numbers: max(numbers[client] for client in HONEST),
        "honest, the worst of five": lambda numbers: min(numbers[client] for client in HONEST),
        "twin": lambda numbers: numbers[TWIN],
        "random labels": lambda numbers: numbers[NOISE],
        "sends zeros": lambda numbers: numbers[RIDER],
    }
    for name, pick in who.items():
        parts = [" ".join(f"{pick(one['accuracy'][at]):.1%}" for one in seeds.values()) for at in settings]
        parts.append(" ".join(f"{one['shared']:.1%}" for one in seeds.values()))
        parts.append(" ".join(f"{pick(one['paid'][settings[1]]):.0%}" for one in seeds.values()))
        print(f"| {name} | {' | '.join(parts)} |")


def main() -> int:
    """Run seeds, or print the table of what was kept."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--run", nargs="+", type=int, metavar="SEED", help="measure anew")
    args = ask.parse_args()
    if args.run:
        seeds = {str(seed): run(seed) for seed in args.run}
        kept = {"rounds": ROUNDS, "torch": torch.__version__, "seeds": seeds}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    table(json.loads(RESULTS.read_text(encoding="utf-8"))["seeds"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
