"""The laws that members of a family must obey, as functions for one's own tests.

``check_aggregator`` holds an aggregator to those of a sum: the same bytes in any order and grouping, after a trip
between processes, and from messages that were lifted and masked, if it says that it needs no more than a sum.
``check_client_task`` holds a client work to that of the client axis: a client's numbers have the same bits alone and
beside others. ``check_expected`` holds it to what it declares: each of its messages is admitted.
``check_gradient_step`` holds a link of a client's chain of gradient steps to it too, and to those of its state. All
raise an ``AssertionError`` that says which law is broken.

>>> from lichen import fl
>>> message = fl.Message(
...     group="g",
...     client_C=torch.arange(4),
...     version_C=torch.zeros(4, dtype=torch.int64),
...     tensors={"w": torch.arange(12.0).view(4, 3)},
...     weight_C=torch.tensor([1.0, 2.0, 1.0, 3.0], dtype=torch.float64),
... )
>>> check_aggregator(fl.Mean(), message, fl.Shared({"w": torch.zeros(3)}))
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

from lichen.clients.training.gradient_step import GradientStep
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientTask
from lichen.core.expected import specs_of
from lichen.core.fold import serve
from lichen.core.message import Job, take_client
from lichen.core.seeds import torch_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree, digest, plain
from lichen.fl.aggregator_laws import LAWS, check_aggregator, hold
from lichen.fl.expected_laws import check_expected

__all__ = ["LAWS", "check_aggregator", "check_client_task", "check_expected", "check_gradient_step"]


def check_client_task(task: ClientTask, job: Job) -> None:
    """Hold a client work to the law of the client axis: a client alone and beside others gives the same bits.

    Its private state is held to it, too.

    Args:
        task: The work and its source, as a node knows them.
        job: What is asked, of two clients at least; its ``work`` may have any name.

    Raises:
        AssertionError: if a client's message or private state depends on its company.
    """
    hold(len(job.clients) > 1, "the law needs two clients")
    one_by_one, in_one_block = (_served(task, job, size) for size in (1, len(job.clients)))
    for client, parts in one_by_one.items():
        for name, bits in parts.items():
            hold(in_one_block[client][name] == bits, f"{name} of client {client} depends on who stands beside it")


def _served(task: ClientTask, job: Job, block_size: int) -> dict[int, dict[str, str]]:
    """For each client, the digests of what it sent and of what it keeps."""
    found: dict[int, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = ClientStore(Path(folder) / "private")
        for message in serve(job, {job.work: task}, store, block_size=block_size):
            for place, client in enumerate(message.client_C.tolist()):
                one = take_client(message, place)
                sent = {"tensors": one.tensors, "weight": {"": one.weight_C}, "metrics": dict(one.metrics)}
                found[client] = {name: digest(tree) for name, tree in sent.items()}
        for client in job.clients:
            own_C = store.load([client], job.version + 1)
            found[client]["private state"] = digest(own_C or {})
    return found


def check_gradient_step(step: GradientStep, job: Job) -> None:
    """Hold a gradient step to its laws, on drawn gradients.

    Args:
        step: The member, or a chain of them.
        job: With what the step looks for, and two clients at least.

    Raises:
        AssertionError: naming the law that is broken.
    """
    hold(len(job.clients) > 1, "the law needs two clients")
    everyone, absent = [[True] * len(job.clients)] * 3, job.clients[-1]
    without = [*everyone[:1], [client != absent for client in job.clients], *everyone[2:]]
    first = _walk(step, job, job.clients, everyone)
    second = _walk(step, job, job.clients, without, first["own"])
    sends = step.sends(specs_of(job.shared.trainable))
    hold(dict(sends) == specs_of(trees.take(first["sent"], 0)), "it sends what it says that it sends")
    for k, client in enumerate(job.clients):
        alone = _walk(step, job, [client], [[True]] * 3)
        same = all(digest(alone[part]) == digest(_rows(first[part], k)) for part in alone)
        hold(same, f"client {client} depends on who stands beside it")
        # What it kept went through bytes; a client that sat out the second step never had it.
        retained = load(save(plain(alone["own"]))) if alone["own"] else {}
        again = _walk(step, job, [client], [[active[k]] for active in without], retained)
        same = all(digest(again[part]) == digest(_rows(second[part], k)) for part in again)
        hold(same, f"client {client} goes on otherwise from what it kept")
        skipped = _walk(step, job, [client], [[active[k]] for active in without], retained, leave_out=True)
        same = all(digest(skipped[part]) == digest(_rows(second[part], k)) for part in skipped)
        hold(same, f"a step in which client {client} is not active leaves a trace")
    idle = _walk(step, job, job.clients, [], first["own"])
    hold(not any(bool(x_C.any()) for x_C in idle["sent"].values()), "who takes no step sends zeros")
    hold(digest(idle["own"]) == digest(first["own"]), "who takes no step keeps what it had")
    fast = _walk(step, job, job.clients, everyone, exact=False)
    for part, tree in first.items():
        close = all(torch.allclose(x_C, fast[part][name], rtol=1e-4, atol=1e-6) for name, x_C in tree.items())
        hold(close, "fast steps are the exact ones but for rounding")


def _rows(tree: Tree, client: int) -> Tree:
    return {name: x_C[client : client + 1] for name, x_C in tree.items()}


def _walk(
    step: GradientStep,
    job: Job,
    clients: Sequence[int],
    active: Sequence[Sequence[bool]],
    own_C: Tree | None = None,
    *,
    leave_out: bool = False,
    exact: bool = True,
) -> dict[str, Tree]:
    """A round of these clients on gradients drawn by (client, step): the last gradients, what is sent, what is kept.

    Who is not active has no gradient but not-a-number; with ``leave_out`` such steps do not happen, for one client.
    """
    trainable = job.shared.trainable
    initial_C = params_C = trees.broadcast(trainable, len(clients))
    own_C = {**step.own(initial_C), **(own_C or {})}
    state, grads_C = step.init(job, clients, initial_C, own_C), Tree()
    for t, on in enumerate(active):
        if leave_out and not any(on):
            continue
        active_C = torch.tensor(on)
        draws = [torch_generator(job.seed, client, "gradient", t) for client in clients]
        given_C = {
            n: torch.stack([torch.randn(x.shape, generator=g) for g in draws]).to(x) for n, x in trainable.items()
        }
        given_C = {n: torch.where(_column(active_C, x_C), x_C, torch.nan) for n, x_C in given_C.items()}
        before = [digest(tree) for tree in (given_C, state, params_C)]
        moved_C, after = step.update(given_C, state, params_C, active_C=active_C, exact=exact)
        hold(before == [digest(tree) for tree in (given_C, state, params_C)], "update leaves what it is given as it is")
        state, grads_C = after, {n: torch.where(_column(active_C, x_C), x_C, 0) for n, x_C in moved_C.items()}
        params_C = trees.sub(params_C, trees.scale(grads_C, 0.1))
    steps_C = torch.tensor(active, dtype=torch.float64).view(-1, len(clients)).sum(0)
    sent_C, new_C = step.final(state, trees.sub(params_C, initial_C), steps_C)
    return {"gradients": grads_C, "sent": sent_C, "own": {**own_C, **new_C}}


def _column(active_C: torch.Tensor, like_C: torch.Tensor) -> torch.Tensor:
    return active_C.view(-1, *[1] * (like_C.dim() - 1))
