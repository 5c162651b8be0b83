"""Two toys that ask back within a job: a sum under pairwise masks, in three stages, and training split at a layer.

No toy is safe: the masks' secrets are seeds, and the key agreement is a product of small numbers.

Legend: C clients, N clients of the job, B rows, F features, H hidden, K classes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lichen.core.collecting.admission import Admission
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, MetricSpec, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.seeds import derive, torch_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.data.batches.shards import ArrayShard, TrainSource
from lichen.engines.node import serve_frames
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker

__all__ = ["WORKS", "MaskedSum", "NoRows", "Split", "SplitServer", "SumServer", "plain_sum", "split_task", "unsplit"]

PRIME = 2_147_483_647
LENGTH = 3

Talk = Generator[Message, Tree, tuple[Message, Tree | None]]


def stacked(job: Job, clients: Sequence[int], tensors: Tree, group: str) -> Message:
    count = len(clients)
    return Message(
        group=group,
        client_C=torch.tensor(clients),
        version_C=torch.full((count,), job.version),
        tensors=tensors,
        weight_C=torch.ones(count, dtype=torch.float64),
        metrics={"count": torch.ones(count, dtype=torch.float64)},
    )


class NoRows:
    """A source without batches."""

    def shape(self, client: int) -> Any:
        return ()

    def batches(self, clients: Sequence[int], seed: int) -> Any:
        return iter(())


# --- masks -----------------------------------------------------------------------------------------------------------


def value_of(client: int) -> Tensor:
    """What a client adds to the sum."""
    return torch.randint(-(2**40), 2**40, (LENGTH,), generator=torch_generator(client, "value"))


def plain_sum(clients: Iterable[int]) -> Tensor:
    return torch.stack([value_of(client) for client in clients]).sum(0)


def mask_of(seed: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (LENGTH,), generator=torch_generator(seed, "mask"))


@dataclass(frozen=True)
class MaskedSum:
    """Keys, shares, masked values; the message reveals the secrets of those who left in between.

    ``fails`` has clients who cannot go on, with the stage before which that shows; ``memory`` is the largest block
    that has room for the last stage.
    """

    fails: Mapping[int, int] = field(default_factory=dict)
    memory: int = 1 << 30

    def questions(self, job: Job) -> Sequence[Expected]:
        count, metrics = int(job.settings["clients"]), self.expected(job).metrics
        return [
            Expected(group="masks", tensors=tensors, metrics=metrics)
            for tensors in (
                {"key": TensorSpec((), torch.int64)},
                {"share_N": TensorSpec((count,), torch.int64)},
                {"masked": TensorSpec((LENGTH,), torch.int64)},
            )
        ]

    def expected(self, job: Job) -> Expected:
        return Expected(
            group="masks",
            tensors={"reveal_N": TensorSpec((int(job.settings["clients"]),), torch.int64)},
            metrics={"count": MetricSpec(1.0, 1.0)},
        )

    def talk(self, job: Job, clients: Sequence[int], own_C: Tree | None, batches: Iterable[Batch]) -> Talk:
        def check(stage: int) -> None:
            for client in clients:
                if self.fails.get(client) == stage:
                    raise LichenError(f"client {client} cannot go on", where="toy")

        secret = [derive(job.seed, client, "secret") % PRIME for client in clients]
        check(0)
        keys = yield stacked(job, clients, {"key": torch.tensor([s * 7 % PRIME for s in secret])}, "masks")
        check(1)
        share_CN = torch.tensor(secret).unsqueeze(1) * keys["there_N"]
        shares = yield stacked(job, clients, {"share_N": share_CN}, "masks")
        check(2)
        masked = [value_of(client) for client in clients]
        for c, client in enumerate(clients):
            me = keys["who_N"][c].tolist().index(client)  # a node's own job names nobody else
            for other in shares["there_N"][c].nonzero().flatten().tolist():
                if other != me:
                    mask = mask_of(secret[c] * int(keys["key_N"][c, other]) % PRIME)
                    masked[c] = masked[c] + mask if other > me else masked[c] - mask
        left = yield stacked(job, clients, {"masked": torch.stack(masked)}, "masks")
        check(3)
        if len(clients) > self.memory:
            raise MemoryError
        reveal_CN = torch.where(shares["there_N"] & ~left["there_N"], shares["share_N"], 0)
        seen = own_C["seen"] + 1 if own_C else torch.ones(len(clients))
        return stacked(job, clients, {"reveal_N": reveal_CN}, "masks"), {"seen": seen}


@dataclass
class SumServer:
    """Passes keys and shares on, sums what is masked, and takes off the masks of those who left."""

    key_N: Tensor = field(default_factory=lambda: torch.zeros(0))
    masked: dict[int, Tensor] = field(default_factory=dict)
    present: list[tuple[int, ...]] = field(default_factory=list)

    def answer(self, question: Message, job: Job, stage: int) -> Tree:
        count, who = len(question.client_C), question.client_C.tolist()
        at = torch.tensor([job.clients.index(client) for client in who])
        there_N = torch.zeros(len(job.clients), dtype=torch.bool).index_fill(0, at, True)
        out = {"there_N": there_N.expand(count, -1)}
        self.present.append(tuple(who))
        if stage == 0:
            self.key_N = torch.zeros(len(job.clients), dtype=torch.int64).index_copy(0, at, question.tensors["key"])
            out["key_N"] = self.key_N.expand(count, -1)
            out["who_N"] = torch.tensor(job.clients).expand(count, -1)
        elif stage == 1:
            share_NN = torch.zeros(len(job.clients), count, dtype=torch.int64)
            out["share_N"] = share_NN.index_copy(0, at, question.tensors["share_N"][:, at]).T
        else:
            self.masked = dict(zip(who, question.tensors["masked"], strict=True))
        return out

    def total(self, job: Job, messages: Sequence[Message]) -> Tensor:
        """The sum of all who sent masked values."""
        secret_N = torch.zeros(len(job.clients), dtype=torch.int64)
        for message in messages:
            secret_N = torch.maximum(secret_N, message.tensors["reveal_N"].amax(0))
        total = torch.stack(list(self.masked.values())).sum(0)
        for left in secret_N.nonzero().flatten().tolist():
            for client in self.masked:
                me = job.clients.index(client)
                mask = mask_of(int(secret_N[left]) * int(self.key_N[me]) % PRIME)
                total = total - mask if left > me else total + mask
        return total


# --- split -----------------------------------------------------------------------------------------------------------

ROWS, FEATURES, HIDDEN, CLASSES, STEPS, RATE = 4, 5, 6, 3, 3, 0.25


def lower_of(job: Job) -> Tensor:
    return job.shared.trainable["lower"].clone().requires_grad_()


def upper_of(seed: int) -> Tensor:
    return torch.randn(HIDDEN, CLASSES, generator=torch_generator(seed, "upper")).requires_grad_()


def stepped(weight: Tensor) -> Tensor:
    return (weight.detach() - RATE * weight.grad).requires_grad_()  # type: ignore[operator]


@dataclass(frozen=True)
class Split:
    """Clients have the lower layer, the server the upper; activations go up, their gradients come down."""

    def questions(self, job: Job) -> Sequence[Expected]:
        tensors = {"h_BH": TensorSpec((ROWS, HIDDEN)), "labels_B": TensorSpec((ROWS,), torch.int64)}
        return [Expected(group="split", tensors=tensors, metrics=self.expected(job).metrics)] * STEPS

    def expected(self, job: Job) -> Expected:
        tensors = {"lower": TensorSpec((FEATURES, HIDDEN))}
        return Expected(group="split", tensors=tensors, metrics={"count": MetricSpec(1.0, 1.0)})

    def talk(self, job: Job, clients: Sequence[int], own_C: Tree | None, batches: Iterable[Batch]) -> Talk:
        lowers = [lower_of(job) for _ in clients]
        for batch in batches:
            h = [torch.relu(batch["x_CBF"][c] @ lower) for c, lower in enumerate(lowers)]
            sent = {"h_BH": torch.stack([x.detach() for x in h]), "labels_B": batch["labels_CB"]}
            answer = yield stacked(job, clients, sent, "split")
            for c, x in enumerate(h):
                x.backward(answer["grad_BH"][c])
            lowers = [stepped(lower) for lower in lowers]
        change = torch.stack([lower.detach() - job.shared.trainable["lower"] for lower in lowers])
        return stacked(job, clients, {"lower": change}, "split"), None


@dataclass
class SplitServer:
    """The upper layer of each client, trained as questions come."""

    upper: dict[int, Tensor] = field(default_factory=dict)

    def answer(self, question: Message, job: Job, stage: int) -> Tree:
        out = []
        for c, client in enumerate(question.client_C.tolist()):
            if stage == 0:
                self.upper[client] = upper_of(job.seed)
            h = question.tensors["h_BH"][c].clone().requires_grad_()
            cross_entropy(h @ self.upper[client], question.tensors["labels_B"][c]).backward()
            self.upper[client] = stepped(self.upper[client])
            out.append(h.grad)
        return {"grad_BH": torch.stack(out)}  # type: ignore[arg-type]


def split_task(clients: int) -> ClientTask:
    rng = np.random.default_rng(3)
    shards = [
        ArrayShard(x=rng.normal(size=(9, FEATURES)).astype(np.float32), labels=rng.integers(0, CLASSES, 9))
        for _ in range(clients)
    ]
    return ClientTask(work=Split(), source=TrainSource(shards, batch_size=ROWS, steps=STEPS))


def client_tasks(work: MaskedSum | None = None) -> dict[str, ClientTask]:
    """Both works, as a node has them."""
    return {"masks": ClientTask(work=work or MaskedSum(), source=NoRows()), "split": split_task(4)}


def unsplit(task: ClientTask, job: Job, client: int) -> tuple[Tensor, Tensor]:
    """``(change of the lower layer, the upper layer)`` of one client that has both."""
    lower, upper = lower_of(job), upper_of(job.seed)
    for batch in task.source.batches([client], job.seed):
        logits = torch.relu(batch["x_CBF"][0] @ lower) @ upper
        cross_entropy(logits, batch["labels_CB"][0]).backward()
        lower, upper = stepped(lower), stepped(upper)
    return lower.detach() - job.shared.trainable["lower"], upper


WORKS = Admission(works={"masks": MaskedSum(), "split": Split()})


if __name__ == "__main__":  # a node; its arguments are the folder of its state, and who fails before which stage
    torch.set_num_threads(1)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    tasks = client_tasks(MaskedSum(fails={int(c): stage for c, stage in json.loads(sys.argv[2]).items()}))
    talks = Talks(tasks, ClientStore(Path(sys.argv[1])))
    serve_frames(source, sink, SiteWorker(lambda rate: talks))
