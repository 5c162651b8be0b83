"""What do a large and a small language model gain from each other when neither's weights may move?

A small Llama with a vocabulary of its own is trained from nothing on addresses and on what people wrote to
each other. Four shops then hold a hundred reviews of an article of clothing each, of which the small model knows
little, and a copy of it; a server holds SmolLM2 with an adapter; 256 public reviews of other articles are everybody's.

FedMKT: both sides tell their sixteen likeliest next tokens on the public texts and learn where the other knew
better. It is held against the same steps on the same texts with nobody told anything. FedCoLLM: the small
model's adapter is averaged over the four and then learns with SmolLM2 at the server; held against an adapter that
reads the same texts there with nobody told anything, against averaging alone and against everybody alone.
Perplexity is that of rows the four hold back: each on its own, and each on everybody's.

A cell is one way and one seed. Its result is one JSON file under ``results/``, skipped when it is there; a cell
that is stopped goes on from its last checkpoint when it is called again. The first cell, ``pretrain``, trains the
small model, and the others begin there.

Run it: ``python benchmarks/mutual.py --cells`` (all), ``--only NAME``, ``--list``; ``--cut`` does everything on a
scale of seconds and writes nothing; without any of them it prints what is there.

Legend: C clients, N texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import tables
import torch
from diloco import Everyone
from mutual_sides import CUT, Task, bridge, judge, pretrain, sides

from lichen.algorithms.alone import Alone
from lichen.algorithms.average import Average
from lichen.algorithms.scores import score
from lichen.allocator import keep_large_buffers
from lichen.clients.evaluation.metrics import perplexity
from lichen.core.contracts.algorithm import Algorithm, Report
from lichen.core.contracts.client import ClientTask
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.sources.catalog import cache_dir
from lichen.engines.local import LocalEngine
from lichen.research.mutual.cotune import CoTune, CoTunedModel, large_of
from lichen.research.mutual.mutual import Group, Mutual
from lichen.research.mutual.select import Select
from lichen.research.mutual.token_logits import starts
from lichen.research.mutual.train_then_report import TrainThenReport, TrainThenReportSource
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD

RESULTS = Path(__file__).resolve().parent / "results"


EARLY = ("width", "layers", "heads", "vocabulary", "length", "pretrain", "pretrain_batch", "pretrain_lr")
"""What of a task the pre-training reads."""

APART = ("public", "most", "top_k", "listen", "lr", "large_lr", "hear_lr", "lm", "rest")
"""What is read only where somebody tells somebody."""

UNREAD: dict[str, tuple[str, ...]] = {
    "fedmkt": ("alone_lr", "lora_lr", "hear_lr"),
    "unheard": ("alone_lr", "lora_lr", "hear_lr"),
    "cotune": ("alone_lr", "lr"),
    "reading": ("alone_lr", "lr"),
    "fedavg": ("alone_lr", *APART),
    "alone": ("lora_lr", *APART),
}
"""What of a task a way does not read, so that its cells stay when it changes."""


def key_of(task: Task, cell: str) -> str:
    """A short digest of what this cell reads of the task."""
    way = cell.partition("-s")[0]
    unread = [key for key in asdict(task) if key not in EARLY] if way == "pretrain" else UNREAD[way]
    about = {key: value for key, value in asdict(task).items() if key not in unread}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def mutual(task: Task, folder: Path, seed: int, *, transfer: bool) -> tuple[Algorithm, dict[str, ClientTask], Tree]:
    """FedMKT, with or without knowledge."""
    small, large = sides(task, folder, whole=True)
    everyone = tuple(range(task.people))
    told, local = small.report(everyone, personal=True), small.local(task.lr, personal=True)
    client_tasks = {
        "visit": ClientTask(
            work=TrainThenReport(local.work, report=told.work),
            source=TrainThenReportSource(local.source, public=told.source),
        ),
        "listen": small.distill(everyone, task.lr, personal=True),
        "valid": small.valid(personal=True),
        "common": small.valid(personal=True, common=True),
    }
    group = Group(
        clients=everyone, start=small.model.init(0), up=bridge(small, large), down=bridge(large, small),
        base=small.model.base,
    )  # fmt: skip
    algorithm = Mutual(
        groups=(group,),
        report=large.report((0,), personal=False),
        distill=large.distill((0,), task.large_lr, personal=False),
        select=Select(tuple(starts(large.public).tolist())),
        rounds=task.rounds,
        transfer=transfer,
    )
    return algorithm, client_tasks, large.model.init(seed)


def cotune(task: Task, folder: Path, seed: int, *, how: str) -> tuple[Algorithm, dict[str, ClientTask], Tree]:
    """FedCoLLM, plain averaging, or everybody alone, all with the small model's adapter."""
    small, large = sides(task, folder, whole=False)
    personal = how == "alone"
    lr = task.alone_lr if personal else task.lora_lr
    client_tasks = {"train": small.local(lr, personal=personal), "valid": small.valid(personal=personal)}
    client_tasks["common"] = small.valid(personal=personal, common=True)
    if personal:
        return Alone(clients=task.people, rounds=task.rounds), client_tasks, small.model.init(seed)
    average = Average(
        aggregator=Mean(), optimizer=ServerSGD(1.0), sampler=Everyone(), rounds=task.rounds,
        weight_N=torch.tensor([float(shard.size) for shard in small.train]), base=small.model.base,
        valid="valid" if how == "fedavg" else None,
    )  # fmt: skip
    if how == "fedavg":
        return average, client_tasks, small.model.init(seed)
    pupils = [
        CoTunedModel(
            report=one.report((0,), personal=False),
            distill=one.distill((0,), lr, personal=False),
            bridge=bridge(two, one),
        )
        for one, two, lr in ((small, large, task.hear_lr), (large, small, task.large_lr))
    ]
    start = large.model.init(seed)
    algorithm = CoTune(average=average, small=pupils[0], large=pupils[1], start=start, transfer=how == "cotune")
    return algorithm, client_tasks, small.model.init(seed)


