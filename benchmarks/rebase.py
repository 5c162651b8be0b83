"""How many rounds does a chat adapter take on a newer base, and how many does starting anew take?

A small Llama is trained from nothing on speeches by four workers. After a few rounds it is the old base; after some
more it is the new one, of the same shapes and words. Eight people who chat train an adapter on the old base. `lichen
rebase` then puts that run on the new one: the adapter as it is, or anew. After each round all are scored on the eight
people's validation rows. Learning rates are constant, so that no way's pace depends on how many rounds are to come.

A seed draws the eight people, and begins adapters and batches. Both bases are made once.

Run it: ``python benchmarks/rebase.py --run`` (rows and speeches are downloaded once); ``python benchmarks/rebase.py``
prints the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "rebase.json"
EARLY, LATE, ROUNDS = 2, 4, 6
PEOPLE, LEAST, ROWS = 8, 80, 80
WAYS = ("as-is", "restart")
SEEDS = (0,)


def bases(folder: Path) -> tuple[Path, Path]:
    """The old base and the new one, which is the old one after more rounds."""
    import lichen

    rounds = {"old": EARLY, "new": LATE}
    page = {
        "name": "bases",
        "task": "chat",
        "data": {"name": "sotu", "form": "stream", "max_length": 64, "max_rows": 400, "valid": 0.05, "test": 0.05}
        | {"partition": {"by": "iid", "clients": 4}},
        "optimizer": {"lr": 2e-3},
        "federation": {"local_steps": 20, "batch_size": 4, "weighting": "uniform", "valid_every": 8},
        "compare": {"baselines": []},
        "stages": [{"name": name, "federation.rounds": count} for name, count in rounds.items()],
    }
    scratch = {"text": "sotu", "vocabulary": 2048, "width": 64, "layers": 2, "heads": 4}
    page["model"] = {"adapter": {"kind": "full"}}
    page["stages"][0]["model.scratch"] = scratch
    done = lichen.run(page, out=folder / "bases")
    old, new = (lichen.export(stage.folder, merge=True) for stage in done.stages)
    return old, new


def people(folder: Path, seed: int) -> Path:
    """What eight people wrote."""
    import numpy as np

    from lichen.data.sources.records import load_records

    mine = defaultdict(list)
    for record in load_records("chitchat"):
        if record.prompt:
            mine[record.client].append({"client": record.client, "prompt": record.prompt, "completion": record.text})
    many = sorted(name for name, rows in mine.items() if len(rows) >= LEAST)
    chosen = [many[i] for i in np.random.default_rng(seed).permutation(len(many))[:PEOPLE]]
    file = folder / f"rows-{seed}.jsonl"
    rows = [row for name in chosen for row in mine[name][:ROWS]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def chat(old: Path, rows: Path, seed: int) -> dict[str, Any]:
    """The recipe of the run on the old base."""
    return {
        "name": "chat",
        "task": "chat",
        "seed": seed,
        "model": {"name": str(old), "adapter": {"target_modules": "all-linear", "rank": 8, "alpha": 16}},
        "data": {"name": str(rows), "form": "transcript", "max_length": 64, "valid": 0.25, "test": 0.1},
        "optimizer": {"lr": 2e-3, "schedule": "constant"},
        "federation": {"rounds": ROUNDS, "local_steps": 4, "batch_size": 4, "valid_every": 1},
        "compare": {"baselines": [], "retention_text": "sotu", "retention_rows": 16},
    }


def at_start(folder: Path) -> float:
    """Validation loss a token of a run before its first round, as its trace has it after each."""
    from lichen.recipes.assemble.open import open_recipe
    from lichen.recipes.schema.read import recipe_of
    from lichen.recipes.tasks.adapt import score_on

    loaded = open_recipe(recipe_of(folder))
    experiment = loaded.experiment
    with tempfile.TemporaryDirectory() as aside:
        sums = score_on(experiment, experiment.clients.valid, experiment.start, Path(aside))
    return float(sums["loss_sum"].double().sum() / sums["count"].double().sum())


def losses(folder: Path) -> list[float]:
    """Validation loss a token at the start of a run and after each round."""
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    return [at_start(folder), *(line["metrics"]["valid"] for line in lines)]


def moved(source: Path, new: Path, how: Any, out: Path) -> dict[str, Any]:
    """One way onto the new base: losses by round, and what the gate says before the rounds and after them."""
    from lichen.recipes.rebase.gate import judge
    from lichen.recipes.rebase.run import rebase
    from lichen.recipes.stages.folder import last_stage

    done = rebase(source, str(new), how=how, out=out)
    first = judge(done.before, done.start, tolerance=0.02, most_harmed=0.25)
    return {
        "valid": losses(last_stage(out)),
        "bits": {name: getattr(done, name).mean for name in ("before", "start", "after")},
        "general": {name: getattr(done, name).general for name in ("before", "start", "after")},
        "start": {"accepted": first.accepted, "harmed": first.harmed, "faults": first.faults},
        "after": {"accepted": done.verdict.accepted, "harmed": done.verdict.harmed, "faults": done.verdict.faults},
    }


def run(seeds: Sequence[int] = SEEDS) -> None:
    """Everything that the tables say, written after each seed."""
    import torch

    import lichen

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lichen-rebase-") as name:
        home = Path(name)
        old, new = bases(home)
        for seed in seeds:
            rows = people(home, seed)
            source = lichen.run(chat(old, rows, seed), out=home / f"chat-{seed}").folder
            ways = {how: moved(source, new, how, home / f"{how}-{seed}") for how in WAYS}
            found[str(seed)] = {"old": losses(source), "ways": ways}
            RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"seed {seed} is done", flush=True)


def until(valid: Sequence[float], goal: float) -> float:
    """The first round with a loss of at most this; infinite where there is none."""
    return next((number for number, loss in enumerate(valid) if loss <= goal), math.inf)


def counted(rounds: Sequence[float]) -> str:
    """Rounds by seed: one number where they agree."""
    texts = [f"more than {ROUNDS}" if math.isinf(one) else f"{one:g}" for one in rounds]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def show(found: dict[str, Any]) -> None:
    """The tables."""
    seeds, marks = list(found.values()), (0, 1, 3, ROUNDS)
    heads = [f"after {mark}" if mark else "before the rounds" for mark in marks]
    print(f"| loss a token | {' | '.join(heads)} |")
    print("|---|" + "---:|" * len(marks))
    lines = {"old base": [one["old"] for one in seeds]}
    for how in seeds[0]["ways"]:
        lines[f"new base, {how}"] = [one["ways"][how]["valid"] for one in seeds]
    for name, curves in lines.items():
        cells = [f"{statistics.fmean(curve[mark] for curve in curves):.3f}" for mark in marks]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    print(
        "| rounds, by seed | until the old base's best | until the best of anew | gate before the rounds "
        "| gate after them | served worse after |"
    )
    print("|---|---:|---:|---|---|---:|")
    for how in seeds[0]["ways"]:
        ways = [one["ways"][how] for one in seeds]
        goals = [(min(one["old"]), min(one["ways"]["restart"]["valid"])) for one in seeds]
        rounds = [
            counted([until(way["valid"], goal[i]) for way, goal in zip(ways, goals, strict=True)]) for i in (0, 1)
        ]
        gates = [f"{sum(way[when]['accepted'] for way in ways)} of {len(ways)}" for when in ("start", "after")]
        harmed = f"{100 * statistics.fmean(way['after']['harmed'] for way in ways):.0f}%"
        print(f"| {how} | {' | '.join([*rounds, *gates])} | {harmed} |")
    print()
    print("| general text, bits a byte | old model | new, before the rounds | new, after them |")
    print("|---|---:|---:|---:|")
    for how in seeds[0]["ways"]:
        general = [one["ways"][how]["general"] for one in seeds]
        cells = [f"{statistics.fmean(one[when] for one in general):.3f}" for when in ("before", "start", "after")]
        print(f"| {how} | {' | '.join(cells)} |")


def main() -> None:
    """Run it, or print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="store_true")
    if parser.parse_args().run:
        run()
    show(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
