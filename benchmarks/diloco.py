"""How much of a pre-training run's quality is left when workers seldom talk?

Four workers train one small Llama on the State of the Union addresses, each on an era of its own (so their
rows are far from alike). A stretch of data-parallel training from nothing, once a seed, is the common start of
every way, as DiLoCo's paper starts from a checkpoint. From there DiLoCo with H inner steps a round is held
against the data-parallel run that averages gradients in every step, at equal tokens and rows; beside it plain
averaging as Photon does it, half of all answers lost, and streaming in four fragments. Every way has an
inner rate of its own, chosen on another seed. Perplexity is that of held-out addresses under the shared model.

A cell is one way of training and one seed. Its result is one JSON file under ``results/``, skipped when
it is there; a cell that is stopped goes on from its last checkpoint when it is called again.

Run it: ``python benchmarks/diloco.py --cells`` (all), ``--only NAME``, ``--list``, ``--trial NAME RATE ...`` (inner
learning rates); without any of them it prints the tables and draws ``diloco.png`` from what is there.

Legend: C workers, B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diloco_page import plot, rates, results, ways
from torch.func import vmap
from torch.nn.functional import cross_entropy

from lichen.algorithms.average import Average
from lichen.algorithms.scores import score
from lichen.allocator import keep_large_buffers
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.evaluation.metrics import perplexity
from lichen.clients.training.diloco import Pace, Worker, fragment_of
from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.message import Job, size
from lichen.core.seeds import derive
from lichen.core.store import load_tree, save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.pack_rows import lm_rows
from lichen.data.batches.rows import TextShard
from lichen.data.batches.shards import EvalSource, TrainSource
from lichen.data.sources.catalog import cache_dir, fetch_entry
from lichen.data.sources.readers import sotu
from lichen.engines.local import LocalEngine
from lichen.models.full import FullCausal
from lichen.models.loading.load import load_causal
from lichen.models.objectives import NextToken
from lichen.models.students.scratch import Size, save_scratch
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SEEDS = (0, 1, 2)
WORKERS = 4
GATHER = 100
"""Steps of a round of the data-parallel run, whose rounds only say when its tensors are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What all ways of training have in common."""

    width: int = 64
    layers: int = 3
    heads: int = 2
    vocabulary: int = 1024
    length: int = 64
    batch: int = 2
    common: int = 2000
    common_lr: float = 2e-3
    steps: int = 4000
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    looks: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of training; ``every`` is H, 0 for gradients averaged in every step, ``lr`` the inner rate."""

    every: int
    label: str
    lr: float
    outer: tuple[float, float] = (0.7, 0.9)
    drop: float = 0.0
    fragments: int = 1


WAYS = {
    "parallel": Way(every=0, label="data parallel", lr=2e-3, outer=(1.0, 0.0)),
    "h5": Way(every=5, label="DiLoCo, H = 5", lr=2.5e-4),
    "h25": Way(every=25, label="DiLoCo, H = 25", lr=2.5e-4),
    "h100": Way(every=100, label="DiLoCo, H = 100", lr=1.25e-4),
    "h500": Way(every=500, label="DiLoCo, H = 500", lr=1.25e-4),
    "plain-h100": Way(every=100, label="plain averaging, H = 100", lr=1e-3, outer=(1.0, 0.0)),
    "mild-h100": Way(every=100, label="momentum 0.5, H = 100", lr=1e-3, outer=(0.7, 0.5)),
    "drop-h100": Way(every=100, label="half of the syncs dropped, H = 100", lr=1.25e-4, drop=0.5),
    "stream-h100": Way(every=100, label="four fragments, H = 100", lr=1.25e-4, fragments=4),
}
TRIAL_SEED, TRIAL_STEPS = SEEDS[-1] + 1, 1000
"""Inner rates are tried on a seed that no cell has, from its own common start."""


class Together:
    """The batches of all workers as those of one: the same rows, in one gradient."""

    def __init__(self, source: TrainSource) -> None:
        self.source = source

    def shape(self, client: int) -> int:
        return 0

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        for batch in self.source.batches(range(WORKERS), seed):
            yield {n: x[:1] if n == "active_C" else x.flatten(0, 1)[None] for n, x in batch.items()}