WAYS = {"fedmkt": 3, "unheard": 3, "cotune": 5, "reading": 3, "fedavg": 5, "alone": 5}
"""Seeds of each way."""


def cells() -> list[str]:
    """Every cell, in the order they must run."""
    return ["pretrain", *(f"{way}-s{seed}" for way, seeds in WAYS.items() for seed in range(seeds))]


def run_cell(task: Task, folder: Path, name: str, until: float) -> dict[str, Any] | None:
    """One cell's numbers; None where the time was up first."""
    if name == "pretrain":
        return pretrain(task, folder, until)
    way, _, number = name.partition("-s")
    seed = int(number)
    if way in ("fedmkt", "unheard"):
        algorithm, client_tasks, start = mutual(task, folder, seed, transfer=way == "fedmkt")
    else:
        algorithm, client_tasks, start = cotune(task, folder, seed, how=way)
    small, large = sides(task, folder, whole=way in ("fedmkt", "unheard"))
    mine = folder / key_of(task, name)
    log_file, place = mine / f"{name}.json", mine / name
    mine.mkdir(exist_ok=True)
    log: list[dict[str, Any]] = json.loads(log_file.read_text()) if log_file.exists() else []
    engine = LocalEngine(client_tasks, ClientStore(place / "own"), block_size=1)

    def told(report: Report) -> None:
        one = {"round": report.round, "seconds": report.seconds, "up": report.bytes_up, "down": report.bytes_down}
        log[report.round - 1 :] = [{**one, **report.metrics}]
        log_file.write_text(json.dumps(log))
        print(f"  round {report.round}  {report.seconds:6.0f} s  " + brief(report.metrics), flush=True)

    state = None
    for rounds in range(len(log) or 1, task.rounds + 1):
        state = run(algorithm, engine, lambda: Shared.of_flat(start), rounds=rounds, seed=seed, observers=(told,),
                    checkpoint=place / "state.safetensors")  # fmt: skip
        if time.time() > until and rounds < task.rounds:
            return None
    assert state is not None
    version = {"fedmkt": 2, "unheard": 2, "alone": 2}.get(way, 1) * task.rounds
    shared = small.model.init(seed) if way in ("fedmkt", "unheard", "alone") else state.shared
    job = Job(work="valid", shared=shared, version=version, clients=tuple(range(task.people)), seed=0)
    (_, sums), (_, common) = score(engine, job), score(engine, replace(job, work="common"))
    result: dict[str, Any] = {
        "before": judge(small.model, small.model.init(seed), small.held),
        "after": perplexity(float(sums["loss_sum"].sum()), float(sums["count"].sum())),
        "common": perplexity(float(common["loss_sum"].sum()), float(common["count"].sum())),
        "each": [perplexity(a, b) for a, b in zip(sums["loss_sum"].tolist(), sums["count"].tolist(), strict=True)],
        "rounds": log,
    }
    if way not in ("fedavg", "alone"):
        after = state.shared.trainable if way in ("fedmkt", "unheard") else large_of(state)
        result["carried"] = {"up": bridge(small, large).share, "down": bridge(large, small).share}
        result["large_before"] = judge(large.model, large.model.init(seed), [large.apart])
        result["large_after"] = judge(large.model, after, [large.apart])
    return result


def brief(metrics: Mapping[str, float]) -> str:
    """Numbers in one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def run_cells(task: Task, folder: Path, names: Sequence[str], minutes: float, *, write: bool) -> None:
    """Run what has no result yet."""
    for name in names:
        file = RESULTS / f"mutual-{name}.json"
        if write and file.exists() and json.loads(file.read_text())["hash"] == key_of(task, name):
            print(f"{name}: done", flush=True)
            continue
        print(name, flush=True)
        log = run_cell(task, folder, name, time.time() + 60 * minutes)
        if log is None:
            print(f"{name}: the time is up; call again to go on")
            return
        about = {"cell": name, "date": date.today().isoformat(), "config": asdict(task), "hash": key_of(task, name)}
        if write:
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps({**about, **log}, indent=1) + "\n")
        else:
            print("  " + brief({n: x for n, x in log.items() if isinstance(x, int | float)}), flush=True)


def main() -> None:
    """Run cells, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", action="store_true", help="run every cell that has no result")
    parser.add_argument("--only", metavar="NAME", help="run this cell, or this way with all its seeds")
    parser.add_argument("--list", action="store_true", help="cells, and which are done")
    parser.add_argument("--cut", action="store_true", help="one seed of every way in seconds; nothing is kept")
    parser.add_argument("--minutes", type=float, default=18.0, help="a cell stops at its next checkpoint after these")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_buffers()
    folder = cache_dir() / "benchmarks" / f"mutual-{key_of(Task(), 'pretrain')}"
    if asked.list:
        for name in cells():
            print(f"{name:12} {'done' if (RESULTS / f'mutual-{name}.json').exists() else '-'}")
    elif asked.cut:
        with tempfile.TemporaryDirectory() as place:
            names = [name for name in cells() if name == "pretrain" or name.endswith("-s0")]
            run_cells(CUT, Path(place), names, asked.minutes, write=False)
    elif asked.only or asked.cells:
        names = [name for name in cells() if asked.cells or asked.only in (name, name.rpartition("-s")[0])]
        if not names:
            parser.error(f"no cell {asked.only!r}; --list names them")
        run_cells(Task(), folder, names, asked.minutes, write=True)
    else:
        tables.mutual()


if __name__ == "__main__":
    main()
