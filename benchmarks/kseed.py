"""Does a whole encoder learn from seeds and scalars alone?

MiniLM rates reviews of clothing from 1 to 5; clients are articles of clothing. It starts from a head in
closed form: every client sends the statistics of a ridge classifier over the frozen features, once, and
the solution is scaled to the loss of the validation rows. (From a random head the slopes along a
direction of ten million signs are all head and hardly any model.) Then FedKSeed trains all tensors but
the embeddings, and each round sends a few kilobytes. Scored are the start and the end, on the same test rows.

One cell a seed, which splits the rows anew, draws other directions and invites other clients; a cell
whose file is there is not run again: ``python benchmarks/kseed.py [seed ...]``. Settings were chosen on
the validation rows of seed 0: ``python benchmarks/kseed.py try lr=2e-4 rounds=4``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tables

from lichen.algorithms.scores import score
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.evaluation.metrics import accuracy, macro_f1
from lichen.clients.statistics.scale import ScaleLosses, best_scale
from lichen.clients.statistics.sufficient import Statistics
from lichen.clients.training.kseed import FedKSeed, ReplayedWork
from lichen.clients.training.kseed_replay import KSeedReplay
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask, Source
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.models.full import FullClassifier
from lichen.models.loading.initial import head_features, head_of, head_start
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe
from lichen.server.kseed import KSeedOptimizer, SeedSums
from lichen.server.ridge import Ridge
from lichen.server.sampling import Uniform

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
SETTINGS: dict[str, float] = {
    "clients": 16,
    "per_round": 4,
    "rounds": 10,
    "steps": 20,
    "batch": 8,
    "directions": 4096,
    "lr": 1e-4,
    "eps": 1e-3,
    "lam": 10.0,
    "max_length": 48,
}
SCALES = (1, 2, 3, 4, 5, 6, 8)


def start_of(cohort: FullClassifier, experiment: Any, lam: float) -> Tree:
    """The loaded model with a ridge head, made by the clients together, as its classifier."""
    start, everyone = cohort.init(0), tuple(range(len(experiment.clients.train)))
    width = start[f"{head_of(cohort, Shared(start))}.weight"].shape[1]
    work = Statistics(head_features(cohort, Shared(start)), classes=int(cohort.classes or 0), width=width)
    rule = Ridge(lam)
    losses = ScaleLosses(cohort, SCALES)
    with TemporaryDirectory() as folder:
        tasks = {
            "ridge": ClientTask(work=work, source=experiment.evaluating(experiment.clients.train)),
            "scale": ClientTask(work=losses, source=experiment.evaluating(experiment.clients.valid)),
        }
        engine = LocalEngine(tasks, ClientStore(Path(folder)), block_size=1)
        job = Job(work="ridge", shared=Shared(), version=0, clients=everyone, seed=0)
        total = rule.zero()
        for message in drain(engine, job):
            total = rule.add(total, message)
        solved = rule.close(total, Shared())[0].trainable
        choosing = replace(job, work="scale", shared=head_start(cohort, Shared(start), solved))
        scale = best_scale(score(engine, choosing)[1]["losses"], SCALES)
    return head_start(cohort, Shared(start), solved, scale=scale).trainable


def judged(
    cohort: Any, shared: Shared, rows: Source, clients: tuple[int, ...], replay: KSeedReplay | None = None
) -> Any:
    """Loss, accuracy and macro F1 over all rows of these clients."""
    work: Any = Evaluate(cohort) if replay is None else ReplayedWork(Evaluate(cohort), replay)
    with TemporaryDirectory() as folder:
        engine = LocalEngine({"judge": ClientTask(work=work, source=rows)}, ClientStore(Path(folder)), block_size=1)
        _, told = score(engine, Job(work="judge", shared=shared, version=0, clients=clients, seed=0))
    confusion = told["confusion"].sum(0)
    return {
        "loss": float(told["loss_sum"].sum() / told["count"].sum()),
        "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion),
    }


def cell(seed: int, say: Any = lambda _: None, *, test: bool = True, **changed: float) -> dict[str, Any]:
    """One run."""
    s, began = {**SETTINGS, **changed}, time.process_time()
    overrides = (f"data.max_clients={int(s['clients'])}", f"seed={seed}", f"data.max_length={int(s['max_length'])}")
    loaded = open_recipe(read_recipe("reviews-lora", overrides))
    experiment, everyone = loaded.experiment, tuple(range(int(s["clients"])))
    cohort = FullClassifier(loaded.foundation, name="minilm-l6", exclude=("embeddings",))
    start = start_of(cohort, experiment, s["lam"])
    replay = KSeedReplay(start, lr=s["lr"], root=derive(seed, "directions"), count=int(s["directions"]))
    work = FedKSeed(cohort, replay, steps=int(s["steps"]), eps=s["eps"])
    source = experiment.training(experiment.clients.train, batch=int(s["batch"]), steps=int(s["steps"]))
    rule, server, sampler = SeedSums(replay.count), KSeedOptimizer(), Uniform(count=int(s["per_round"]))
    weight_N = experiment.server.roster.rows_N("train")
    valid, told = experiment.evaluating(experiment.clients.valid), []
    shared, begin = Shared(replay.shared()), judged(cohort, Shared(start), valid, everyone)
    say(f"{len(everyone)} clients, {sum(x.numel() for x in start.values()):,} numbers; start {begin}")
    with TemporaryDirectory() as folder:
        engine = LocalEngine({"train": ClientTask(work=work, source=source)}, ClientStore(Path(folder)), block_size=1)
        for version in range(int(s["rounds"])):
            invited = sampler.invite(weight_N, derive(seed, "invite", version))
            asked = Job(
                work="train",
                shared=shared,
                version=version,
                clients=invited,
                seed=derive(seed, version),
            )
            total, loss, count = rule.zero(), 0.0, 0.0
            for message in drain(engine, asked):
                total = rule.add(total, message)
                loss, count = loss + float(message.metrics["loss_sum"].sum()), count + float(message.weight_C.sum())
            shared, _ = server.update(rule.close(total, shared)[0], {}, shared)
            told.append({"train": loss / count, "valid": judged(cohort, shared, valid, everyone, replay)["loss"]})
            say(f"round {version + 1}: {told[-1]}, {time.process_time() - began:.0f} s")
    share = engine.bytes_up + engine.bytes_down
    out = {
        "seed": seed,
        "settings": s,
        "numbers": sum(x.numel() for x in start.values()),
        "bytes_a_client_and_round": share / (s["rounds"] * s["per_round"]),
        "rounds": told,
        "valid": {"start": begin, "end": judged(cohort, shared, valid, everyone, replay)},
        "cpu_seconds": time.process_time() - began,
    }
    if test:
        rows = experiment.evaluating(experiment.clients.test)
        out["test"] = {
            "rows": sum(shard.size for shard in experiment.clients.test),
            "start": judged(cohort, Shared.of_flat(start), rows, everyone),
            "end": judged(cohort, shared, rows, everyone, replay),
        }
    return out


def main(words: list[str]) -> None:
    """Run what is asked for, and what is not there yet."""
    if words[:1] == ["try"]:
        changed = {name: float(value) for name, value in (word.split("=") for word in words[1:])}
        print(json.dumps(cell(0, print, test=False, **changed)["valid"], indent=1))
        return
    RESULTS.mkdir(exist_ok=True)
    for seed in [int(word) for word in words] or SEEDS:
        file = RESULTS / f"kseed-{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(cell(seed, print), indent=1) + "\n")
    tables.kseed()


if __name__ == "__main__":
    main(sys.argv[1:])