class Abreast:
    """``FullCausal`` with all workers in one pass: its losses, to rounding, in four fifths of its time."""

    def __init__(self, alone: FullCausal) -> None:
        self.alone, self.whole = alone, alone.whole
        self.name, self.group, self.base = alone.name, alone.group, alone.base
        self.classes, self.objective = None, NextToken()
        # Workers always stand side by side in the same company, so fused kernels round alike in every run.
        self.reference = alone.reference = False

    def init(self, seed: int) -> Tree:
        return self.alone.init(seed)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> torch.Tensor:
        return self.alone.logits(trainable_C, fixed, batch)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids_CBT, labels_CBT = batch["input_ids_CBT"], batch["labels_CBT"]
        # Rows of a packed text are full, and every token of theirs has a label.
        if ids_CBT.shape[0] == 1 or not torch.equal(ids_CBT, labels_CBT) or not batch["attention_mask_CBT"].all():
            return self.alone.loss(trainable_C, fixed, batch)

        def one(tensors: Tree, ids_BT: torch.Tensor) -> torch.Tensor:
            hidden_BTH = self.whole.call(tensors, part="model", input_ids=ids_BT, use_cache=False)[0]
            logits_BTV = self.whole.call(tensors, part="lm_head", input=hidden_BTH[:, :-1])
            return cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")

        loss_C = vmap(one)(trainable_C, ids_CBT)
        return loss_C, torch.full((ids_CBT.shape[0],), ids_CBT[0, :, 1:].numel())


