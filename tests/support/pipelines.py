"""A pipeline of hosts over a tiny model in this process, and the same steps of one process that has the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lichen.algorithms.hosts.mail import PIPELINE
from lichen.algorithms.hosts.micro_batches import micro_batches
from lichen.algorithms.hosts.pipeline import Pipeline
from lichen.clients.distillation.teacher_labels import NoBatches
from lichen.clients.pipeline.coded_link import CodedLink
from lichen.clients.pipeline.host import PipelineHost
from lichen.clients.pipeline.schedule import Order
from lichen.clients.training.optimize import ClientOptimizer, clip_C
from lichen.core.contracts.client import ClientTask
from lichen.core.seeds import derive, numpy_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.rows import TextShard
from lichen.data.batches.shards import EvalSource, TrainSource
from lichen.engines.local import LocalEngine
from lichen.models.causal_cohort import CausalCohort
from lichen.models.pieces.families import blocks_of
from lichen.server.sampling import Uniform
from lichen.transforms.activations import parse_activation_code
from support.pieces import BLOCKS, four_blocks, piece_of, spec_of, whole_of

STEPS, CLIENTS = 2, 4


def texts(rows: int = 7) -> list[TextShard]:
    """Each client's rows of tokens, of unequal lengths, which are their own labels but for the first two."""
    found = []
    for client in range(CLIENTS):
        rng = numpy_generator(client, "pipeline rows")
        ids = [rng.integers(4, 97, rng.integers(3, 14)).astype(np.int64) for _ in range(rows)]
        labels = [np.where(np.arange(len(row)) < 2, -100, row) for row in ids]
        found.append(TextShard(ids, labels=labels, kind="lm"))
    return found


def pipeline_of(
    name: str,
    cuts: Sequence[int],
    *,
    micro: int = 3,
    order: Order = "1f1b",
    clip: float | None = 0.5,
    piece: Callable[[int], Any] | None = None,
    code: Sequence[str] = (),
) -> Pipeline:
    """Three rounds over hosts that hold the pieces between these cuts."""
    spans = list(zip((0, *cuts), (*cuts, BLOCKS), strict=True))
    rows = texts()
    host = PipelineHost(
        piece=piece or (lambda stage: piece_of(name, *spans[stage])),
        stages=len(spans),
        order=order,
        optimizer=ClientOptimizer("adamw", lr=0.01, weight_decay=0.01),
        link=CodedLink(width=32, code=parse_activation_code(code) if code else None),
    )
    return Pipeline(
        host=host,
        names=tuple(frozenset(piece_of(name, *span).init(0)) for span in spans),
        sampler=Uniform(2),
        weight_N=torch.full((CLIENTS,), 7.0, dtype=torch.float64),
        train=TrainSource(rows, batch_size=3, steps=STEPS),
        valid=EvalSource(rows, batch_size=4),
        steps=STEPS,
        micro=micro,
        rounds=3,
        clip=clip,
    )


def here(pipeline: Pipeline, folder: Path) -> LocalEngine:
    """All hosts in this process."""
    return LocalEngine(
        {PIPELINE: ClientTask(work=pipeline.host, source=NoBatches())}, ClientStore(folder), raises=False
    )


def start_of(name: str) -> Shared:
    """What training begins with."""
    return Shared(whole_of(name).init(5))


class _Coded(torch.autograd.Function):
    """What a link makes of hidden states, and of their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden_BTH: Tensor, link: CodedLink) -> Tensor:
        ctx.link = link
        return link.arrived(link.departing(hidden_BTH, 0)[None])[0]

    @staticmethod
    def backward(ctx: Any, grad_BTH: Tensor) -> Any:  # type: ignore[override]
        return ctx.link.arrived(ctx.link.departing(grad_BTH, 0)[None])[0], None


def with_links(name: str, pipeline: Pipeline, cuts: Sequence[int]) -> Any:
    """The whole model, with what a link loses laid on the output of each block before a cut."""
    model = copy.deepcopy(four_blocks(name))

    def lose(block: Any, entry: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (_Coded.apply(out[0], pipeline.host.link), *out[1:])
        return _Coded.apply(out, pipeline.host.link)

    for cut in cuts:
        blocks_of(model)[1][cut - 1].register_forward_hook(lose)
    return CausalCohort(model, adapter=spec_of(name), name=name, packed=False)


def one_process(
    name: str, pipeline: Pipeline, seeds: Sequence[int], cuts: Sequence[int] = ()
) -> tuple[Tree, list[float]]:
    """``(adapter, mean loss of each round)`` after rounds of these seeds, all by the whole model."""
    whole, optimizer = with_links(name, pipeline, cuts) if cuts else whole_of(name), pipeline.host.optimizer
    params_C = {n: x[None] for n, x in start_of(name).trainable.items()}
    moments, losses = optimizer.init(params_C), []
    for seed in seeds:
        clients = pipeline.sampler.invite(pipeline.weight_N, derive(seed, "invite"))
        each = [list(pipeline.train.batches([client], seed)) for client in clients]
        total, tokens = 0.0, 0.0
        for at in range(STEPS):
            grads: Tree = {}
            count = 0
            for micro in micro_batches([dict(batches[at]) for batches in each], pipeline.micro):
                leaves = {n: x.detach().requires_grad_() for n, x in params_C.items()}
                loss_C, count_C = whole.loss(leaves, {}, _batch(micro))
                found = torch.autograd.grad(loss_C.sum(), list(leaves.values()))
                grads = {n: grads[n] + g if n in grads else g for n, g in zip(leaves, found, strict=True)}
                count, total = count + int(count_C[0]), total + float(loss_C.detach()[0])
            tokens += count
            mean = {n: g / count for n, g in grads.items()}
            mean = mean if pipeline.clip is None else clip_C(mean, pipeline.clip)
            params_C, moments = optimizer.update(mean, moments, params_C, active_C=torch.ones(1, dtype=torch.bool))
        losses.append(total / tokens)
    return {n: x[0] for n, x in params_C.items()}, losses


def _batch(micro: Tree) -> dict[str, Tensor]:
    ids_BT = micro["ids_BT"].long()
    mask_BT = (torch.arange(ids_BT.shape[1]) < micro["length_B"][:, None]).long()
    return {
        "active_C": torch.ones(1, dtype=torch.bool),
        "input_ids_CBT": ids_BT[None],
        "attention_mask_CBT": mask_BT[None],
        "labels_CBT": micro["labels_BT"].long()[None],
    }
