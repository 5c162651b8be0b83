"""The laws that members of a family must obey, as functions for one's own tests.

``check_aggregator`` holds an aggregator to those of a sum: the same bytes in any order and grouping, and after a trip
between processes. ``check_client_task`` holds a client work to that of the client axis: a client's numbers have the
same bits alone and beside others. ``check_expected`` holds it to what it declares: each of its messages is admitted.
``check_gradient_step`` holds a link of a client's chain of gradient steps to it too,
and to those of its state. All raise an ``AssertionError`` that says which law is broken.

>>> from lichen import fl
>>> message = fl.Message(
...     group="g",
...     client_C=torch.arange(4),
...     version_C=torch.zeros(4, dtype=torch.int64),
...     tensors={"w": torch.arange(12.0).view(4, 3)},
...     weight_C=torch.tensor([1.0, 2.0, 1.0, 3.0], dtype=torch.float64),
... )
>>> check_aggregator(fl.Mean(), message, {"w": torch.zeros(3)})
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from lichen.clients.training.gradient_step import GradientStep
from lichen.core import tree as trees
from lichen.core.contracts import Aggregator, ClientTask
from lichen.core.errors import LichenError
from lichen.core.expected import specs_of
from lichen.core.fold import serve
from lichen.core.message import Job, Message, concatenate_messages, take_client
from lichen.core.parameters import split_shared
from lichen.core.seeds import torch_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree, digest, plain
from lichen.fl.expected_laws import check_expected

__all__ = ["LAWS", "check_aggregator", "check_client_task", "check_expected", "check_gradient_step"]

Law = Callable[[Aggregator, Message, Tree, int], None]


def check_aggregator(aggregator: Aggregator, message: Message, shared: Tree, *, seed: int = 0) -> None:
    """Hold an aggregator to every law of :data:`LAWS`, and let it refuse a round to which nobody came.

    Args:
        aggregator: The member.
        message: What several clients might send, three at least; the first of them has a weight above 0.
        shared: The server's tensors.
        seed: Of the orders that are tried.

    Raises:
        AssertionError: naming the law that is broken.
    """
    for law in LAWS.values():
        law(aggregator, message, shared, seed)
    try:
        aggregator.close(aggregator.zero(), shared)
    except LichenError:
        return
    raise AssertionError("close must raise a LichenError where nothing was folded in")


def _closed(aggregator: Aggregator, total: Any, shared: Tree) -> tuple[str, dict[str, float]]:
    change, metrics = aggregator.close(total, shared)
    return digest(change), metrics


def _hold(holds: bool, law: str) -> None:
    if not holds:
        raise AssertionError(law)


def _one(aggregator: Aggregator, message: Message) -> Any:
    return aggregator.add(aggregator.zero(), message)


def order(aggregator: Aggregator, message: Message, shared: Tree, seed: int) -> None:
    """Any order, blocks and merging give the same bytes."""
    clients, g = len(message.client_C), torch.Generator().manual_seed(seed)
    positions = torch.randperm(clients, generator=g).tolist()
    cuts = sorted({0, clients, *torch.randint(0, clients, (3,), generator=g).tolist()})
    folded, merged = aggregator.zero(), aggregator.zero()
    for block in [[take_client(message, k) for k in positions[a:b]] for a, b in pairwise(cuts)]:
        folded = aggregator.add(folded, concatenate_messages(block))
        part = aggregator.zero()
        for one in block:
            part = aggregator.add(part, one)
        merged = aggregator.merge(part, merged)
    whole = _closed(aggregator, _one(aggregator, message), shared)
    _hold(_closed(aggregator, folded, shared) == whole, "blocks in another order give the same bytes")
    _hold(_closed(aggregator, merged, shared) == whole, "totals that were merged give the same bytes")


def monoid(aggregator: Aggregator, message: Message, shared: Tree, seed: int) -> None:
    """``merge`` is associative, and ``zero`` is its neutral element."""
    del seed
    parts = [_one(aggregator, take_client(message, k)) for k in range(min(3, len(message.client_C)))]
    a, b, c = parts[0], parts[-1], parts[len(parts) // 2]
    left = aggregator.merge(aggregator.merge(a, b), c)
    right = aggregator.merge(a, aggregator.merge(b, c))
    _hold(_closed(aggregator, left, shared) == _closed(aggregator, right, shared), "merge is associative")
    one_by_one = _closed(aggregator, a, shared)
    for both in (aggregator.merge(a, aggregator.zero()), aggregator.merge(aggregator.zero(), a)):
        _hold(_closed(aggregator, both, shared) == one_by_one, "zero changes nothing")


def pure(aggregator: Aggregator, message: Message, shared: Tree, seed: int) -> None:
    """Folding in changes neither the total that there was nor the message."""
    del seed
    before = digest(message.tensors)
    total = _one(aggregator, take_client(message, 0))
    first = _closed(aggregator, total, shared)
    rest = concatenate_messages([take_client(message, k) for k in range(1, len(message.client_C))])
    aggregator.add(total, rest)
    aggregator.merge(_one(aggregator, rest), total)
    aggregator.merge(total, _one(aggregator, rest))
    _hold(_closed(aggregator, total, shared) == first, "add and merge leave the total that there was as it is")
    _hold(digest(message.tensors) == before, "add leaves the message as it is")


def weight_zero(aggregator: Aggregator, message: Message, shared: Tree, seed: int) -> None:
    """A client of weight 0 might as well have stayed away, whatever it sent."""
    del seed
    clients = len(message.client_C)
    weight_C, tensors = message.weight_C.clone(), {name: x_C.clone() for name, x_C in message.tensors.items()}
    weight_C[-1] = 0.0
    for x_C in tensors.values():
        x_C[-1] = torch.nan if x_C.is_floating_point() else torch.iinfo(x_C.dtype).min
    there = replace(message, weight_C=weight_C, tensors=tensors)
    without = concatenate_messages([take_client(there, k) for k in range(clients - 1)])
    same = _closed(aggregator, _one(aggregator, there), shared) == _closed(
        aggregator, _one(aggregator, without), shared
    )
    _hold(same, "a client of weight 0 counts for nothing, even if it sent no numbers")


def crossing(aggregator: Aggregator, message: Message, shared: Tree, seed: int) -> None:
    """A total that went through ``dump``, bytes and ``load`` merges and closes to the same bytes."""
    clients = len(message.client_C)
    cut = seed % (clients + 1)
    here, there = aggregator.zero(), aggregator.zero()
    for k in range(clients):
        if k < cut:
            here = aggregator.add(here, take_client(message, k))
        else:
            there = aggregator.add(there, take_client(message, k))
    tensors, header = aggregator.dump(here)
    crossed = aggregator.load(load(save(plain(tensors))), json.loads(json.dumps(header)))
    whole = _closed(aggregator, _one(aggregator, message), shared)
    merged = _closed(aggregator, aggregator.merge(crossed, there), shared)
    _hold(merged == whole, "a total that was dumped and loaded merges to the same bytes")
    if cut:
        same = _closed(aggregator, crossed, shared) == _closed(aggregator, here, shared)
        _hold(same, "a total that was dumped and loaded closes to the same bytes")


LAWS: Mapping[str, Law] = {
    "order": order,
    "monoid": monoid,
    "pure": pure,
    "weight_zero": weight_zero,
    "crossing": crossing,
}
"""Every law of an aggregator, by name; each takes the aggregator, a message, the shared tensors and a seed."""


def check_client_task(task: ClientTask, job: Job) -> None:
    """Hold a client work to the law of the client axis: a client alone and beside others gives the same bits.

    Its private state is held to it, too.

    Args:
        task: The work and its source, as a node knows them.
        job: What is asked, of two clients at least; its ``work`` may have any name.

    Raises:
        AssertionError: if a client's message or private state depends on its company.
    """
    _hold(len(job.clients) > 1, "the law needs two clients")
    one_by_one, in_one_block = (_served(task, job, size) for size in (1, len(job.clients)))
    for client, parts in one_by_one.items():
        for name, bits in parts.items():
            _hold(in_one_block[client][name] == bits, f"{name} of client {client} depends on who stands beside it")


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
    _hold(len(job.clients) > 1, "the law needs two clients")
    everyone, absent = [[True] * len(job.clients)] * 3, job.clients[-1]
    without = [*everyone[:1], [client != absent for client in job.clients], *everyone[2:]]
    first = _walk(step, job, job.clients, everyone)
    second = _walk(step, job, job.clients, without, first["own"])
    sends = step.sends(specs_of(split_shared(job.shared)[0]))
    _hold(dict(sends) == specs_of(trees.take(first["sent"], 0)), "it sends what it says that it sends")
    for k, client in enumerate(job.clients):
        alone = _walk(step, job, [client], [[True]] * 3)
        same = all(digest(alone[part]) == digest(_rows(first[part], k)) for part in alone)
        _hold(same, f"client {client} depends on who stands beside it")
        # What it kept went through bytes; a client that sat out the second step never had it.
        retained = load(save(plain(alone["own"]))) if alone["own"] else {}
        again = _walk(step, job, [client], [[active[k]] for active in without], retained)
        same = all(digest(again[part]) == digest(_rows(second[part], k)) for part in again)
        _hold(same, f"client {client} goes on otherwise from what it kept")
        skipped = _walk(step, job, [client], [[active[k]] for active in without], retained, leave_out=True)
        same = all(digest(skipped[part]) == digest(_rows(second[part], k)) for part in skipped)
        _hold(same, f"a step in which client {client} is not active leaves a trace")
    idle = _walk(step, job, job.clients, [], first["own"])
    _hold(not any(bool(x_C.any()) for x_C in idle["sent"].values()), "who takes no step sends zeros")
    _hold(digest(idle["own"]) == digest(first["own"]), "who takes no step keeps what it had")
    fast = _walk(step, job, job.clients, everyone, exact=False)
    for part, tree in first.items():
        close = all(torch.allclose(x_C, fast[part][name], rtol=1e-4, atol=1e-6) for name, x_C in tree.items())
        _hold(close, "fast steps are the exact ones but for rounding")


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
    trainable, _ = split_shared(job.shared)
    begin_C = params_C = trees.broadcast(trainable, len(clients))
    own_C = {**step.own(begin_C), **(own_C or {})}
    state, grads_C = step.init(job, clients, begin_C, own_C), Tree()
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
        _hold(
            before == [digest(tree) for tree in (given_C, state, params_C)], "update leaves what it is given as it is"
        )
        state, grads_C = after, {n: torch.where(_column(active_C, x_C), x_C, 0) for n, x_C in moved_C.items()}
        params_C = trees.sub(params_C, trees.scale(grads_C, 0.1))
    steps_C = torch.tensor(active, dtype=torch.float64).view(-1, len(clients)).sum(0)
    sent_C, new_C = step.final(state, trees.sub(params_C, begin_C), steps_C)
    return {"gradients": grads_C, "sent": sent_C, "own": {**own_C, **new_C}}


def _column(active_C: torch.Tensor, like_C: torch.Tensor) -> torch.Tensor:
    return active_C.view(-1, *[1] * (like_C.dim() - 1))
