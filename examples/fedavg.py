"""Federated averaging on handwritten digits, in one file: ``python examples/fedavg.py``.

Ten clients hold the digits of two or three kinds each. In a round, five of them train the shared network on their own
rows, and the server adds the weighted mean of their changes to it. The accuracy is that on all clients' test rows.

    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas.
    "Communication-Efficient Learning of Deep Networks from Decentralized Data." AISTATS 2017.
    https://arxiv.org/abs/1602.05629

It prints:

    round 10: accuracy 0.76
    round 20: accuracy 0.77
    round 30: accuracy 0.83
    round 40: accuracy 0.85
    round 50: accuracy 0.86
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from lichen import fl

CLIENTS, INVITED = 10, 5


class Network(fl.Student):
    """64 pixels, 32 hidden units, 10 classes: one client's network, which runs for many side by side."""

    inputs = ("x_CBF",)

    def shapes(self):
        return {"hidden.weight": (32, 64), "hidden.bias": (32,), "out.weight": (10, 32), "out.bias": (10,)}

    def apply(self, params, x):
        hidden = torch.relu(x @ params["hidden.weight"].T + params["hidden.bias"])
        return hidden @ params["out.weight"].T + params["out.bias"]


class FedAvg:
    """The server's side of a round; ``fl.Average`` adds server optimizers, validation and the counting of bytes."""

    def init(self, shared):
        return fl.ServerState(round=0, shared=shared)

    def round(self, state, engine, seed):
        clients = fl.Uniform(INVITED).invite(torch.ones(CLIENTS), seed)
        job = fl.Job(work="train", shared=state.shared, version=state.round, clients=clients, seed=seed)
        mean = fl.Mean()
        came = fl.collect(engine, [job], mean)  # the clients' changes, weighed by the rows that each has seen
        change, metrics = mean.close(came.total, state.shared)
        moved = {name: x + change.trainable[name] for name, x in state.shared.trainable.items()}
        state = fl.ServerState(round=state.round + 1, shared=fl.Shared(moved))
        return state, fl.Report(round=state.round, clients=clients, metrics=metrics | accuracy(state, engine))


def accuracy(state, engine):
    """Every client tests the shared network on its own rows, and sends only counts."""
    job = fl.Job(work="test", shared=state.shared, version=state.round, clients=tuple(range(CLIENTS)), seed=0)
    confusion = fl.collect(engine, [job]).metrics["confusion"].sum(0)
    return {"accuracy": float(confusion.trace() / confusion.sum())}


def shards(rows):
    """These rows in order of their label, cut into twenty stretches: two of them for each client."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[rows].astype(np.float32) / 16, labels[rows]
    stretches = np.array_split(np.argsort(labels, kind="stable"), 2 * CLIENTS)
    two = [np.concatenate([stretches[c], stretches[10 + (3 * c + 7) % 10]]) for c in range(CLIENTS)]
    return [fl.ArrayShard(pixels[mine], labels=labels[mine]) for mine in two]


def main():
    network = Network(10, name="network")
    train = fl.Train(network, optimizer=fl.ClientOptimizer("sgd", lr=0.2))
    batches = fl.TrainSource(shards(slice(0, 1400)), batch_size=16, steps=20)
    every_row = fl.EvalSource(shards(slice(1400, None)), batch_size=64)
    client_tasks = {
        "train": fl.ClientTask(work=train, source=batches),
        "test": fl.ClientTask(work=fl.Evaluate(network), source=every_row),
    }
    with tempfile.TemporaryDirectory() as private:
        engine = fl.LocalEngine(client_tasks, fl.ClientStore(Path(private)))
        fl.run(FedAvg(), engine, lambda: fl.Shared(network.init(0)), rounds=50, seed=0, observers=[show])


def show(report):
    if report.round % 10 == 0:
        print(f"round {report.round}: accuracy {report.metrics['accuracy']:.2f}")


if __name__ == "__main__":
    main()
