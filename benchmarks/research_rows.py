"""FedGKT and PATE, which no recipe reaches, beside their neighbours on real rows, over three seeds.

FedGKT: ten clients with digits, evenly or unevenly spread (Dirichlet 0.5), have a network of twelve hidden numbers, the
server one of two layers more. Beside it the same small network alone, and averaged (FedAvg), with as many local steps;
and the whole network averaged, which the clients of FedGKT could not train. Accuracy on digits that nobody has.

PATE: 250 clients with 60 reviews each are teachers, one vote a text; a student learns from the winners for 200 public
reviews. Beside noise for epsilon 8 and 1 (of everything that one client holds, delta 1 / (N ln N)) the same without
noise, the student on the true labels of the same 200, and a client's own model. Texts are 100 numbers each, of words
that 4,000 public reviews use together. Macro F1 over five departments, on 3,000 reviews that nobody has.

A cell is one seed of one of the two; it is kept under ``results/research/`` and skipped when it is there.

    python benchmarks/research_rows.py          # less than a minute a cell
    python benchmarks/research_rows.py --print  # only what is there
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from lichen.algorithms.scores import score
from lichen.clients.distillation.distill import pre_distil
from lichen.clients.distillation.private_models import LocalInit
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.evaluation.metrics import macro_f1
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import CohortModel
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, TrainSource
from lichen.data.sources.records import load_records
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP
from lichen.research.gkt.gkt import GKT, gkt_client_tasks
from lichen.research.gkt.stitched import Stem, Stitched
from lichen.research.pate.label_vote import LabelVote
from lichen.research.pate.pate import NoisyMax
from lichen.server.mean import Mean
from lichen.server.sampling import Everyone
from lichen.transforms.privacy import delta_for, sigma_for

RESULTS = Path(__file__).resolve().parent / "results" / "research"
SEEDS = (0, 1, 2)
CLIENTS, ROUNDS, STEPS, BATCH, LR = 10, 15, 10, 20, 0.01
TEACHERS, ROWS, QUERIES, PUBLIC, TESTED, WIDTH = 250, 60, 200, 4000, 3000, 100
CLASSES = ("Bottoms", "Dresses", "Intimate", "Jackets", "Tops")

STEM = Stem(64, widths=(12,), classes=10)
TOP = ImageMLP(12, hidden=(64, 64), classes=10, name="top")


def digits(seed: int, alpha: float) -> tuple[list[ArrayShard], ArrayShard]:
    """``(every client's rows, test rows)``."""
    records = load_records("digits")
    order = np.random.default_rng(seed).permutation(len(records))
    x = np.stack([np.asarray(records[i].features).reshape(64) for i in order]).astype(np.float32)
    y = np.array([int(str(records[i].label)) for i in order])
    test, rest = slice(0, 600), slice(600, None)
    rng = np.random.default_rng(seed + 100)
    share = rng.dirichlet(np.full(CLIENTS, alpha), size=10)
    owner = np.array([rng.choice(CLIENTS, p=share[label]) for label in y[rest]])
    own = [ArrayShard(x[rest][owner == c], labels=y[rest][owner == c]) for c in range(CLIENTS)]
    return own, ArrayShard(x[test], labels=y[test])


def averaged(model: CohortModel, start: Tree, own: TrainSource, folder: Path) -> Tree:
    """The shared tensors after the rounds of FedAvg."""
    shared, mean = Shared(start), Mean()
    work = Train(model, optimizer=ClientOptimizer("adamw", lr=LR))
    engine = LocalEngine({"train": ClientTask(work=work, source=own)}, ClientStore(folder))
    for version in range(ROUNDS):
        total = mean.zero()
        job = Job(work="train", shared=shared, version=version, clients=tuple(range(CLIENTS)), seed=version)
        for message in drain(engine, job):
            total = mean.add(total, message)
        shared = Shared(trees.add(shared.trainable, mean.close(total, shared)[0].trainable))
    return dict(shared.trainable)


def accuracy_N(engine: LocalEngine, work: str, shared: Shared) -> torch.Tensor:
    """Of every client's model, on the test rows."""
    job = Job(work=work, shared=shared, version=2 * ROUNDS, clients=tuple(range(CLIENTS)), seed=0)
    _, metrics = score(engine, job)
    return metrics["confusion"].diagonal(dim1=1, dim2=2).sum(1) / metrics["count"]


def shared_accuracy(model: CohortModel, shared: Tree, test: ArrayShard) -> float:
    """Of one model."""
    batch = {"active_C": torch.ones(1, dtype=torch.bool), "x_CBF": torch.from_numpy(test.x)[None]}
    with torch.no_grad():
        found = model.logits(trees.broadcast(shared, 1), {}, batch)[0].argmax(-1).numpy()
    return float((found == test.labels).mean())


def gkt(seed: int, folder: Path) -> dict[str, float]:
    """Accuracies by method, with digits evenly and unevenly spread."""
    found = {word: transfer(seed, alpha, folder / word) for word, alpha in (("even", 1e6), ("skew", 0.5))}
    return {f"{word}: {name}": value for word, values in found.items() for name, value in values.items()}


def transfer(seed: int, alpha: float, folder: Path) -> dict[str, float]:
    """The same with one spread."""
    own, test = digits(seed, alpha)
    both, start = Stitched(STEM, TOP), STEM.init(seed)
    source = TrainSource(own, batch_size=BATCH, steps=STEPS)
    tests = EvalSource(dict.fromkeys(range(CLIENTS), test), batch_size=600)

    def engine(name: str) -> LocalEngine:
        training = Train(STEM, optimizer=ClientOptimizer("adamw", lr=LR), personal=True)
        tasks = gkt_client_tasks(training, both, start=Shared(start), own=source, valid=tests)
        judge = LocalInit(Evaluate(STEM, personal=True), start=Shared(start))
        return LocalEngine({**tasks, "small": ClientTask(work=judge, source=tests)}, ClientStore(folder / name))

    there = engine("gkt")
    algorithm = GKT(
        top=Train(TOP, optimizer=ClientOptimizer("adamw", lr=0.005)),
        batch=32,
        steps=60,
        sampler=Everyone(),
        weight_N=torch.tensor([float(shard.size) for shard in own], dtype=torch.float64),
        rounds=ROUNDS,
        valid=None,
    )
    state = run(algorithm, there, lambda: Shared(TOP.init(seed)), rounds=ROUNDS, seed=seed)
    top = Shared({name: x for name, x in state.shared.trainable.items() if name.startswith("top/")})
    alone = engine("alone")
    for r in range(ROUNDS):
        job = Job(work="train", shared=Shared(), version=2 * r, clients=tuple(range(CLIENTS)), seed=r)
        for _ in drain(alone, job):
            pass
    small = averaged(STEM, start, source, folder / "small")
    large = averaged(both, trees.join("top/", TOP.init(seed), start), source, folder / "large")
    return {
        "small, alone": float(accuracy_N(alone, "small", Shared()).mean()),
        "small, FedAvg": shared_accuracy(STEM, small, test),
        "FedGKT, a client's small one": float(accuracy_N(there, "small", Shared()).mean()),
        "FedGKT, small and the server's": float(accuracy_N(there, "valid", top).mean()),
        "whole, FedAvg": shared_accuracy(both, large, test),
    }


def reviews(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``(x, y)`` in an order of the seed: public rows, test rows, and those of the clients."""
    records = [r for r in load_records("clothing-reviews", columns={"label": "Department Name"}) if r.label in CLASSES]
    order = np.random.default_rng(seed).permutation(len(records))
    texts = [records[i].text for i in order]
    words = TfidfVectorizer(sublinear_tf=True, min_df=5, stop_words="english").fit(texts[:PUBLIC])
    axes = TruncatedSVD(WIDTH, random_state=seed)
    public = axes.fit_transform(words.transform(texts[:PUBLIC]))
    x = axes.transform(words.transform(texts)) / public.std(0)
    return x.astype(np.float32), np.array([CLASSES.index(str(records[i].label)) for i in order])


def pate(seed: int, folder: Path) -> dict[str, float]:
    """Macro F1 by method, and the noise that was drawn."""
    x, y = reviews(seed)
    model, everyone = ImageMLP(WIDTH, hidden=(), classes=len(CLASSES)), tuple(range(TEACHERS))
    test_x, test_y = x[PUBLIC : PUBLIC + TESTED], y[PUBLIC : PUBLIC + TESTED]
    begin = PUBLIC + TESTED
    own = [ArrayShard(x[a : a + ROWS], labels=y[a : a + ROWS]) for a in range(begin, begin + TEACHERS * ROWS, ROWS)]
    asked = ArrayShard(x[:QUERIES], labels=np.full(QUERIES, -100))
    start = Shared(model.init(seed))
    training = Train(model, optimizer=ClientOptimizer("adamw", lr=0.03), personal=True)
    vote, same = LocalInit(LabelVote(model, queries=QUERIES), start=start), dict.fromkeys(everyone, asked)
    judged = dict.fromkeys(everyone, ArrayShard(test_x, labels=test_y))
    engine = LocalEngine(
        {
            "train": ClientTask(
                work=LocalInit(training, start=start), source=TrainSource(own, batch_size=20, steps=60)
            ),
            "vote": ClientTask(work=vote, source=EvalSource(same, batch_size=QUERIES)),
            "judge": ClientTask(
                work=LocalInit(Evaluate(model, personal=True), start=start),
                source=EvalSource(judged, batch_size=TESTED),
            ),
        },
        ClientStore(folder),
        block_size=25,
    )
    for _ in drain(engine, Job(work="train", shared=Shared(), version=0, clients=everyone, seed=seed)):
        pass
    votes = list(drain(engine, Job(work="vote", shared=Shared(), version=1, clients=everyone, seed=seed)))
    few = tuple(range(0, TEACHERS, 10))
    _, metrics = score(engine, Job(work="judge", shared=Shared(), version=1, clients=few, seed=seed))

    def student(index_Q: np.ndarray) -> float:
        answers = {
            "answers.index": torch.from_numpy(index_Q.astype(np.int16))[:, None],
            "answers.prob": torch.ones(QUERIES, 1, dtype=torch.float16),
        }
        taught, _ = pre_distil(model, start, asked, answers, steps=200, lr=0.03, seed=seed)
        found = model.apply(dict(taught.trainable), torch.from_numpy(test_x)).argmax(-1)
        pairs = torch.from_numpy(test_y) * len(CLASSES) + found
        return macro_f1(torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1))

    out = {"a client's own model": float(torch.stack([torch.tensor(macro_f1(c)) for c in metrics["confusion"]]).mean())}
    for name, target in (("votes without noise", math.inf), ("PATE, epsilon 8", 8.0), ("PATE, epsilon 1", 1.0)):
        root = math.sqrt(2 * QUERIES)
        sigma = 0.0 if target == math.inf else sigma_for(target, delta_for(TEACHERS), 1, sensitivity=root)
        rule = NoisyMax(len(CLASSES), sigma=sigma, seed=seed)
        total = rule.zero()
        for message in votes:
            total = rule.add(total, message)
        index_Q = rule.close(total, Shared())[0].frozen["answers.index"][:, 0].numpy()
        out |= {
            f"student of {name}": student(index_Q),
            f"right answers, {name}": float((index_Q == y[:QUERIES]).mean()),
        }
        out |= {f"noise in votes, {name}": sigma} if sigma else {}
    return {**out, "student of the true labels": student(y[:QUERIES])}


PARTS: Mapping[str, Callable[[int, Path], dict[str, float]]] = {"gkt": gkt, "pate": pate}


def cell(part: str, seed: int) -> Path:
    """Where it is kept."""
    return RESULTS / f"{part}-s{seed}.json"


def show() -> None:
    """The tables of all that is there."""
    for part in PARTS:
        found = [json.loads(cell(part, seed).read_text()) for seed in SEEDS if cell(part, seed).is_file()]
        print(f"\n| {part} | mean | deviation | seeds |\n|---|---:|---:|---:|")
        for name in found[0]["values"] if found else ():
            values = [one["values"][name] for one in found]
            spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
            print(f"| {name} | {statistics.mean(values):.3f} | {spread} | {len(values)} |")


def main() -> None:
    """Run what is not there, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", help="run nothing")
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part, measure in PARTS.items():
        for seed in () if asked.print else SEEDS:
            if cell(part, seed).is_file():
                continue
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                values = measure(seed, Path(folder))
            seconds = time.perf_counter() - start
            whole = {"part": part, "seed": seed, "date": str(date.today()), "seconds": seconds, "values": values}
            cell(part, seed).write_text(json.dumps(whole, indent=1) + "\n")
            print(f"{part} seed {seed}: {seconds:.0f} s", flush=True)
    show()


if __name__ == "__main__":
    main()
