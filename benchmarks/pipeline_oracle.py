"""Do hosts compute what torch's own pipeline does? Two processes over gloo, GPipe and 1F1B.

``python benchmarks/pipeline_oracle.py`` trains one step of plain SGD of a tiny Llama's adapter in two pieces: by
:class:`torch.distributed.pipelining.ScheduleGPipe` and ``Schedule1F1B`` between two processes, and by the hosts of
:mod:`lichen.algorithms.hosts.pipeline`. It prints the largest relative difference of a tensor's gradient, and keeps it
in ``results/pipeline``; what is there is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lichen.algorithms.hosts.mail import PIPELINE
from lichen.algorithms.hosts.pipeline import Pipeline
from lichen.clients.distillation.teacher_labels import NoBatches
from lichen.clients.pipeline.coded_link import CodedLink
from lichen.clients.pipeline.host import PipelineHost
from lichen.clients.training.optimize import ClientOptimizer
from lichen.core.children import bound_environment, end_with_parent
from lichen.core.contracts.client import ClientTask
from lichen.core.seeds import torch_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.rows import TextShard
from lichen.data.batches.shards import EvalSource, TrainSource
from lichen.engines.local import LocalEngine
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.pieces.carve import carve, spec_within
from lichen.models.pieces.piece_cohort import PieceCohort
from lichen.server.sampling import Everyone

RESULT = Path(__file__).parent / "results" / "pipeline" / "oracle.json"
PATIENCE = 300
"""Seconds that torch's processes may take."""

CUT, BLOCKS, ROWS, MICRO, WIDTH = 2, 4, 8, 4, 16


def whole() -> Any:
    """A tiny Llama whose weights are the same in every process."""
    import transformers as hf

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=97, num_hidden_layers=BLOCKS, initializer_range=0.1, **sizes))
    return model.requires_grad_(False).eval()


def piece_of(stage: int) -> Any:
    """The cohort of one host."""
    model, span = whole(), ((0, CUT), (CUT, BLOCKS))[stage]
    piece = carve(model, *span)
    spec = spec_within(Lora(targets=("q_proj", "v_proj", "down_proj"), rank=4, alpha=8.0), model, piece)
    if stage == 0:
        return PieceCohort(piece, adapter=spec, name="tiny", reference=True)
    return CausalCohort(piece, adapter=spec, name="tiny", reference=True, packed=False)


def start_of(stage: int) -> Tree:
    """The adapter, away from its beginning, so that both factors have gradients."""
    tree = piece_of(stage).init(0)
    return {n: x + 0.05 * torch.randn(x.shape, generator=torch_generator(1, n)) for n, x in tree.items()}


def rows() -> Tensor:
    """Tokens that are their own labels."""
    return torch.randint(4, 97, (ROWS, WIDTH), generator=torch_generator(2, "rows"))


class Stage(nn.Module):
    """A host's piece as a module of torch's pipeline."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.cohort, self.first = piece_of(stage), stage == 0
        self.names = tuple(start_of(stage))
        self.adapter = nn.ParameterList([nn.Parameter(x) for x in start_of(stage).values()])

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states of tokens, or logits of hidden states."""
        params_C = {name: p[None] for name, p in zip(self.names, self.adapter, strict=True)}
        if self.first:
            batch = {"active_C": torch.ones(1, dtype=torch.bool), "input_ids_CBT": x[None]}
            batch["attention_mask_CBT"] = torch.ones_like(x)[None]
            hidden: Tensor = self.cohort.hidden(params_C, {}, batch)[0]
            return hidden
        logits: Tensor = self.cohort.wrapped.call(params_C, {}, inputs_embeds=x, use_cache=False).logits
        return logits


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The sum over next tokens."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def torchs(rank: int, order: str, folder: str) -> None:
    """One process of torch's pipeline; writes its gradients."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    end_with_parent()
    init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = Stage(rank)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    kind: Any = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[order]
    schedule = kind(stage, n_microbatches=MICRO, loss_fn=loss_of, scale_grads=False)
    ids = rows()
    if rank == 0:
        schedule.step(ids)
    else:
        schedule.step(target=ids)
    save_file({n: p.grad for n, p in zip(module.names, module.adapter, strict=True)}, Path(folder) / str(rank))
    destroy_process_group()


def ours(order: Any, folder: Path) -> Tree:
    """The gradients of the hosts: what a step of rate 1 moves, times the number of tokens."""
    shard = TextShard(list(rows().numpy()), labels=list(rows().numpy()), kind="lm")
    optimizer = ClientOptimizer("sgd", lr=1.0)
    host = PipelineHost(piece=piece_of, stages=2, order=order, optimizer=optimizer, link=CodedLink(width=32))
    pipeline = Pipeline(
        host=host,
        names=tuple(frozenset(start_of(stage)) for stage in (0, 1)),
        sampler=Everyone(),
        weight_N=torch.ones(1),
        train=TrainSource([shard], batch_size=ROWS, steps=1),
        valid=EvalSource([shard.between(0, 0)], batch_size=4),
        steps=1,
        micro=MICRO,
        rounds=1,
    )
    engine = LocalEngine({PIPELINE: ClientTask(work=host, source=NoBatches())}, ClientStore(folder))
    start = start_of(0) | start_of(1)
    state, _ = pipeline.round(pipeline.init(Shared(start)), engine, 0)
    count = ROWS * (WIDTH - 1)
    return {n: (x - state.shared.trainable[n]) * count for n, x in start.items()}


def measured(order: str, place: str) -> dict[str, Any]:
    """How far the two are apart, in one order of the schedule; torch's processes end with this one, and in time."""
    folder, context = Path(place), multiprocessing.get_context("spawn")
    both = [context.Process(target=torchs, args=(rank, order, place)) for rank in (0, 1)]
    until = time.monotonic() + PATIENCE
    try:
        for process in both:
            process.start()
        for process in both:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in both:
            if process.pid is not None:
                process.kill()
                process.join()
    if any(process.exitcode for process in both):
        raise SystemExit(f"{order}: a process of torch's did not end well within {PATIENCE} s")
    theirs, mine = load_file(folder / "0") | load_file(folder / "1"), ours(order, folder / "state")
    off = max(float((mine[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
    return {"tensors": len(theirs), "largest": off}


def main() -> None:
    """Print the largest difference for each schedule."""
    if not RESULT.exists():
        os.environ |= bound_environment()
        found = {}
        for order in ("gpipe", "1f1b"):
            with TemporaryDirectory() as folder:
                found[order] = measured(order, folder)
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for order, one in json.loads(RESULT.read_text(encoding="utf-8")).items():
        tensors, off = one["tensors"], one["largest"]
        print(f"- {order}: {tensors} tensors, the largest relative difference of a gradient is {off:.1e}")


if __name__ == "__main__":
    sys.exit(main())
