"""What becomes of a language model that learns from what it wrote, over and over?

A small Llama is trained from nothing on what people wrote to each other, and writes as many texts. The next
generation learns from these alone (``replace``), or from them and everything before (``accumulate``, what a
:class:`lichen.data.synthetic.pool.Pool` does), with equally many steps from the same start, and so on. Judged by the
perplexity of real texts that nobody trained on, and by how many different pairs of words it writes.

A cell is one seed of both ways, which share the first generation; it is kept under ``results/`` and skipped when
it is there.

Run it: ``python benchmarks/collapse.py --cells`` (about a minute a generation), ``--cut`` for one seed on a scale of
seconds that writes nothing; without either it prints what is there.

Reference:
    Matthias Gerstgrasser et al. "Is Model Collapse Inevitable? Breaking the Curse of Recursion by Accumulating
    Real and Synthetic Data." COLM 2024. https://arxiv.org/abs/2404.01413
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tables
import torch
from diloco import Everyone, Held
from mutual_sides import judge

from lichen.algorithms.average import Average
from lichen.allocator import keep_large_buffers
from lichen.clients.training.diloco import Pace, Worker
from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask
from lichen.core.seeds import derive, numpy_generator
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.pack_rows import lm_rows
from lichen.data.batches.shards import TrainSource
from lichen.data.sources.catalog import fetch_entry
from lichen.data.sources.readers import chitchat
from lichen.data.synthetic.pool import Pool, SyntheticRow
from lichen.engines.local import LocalEngine
from lichen.fm.local import LocalFM
from lichen.models.full import FullCausal
from lichen.models.loading.load import load_causal
from lichen.models.students.scratch import Size, save_scratch
from lichen.research.diversity import distinct
from lichen.research.mutual.token_logits import fitting, public_shard
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = ("replace", "accumulate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What all cells have in common."""

    rows: int = 3000
    held: int = 500
    width: int = 96
    layers: int = 2
    heads: int = 4
    vocabulary: int = 1024
    length: int = 64
    steps: int = 500
    batch: int = 16
    lr: float = 3e-3
    most: int = 32
    generations: int = 5
    seeds: int = 3


CUT = Task(rows=60, held=20, width=32, layers=1, vocabulary=400, length=32, steps=10, most=8, generations=2, seeds=1)


def texts_of(task: Task, seed: int) -> tuple[list[str], list[str]]:
    """``(to learn from, held back)``: what people wrote to each other, drawn by the seed."""
    said = sorted({r.text for r in chitchat(fetch_entry("chitchat"), {}) if len(r.text.split()) >= 4})
    order = numpy_generator(seed, "collapse").permutation(len(said))
    return [said[i] for i in order[task.held :][: task.rows]], [said[i] for i in order[: task.held]]


def learn(task: Task, model: Any, start: Tree, tokenizer: Any, texts: Sequence[str], seed: int) -> Tree:
    """The model's weights after the task's steps on these texts."""
    source = TrainSource([lm_rows(texts, tokenizer, task.length)], batch_size=task.batch, steps=task.steps,
                         pad=tokenizer.pad_token_id, fixed_width=task.length)  # fmt: skip
    train = Train(model, optimizer=ClientOptimizer("adamw", lr=task.lr, weight_decay=0.1), gradient_steps=(Clip(1.0),))
    work = Worker(train, pace=Pace("cosine", steps=task.steps, rounds=1, warmup=task.steps // 10))
    algorithm = Average(aggregator=Mean("uniform"), optimizer=ServerSGD(1.0), sampler=Everyone(),
                        weight_N=torch.ones(1), rounds=1, valid=None)  # fmt: skip
    engine = LocalEngine({"train": ClientTask(work=work, source=source)}, Held({}))  # type: ignore[arg-type]
    state, _ = algorithm.round(algorithm.init(Shared.of_flat(start)), engine, seed)
    return state.shared.trainable


def run_cell(task: Task, seed: int) -> dict[str, Any]:
    """Every generation's numbers, by way."""
    begin, (real, held) = time.perf_counter(), texts_of(task, seed)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = Size(task.width, layers=task.layers, heads=task.heads, context=task.length)
        source = save_scratch(Path(folder) / "raw", size, real, vocabulary=task.vocabulary, seed=seed)
        bare, tokenizer = load_causal(source)
        model = FullCausal(bare, name="tiny")
        model.reference = False
        # A copy: the model's own weights become those of the generation that writes.
        start = {name: x.clone() for name, x in model.init(seed).items()}
        apart = public_shard(fitting(held, [tokenizer], most=task.length), tokenizer)

        def generation(number: int, texts: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
            weights = learn(task, model, start, tokenizer, texts, derive(seed, "learn"))
            if bare.load_state_dict(weights, strict=False).unexpected_keys:
                raise RuntimeError("the weights are not this model's")
            seeds = [derive(seed, "write", number, i) for i in range(task.rows)]
            prompts = [str(tokenizer.eos_token)] * task.rows
            wrote = LocalFM(bare, tokenizer, batch=250).generate(prompts, seeds=seeds, max_new_tokens=task.most)
            wrote = [text for text in wrote if text.strip()]
            one = {"generation": number, "learned_from": len(texts), "wrote": len(wrote),
                   "perplexity": judge(model, weights, [apart]), "distinct": distinct(wrote)}  # fmt: skip
            print("  " + "  ".join(f"{k} {v:.4g}" for k, v in one.items()), flush=True)
            return wrote, one

        first, one = generation(0, real)
        for way in WAYS:
            print(f" {way}", flush=True)
            wrote, found[way], pool = first, [one], Pool()
            for number in range(1, task.generations + 1):
                pool = pool.grow([SyntheticRow(text, model="tiny") for text in wrote], generation=number - 1)
                texts = wrote if way == "replace" else [*real, *(row.text for row in pool.rows)]
                wrote, later = generation(number, texts)
                found[way].append(later)
    return {**found, "seconds": time.perf_counter() - begin}


def main() -> None:
    """Run cells, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", action="store_true", help="run every cell that has no result")
    parser.add_argument("--cut", action="store_true", help="one seed of each way in seconds; nothing is kept")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_buffers()
    task = CUT if asked.cut else Task()
    for seed in range(task.seeds) if asked.cut or asked.cells else ():
        file = RESULTS / f"collapse-s{seed}.json"
        if not asked.cut and file.exists() and json.loads(file.read_text())["config"] == asdict(task):
            continue
        print(f"seed {seed}", flush=True)
        cell = run_cell(task, seed)
        if not asked.cut:
            about = {"seed": seed, "date": date.today().isoformat(), "config": asdict(task)}
            file.write_text(json.dumps({**about, **cell}, indent=1) + "\n")
    if not asked.cut:
        tables.collapse()


if __name__ == "__main__":
    main()