class Held:
    """Private state in memory: a round of five steps would else write more than it computes."""

    def __init__(self, own: dict[int, Tree]) -> None:
        self.own = own

    def parted(self, clients: Sequence[int], version: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(c for c in clients if c in self.own), tuple(c for c in clients if c not in self.own)

    def load(self, clients: Sequence[int], version: int) -> Tree | None:
        return trees.stack([self.own[c] for c in clients]) if clients[0] in self.own else None

    def stage(self, clients: Sequence[int], version: int, own_C: Tree) -> None:
        self.own |= {c: trees.take(own_C, i) for i, c in enumerate(clients)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The model and everybody's rows."""

    model: Abreast
    start: Tree
    train: tuple[TextShard, ...]
    valid: TextShard
    pad: int


def addresses() -> list[str]:
    """Every address as one text, oldest first."""
    whole: dict[str, list[str]] = {}
    for record in sotu(fetch_entry("sotu"), {}):
        whole.setdefault(record.group, []).append(record.text)
    return ["\n".join(whole[name]) for name in sorted(whole, key=lambda name: (int(name[:4]), name))]


def prepare(task: Task, seed: int) -> Ready:
    """Every tenth address is held out; the others fall into eras of about equally many words."""
    texts = addresses()
    held, kept = texts[9::10], [text for i, text in enumerate(texts) if i % 10 != 9]
    size_ = Size(task.width, layers=task.layers, heads=task.heads, context=task.length)
    folder = work_folder(task) / f"model-{seed}"
    if not (folder / "tokenizer.json").exists():
        save_scratch(folder, size_, kept, vocabulary=task.vocabulary, seed=seed)
    bare, tokenizer = load_causal(folder)
    words = [len(text.split()) for text in kept]
    eras: list[list[str]] = [[] for _ in range(WORKERS)]
    behind = 0
    for text, count in zip(kept, words, strict=True):
        eras[min(WORKERS - 1, behind * WORKERS // sum(words))].append(text)
        behind += count
    model = Abreast(FullCausal(bare, name="scratch"))
    return Ready(
        model=model,
        start=model.init(0),
        train=tuple(lm_rows(era, tokenizer, task.length) for era in eras),
        valid=lm_rows(held, tokenizer, task.length),
        pad=tokenizer.pad_token_id,
    )


def work_folder(task: Task) -> Path:
    """Where models and checkpoints of this task lie."""
    return cache_dir() / "benchmarks" / f"diloco-{key_of(task)}"


def key_of(*parts: Any) -> str:
    """A short digest of configs."""
    return hashlib.sha256(json.dumps([asdict(p) for p in parts], sort_keys=True).encode()).hexdigest()[:12]


def judge(ready: Ready, shared: Tree, most: int | None = None) -> float:
    """Perplexity per token of the held-out rows, or of so many spread evenly among them."""
    shard = ready.valid
    if most and most < shard.size:
        rows = [shard.input_ids[i * shard.size // most] for i in range(most)]
        shard = TextShard(rows, labels=rows, kind="lm")
    source = EvalSource([shard], batch_size=16, pad=ready.pad)
    engine: Any = LocalEngine({"valid": ClientTask(work=Evaluate(ready.model), source=source)}, Held({}))  # type: ignore[arg-type]
    _, sums = score(engine, Job(work="valid", shared=Shared.of_flat(shared), version=0, clients=(0,), seed=0))
    return perplexity(float(sums["loss_sum"]), float(sums["count"]))


def algorithm_of(task: Task, way: Way, ready: Ready) -> tuple[Average, dict[str, ClientTask], int]:
    """``(algorithm, client_tasks, inner steps a round)`` from where everybody begins."""
    pace = Pace("cosine", steps=_steps(way), rounds=task.steps // _steps(way), warmup=task.warmup)
    return _algorithm(task, way, ready, pace)


def _steps(way: Way) -> int:
    """Inner steps of a round: a fragment crosses every H steps, and there is one after another."""
    return (way.every or GATHER) // way.fragments


def _algorithm(task: Task, way: Way, ready: Ready, pace: Pace) -> tuple[Average, dict[str, ClientTask], int]:
    workers = WORKERS if way.every else 1
    train = Train(
        ready.model,
        optimizer=ClientOptimizer("adamw", lr=way.lr, weight_decay=task.weight_decay),
        gradient_steps=(Clip(task.clip),),
    )
    work = Worker(train, fragments=way.fragments, drop=way.drop, pace=pace)
    source = TrainSource(ready.train, batch_size=task.batch, steps=pace.steps, pad=ready.pad, fixed_width=task.length)
    lr, momentum = way.outer
    algorithm = Average(
        aggregator=Mean("uniform"),
        optimizer=ServerSGD(lr, momentum=momentum, nesterov=momentum > 0),
        sampler=Everyone(),
        weight_N=torch.ones(workers),
        rounds=pace.rounds,
        valid=None,
    )
    return algorithm, {"train": ClientTask(work=work, source=source if way.every else Together(source))}, pace.steps


def begun(task: Task, seed: int) -> Ready:
    """The model after the stretch that all ways have in common, trained at the first call."""
    ready, file = prepare(task, seed), work_folder(task) / f"common-{seed}.safetensors"
    if not file.exists():
        print(f"the common start of seed {seed}: perplexity {judge(ready, ready.start, 768):.2f}", end="", flush=True)
        way = Way(every=0, label="common start", lr=task.common_lr, outer=(1.0, 0.0))
        pace = Pace("constant", steps=GATHER, rounds=task.common // GATHER, warmup=task.warmup)
        algorithm, client_tasks, _ = _algorithm(task, way, ready, pace)
        state, engine = algorithm.init(Shared(ready.start)), LocalEngine(client_tasks, Held({}), block_size=WORKERS)  # type: ignore[arg-type]
        while state.round < algorithm.rounds:
            state, _ = algorithm.round(state, engine, derive(seed, "common", state.round))
        print(f" to {judge(ready, state.shared.trainable, 768):.2f}", flush=True)
        save_tree(file, state.shared.flat(), {})
    shared, _ = load_tree(file)
    # In the model's order, as in restore.
    return replace(ready, start={name: shared[name] for name in ready.start})


class Everyone:
    """All workers in every round."""

    def invite(self, weight_N: torch.Tensor, seed: int) -> tuple[int, ...]:
        return tuple(range(weight_N.shape[0]))


def run_cell(task: Task, way: Way, seed: int, *, file: Path | None = None, until: float = float("inf")) -> Any:
    """Train one cell; ``None`` where the time was up first, and it is to be called again."""
    ready = begun(task, seed)
    algorithm, client_tasks, steps = algorithm_of(task, way, ready)
    state, held, log = restore(file, algorithm.init(Shared(ready.start)))
    engine = LocalEngine(client_tasks, held, block_size=WORKERS)  # type: ignore[arg-type]
    engine.bytes_up, engine.bytes_down = log["bytes_up"], log["bytes_down"]
    stride = max(steps, task.steps // task.looks)
    began, spent = time.process_time(), log["seconds"]
    if not log["curve"]:
        log["curve"].append({"tokens": 0, "perplexity": judge(ready, state.shared.trainable, 768)})
    while state.round < algorithm.rounds:
        state, report = algorithm.round(state, engine, derive(seed, "round", state.round))
        log["tokens"] += report.tokens
        log["peak_up"] = max(log["peak_up"], report.bytes_up // algorithm.weight_N.shape[0])
        done = state.round * steps
        if done % stride < steps or state.round == algorithm.rounds:
            value = judge(ready, state.shared.trainable, 768)
            log["curve"].append({"tokens": log["tokens"], "perplexity": value})
            log |= {"bytes_up": engine.bytes_up, "bytes_down": engine.bytes_down}
            log["seconds"] = spent + time.process_time() - began
            if file:
                keep(file, state, held, log)
            print(f"  step {done:5}  perplexity {value:8.2f}  {log['seconds']:6.0f} s", flush=True)
            if time.time() > until and state.round < algorithm.rounds:
                return None
    log["parameters"] = sum(x.numel() for x in ready.start.values())
    log["perplexity"] = judge(ready, state.shared.trainable)
    log["start"] = judge(ready, ready.start)
    log["valid_tokens"] = int(ready.valid.length_N.sum())
    log["rows"] = [shard.size for shard in ready.train]
    return counted(task, way, ready.start, log)


def counted(task: Task, way: Way, start: Tree, log: dict[str, Any]) -> dict[str, Any]:
    """Bytes of workers that average gradients, and the least that must come down when fragments stream.

    The data-parallel run is computed as one worker; on a network each of four would send a tensor of the
    model's size in every step and receive one.
    """
    if not way.every:
        rounds = task.steps // GATHER
        log["peak_up"] = log["bytes_up"] // rounds
        log["bytes_up"], log["bytes_down"] = (
            log[name] // rounds * WORKERS * task.steps for name in ("bytes_up", "bytes_down")
        )
    log["least_down"] = log["bytes_down"]
    if way.fragments > 1:
        place = fragment_of({name: x.shape for name, x in start.items()}, way.fragments)
        parts = [{n: x for n, x in start.items() if place[n] == f} for f in range(way.fragments)]
        job = Job(
            work="train", shared=Shared.of_flat(start), version=0, clients=(0,), seed=0, settings={"lr_scale": 1.0}
        )
        each = task.steps // way.every
        log["least_down"] = WORKERS * each * sum(size(replace(job, shared=Shared.of_flat(part))) for part in parts)
    return log


def keep(file: Path, state: ServerState, held: Held, log: Mapping[str, Any]) -> None:
    """Everything a cell needs to go on, in one file."""
    tree = trees.join("shared/", state.shared.flat(), trees.join("optimizer/", state.optimizer, {}))
    for client, own in held.own.items():
        tree = trees.join(f"own/{client}/", own, tree)
    save_tree(file, tree, {"round": state.round, "log": log})


def restore(file: Path | None, state: ServerState) -> tuple[ServerState, Held, dict[str, Any]]:
    """Where a cell stands."""
    if file is None or not file.exists():
        log = {"bytes_up": 0, "bytes_down": 0, "peak_up": 0, "tokens": 0, "seconds": 0.0, "curve": []}
        return state, Held({}), log
    tree, header = load_tree(file)
    shared, tree = trees.split(tree, "shared/")
    optimizer, tree = trees.split(tree, "optimizer/")
    own = {c: trees.split(tree, f"own/{c}/")[0] for c in range(WORKERS)}
    # In the model's order, not the file's: fast norm clipping adds the tensors up as they lie.
    shared = {name: shared[name] for name in state.shared.trainable}
    state = replace(state, round=header["round"], shared=Shared.of_flat(shared), optimizer=optimizer)
    return state, Held({c: part for c, part in own.items() if part}), header["log"]


def cells() -> dict[str, tuple[Way, int]]:
    """Every cell by name."""
    return {f"{name}-s{seed}": (way, seed) for seed in SEEDS for name, way in WAYS.items()}


def run_cells(names: Sequence[str], minutes: float) -> None:
    """Run what has no result yet."""
    task, every = Task(), cells()
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        way, seed = every[name]
        result, checkpoint = RESULTS / f"diloco-{name}.json", work_folder(task) / f"{name}.safetensors"
        if result.exists():
            print(f"{name}: done", flush=True)
            continue
        print(name, flush=True)
        log = run_cell(task, way, seed, file=checkpoint, until=time.time() + 60 * minutes)
        if log is None:
            print(f"{name}: the time is up; call again to go on")
            continue
        about = {
            "cell": name,
            "command": f"python benchmarks/diloco.py --only {name}",
            "date": date.today().isoformat(),
            "config": {**asdict(task), **asdict(way), "seed": seed, "workers": WORKERS},
            "hash": key_of(task, way),
        }
        result.write_text(json.dumps({**about, **log}, indent=1) + "\n")
        checkpoint.unlink(missing_ok=True)


def trial(name: str, rates: Sequence[float]) -> None:
    """A way at some inner rates, on a short run on a seed that no cell has; what is known is not run again."""
    file = RESULTS / "diloco-trial.json"
    known = tried()
    task, ready = replace(Task(), steps=TRIAL_STEPS), begun(Task(), TRIAL_SEED)
    for lr in rates:
        if (word := f"{lr:g}") not in known.get(name, {}):
            algorithm, client_tasks, _ = algorithm_of(task, replace(WAYS[name], lr=lr), ready)
            state, held = algorithm.init(Shared(ready.start)), Held({})
            engine = LocalEngine(client_tasks, held, block_size=WORKERS)  # type: ignore[arg-type]
            while state.round < algorithm.rounds:
                state, _ = algorithm.round(state, engine, derive(TRIAL_SEED, "round", state.round))
            known.setdefault(name, {})[word] = round(judge(ready, state.shared.trainable, 768), 3)
            file.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name:12} {word:>8}  {known[name][word]:9.2f}", flush=True)


def tried() -> dict[str, dict[str, float]]:
    """What trials of inner rates found."""
    file = RESULTS / "diloco-trial.json"
    return json.loads(file.read_text()) if file.exists() else {}


def main() -> None:
    """Run cells, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", action="store_true", help="run every cell that has no result")
    parser.add_argument("--only", metavar="NAME", help="run this cell, or this way with all its seeds")
    parser.add_argument("--list", action="store_true", help="cells, and which are done")
    parser.add_argument("--trial", nargs="+", metavar=("NAME", "LR"), help="try a way at inner learning rates")
    parser.add_argument("--minutes", type=float, default=18.0, help="a cell stops at its next checkpoint after these")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="There is a performance drop")
    keep_large_buffers()
    every = cells()
    if asked.list:
        for name in every:
            print(f"{name:18} {'done' if (RESULTS / f'diloco-{name}.json').exists() else '-'}")
    elif asked.trial:
        trial(asked.trial[0], [float(word) for word in asked.trial[1:]])
    elif asked.only:
        names = [name for name in every if asked.only in (name, name.rpartition("-s")[0])]
        if not names:
            sys.exit(f"no cell {asked.only!r}; --list names them")
        run_cells(names, asked.minutes)
    elif asked.cells:
        run_cells(list(every), asked.minutes)
    else:
        found = results()
        if not found:
            sys.exit("no result yet: run --cells first")
        plot(found, HERE / "diloco.png")
        print("\n".join([*ways(found), "", *rates()]))


if __name__ == "__main__":
    main()
