"""How many rounds does a chat adapter take on a newer base, and how many does starting anew take?

Eight people who chat train an adapter on an old base. `lichen rebase` then puts that run on a new one: the adapter as
it is, anew, or taught by what the old model answers to questions of other people. After each round all are scored on
the eight people's validation rows. Rates are constant, so that no way's pace depends on how many rounds are to come.

Three pairs of bases:

- ``small``: a small Llama trained from nothing on speeches by four workers is the old base after a few rounds, and the
  new one after some more, of the same shapes and words;
- ``smollm2``: SmolLM2, which can chat, and the same model after more training on speeches;
- ``words``: SmolLM2, and a small Llama of other words, trained from nothing on speeches.

A seed draws the eight people, and begins adapters and batches. Bases are made once.

Run it: ``python benchmarks/rebase.py --run PAIR --seeds 0`` (rows and speeches are downloaded once);
``python benchmarks/rebase.py --show PAIR`` prints the tables.
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
PEOPLE, LEAST, ROWS, QUESTIONS = 8, 80, 80, 120
WAYS = {"small": ("as-is", "restart"), "smollm2": ("as-is", "distil", "restart"), "words": ("distil", "restart")}
CHAT = "smollm2-135m"


def bases(folder: Path, pair: str) -> tuple[str, str]:
    """The old base and the new one."""
    if pair == "smollm2":
        return CHAT, str(trained_on(folder))
    old, new = grown(folder)
    return (str(old), str(new)) if pair == "small" else (CHAT, str(new))


def trained_on(folder: Path) -> Path:
    """SmolLM2 after more training on speeches."""
    import lichen

    page = {
        "name": "longer",
        "task": "chat",
        "model": {"name": CHAT, "adapter": {"target_modules": "all-linear", "rank": 32, "alpha": 32}},
        "data": {"name": "sotu", "form": "stream", "max_length": 64, "max_rows": 400, "valid": 0.05, "test": 0.05}
        | {"partition": {"by": "iid", "clients": 4}},
        "optimizer": {"lr": 1e-3},
        "federation": {"rounds": 4, "local_steps": 10, "batch_size": 4, "valid_every": 4},
        "compare": {"baselines": []},
    }
    return lichen.export(lichen.run(page, out=folder / "longer").folder, merge=True)


def grown(folder: Path) -> tuple[Path, Path]:
    """A small Llama from nothing, and the same after more rounds."""
    import lichen

    rounds = {"old": EARLY, "new": LATE}
    page: dict[str, Any] = {
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


def people(folder: Path, seed: int) -> tuple[Path, Path]:
    """What eight people wrote, and questions of others."""
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
    others = folder / f"questions-{seed}.jsonl"
    asked = [row["prompt"] for name in sorted(mine) if name not in chosen for row in mine[name][:1]][:QUESTIONS]
    others.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked), encoding="utf-8")
    return file, others


def chat(old: str, rows: Path, seed: int) -> dict[str, Any]:
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


def moved(source: Path, new: str, how: Any, questions: Path, out: Path) -> dict[str, Any]:
    """One way onto the new base: losses by round, and what the gate says before the rounds and after them."""
    from lichen.recipes.rebase.gate import judge
    from lichen.recipes.rebase.run import rebase
    from lichen.recipes.stages.folder import last_stage

    done = rebase(source, new, how=how, prompts=questions if how == "distil" else None, out=out, say=print)
    first = judge(done.before, done.start, tolerance=0.02, most_harmed=0.25)
    return {
        "valid": losses(last_stage(out)),
        "bits": {name: getattr(done, name).mean for name in ("before", "start", "after")},
        "general": {name: getattr(done, name).general for name in ("before", "start", "after")},
        "start": {"accepted": first.accepted, "harmed": first.harmed, "faults": first.faults},
        "after": {"accepted": done.verdict.accepted, "harmed": done.verdict.harmed, "faults": done.verdict.faults},
    }


def run(pair: str, seeds: Sequence[int]) -> None:
    """What the tables of a pair of bases say, written after each seed."""
    import torch

    import lichen

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lichen-rebase-") as name:
        home = Path(name)
        old, new = bases(home, pair)
        for seed in seeds:
            rows, questions = people(home, seed)
            source = lichen.run(chat(old, rows, seed), out=home / f"chat-{seed}", say=print).folder
            ways = {how: moved(source, new, how, questions, home / f"{how}-{seed}") for how in WAYS[pair]}
            found = json.loads(RESULT.read_text(encoding="utf-8"))
            found.setdefault(pair, {})[str(seed)] = {"old": losses(source), "ways": ways}
            RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{pair}, seed {seed} is done", flush=True)


def until(valid: Sequence[float], goal: float) -> float:
    """The first round with a loss of at most this; infinite where there is none."""
    return next((number for number, loss in enumerate(valid) if loss <= goal), math.inf)


def counted(rounds: Sequence[float]) -> str:
    """Rounds by seed: one number where they agree."""
    texts = [f"more than {ROUNDS}" if math.isinf(one) else f"{one:g}" for one in rounds]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def show(found: dict[str, Any], *, one_vocabulary: bool) -> None:
    """The tables of a pair of bases.

    Args:
        found: What was written, by seed.
        one_vocabulary: Losses a token of both bases can be compared.
    """
    seeds, marks = list(found.values()), (0, 1, 3, ROUNDS)
    heads = [f"after {mark}" if mark else "before the rounds" for mark in marks]
    print(f"| loss a token, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} | {' | '.join(heads)} |")
    print("|---|" + "---:|" * len(marks))
    lines = {"old base": [one["old"] for one in seeds]} if one_vocabulary else {}
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
        to_old = counted([until(way["valid"], min(one["old"])) for way, one in zip(ways, seeds, strict=True)])
        best = [min(one["ways"]["restart"]["valid"]) for one in seeds]
        to_anew = counted([until(way["valid"], goal) for way, goal in zip(ways, best, strict=True)])
        rounds = [to_old if one_vocabulary else "", to_anew]
        gates = [f"{sum(way[when]['accepted'] for way in ways)} of {len(ways)}" for when in ("start", "after")]
        harmed = f"{100 * statistics.fmean(way['after']['harmed'] for way in ways):.0f}%"
        print(f"| {how} | {' | '.join([*rounds, *gates])} | {harmed} |")
    for title, key in (("the eight people's rows", "bits"), ("general text", "general")):
        print()
        print(f"| {title}, bits a byte | old model | new, before the rounds | new, after them |")
        print("|---|---:|---:|---:|")
        for how in seeds[0]["ways"]:
            values = [one["ways"][how][key] for one in seeds]
            cells = [f"{statistics.fmean(one[when] for one in values):.3f}" for when in ("before", "start", "after")]
            print(f"| {how} | {' | '.join(cells)} |")


def main() -> None:
    """Run it, or print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", choices=sorted(WAYS))
    parser.add_argument("--show", choices=sorted(WAYS))
    parser.add_argument("--seeds", default="0,1,2")
    asked = parser.parse_args()
    if asked.run:
        run(asked.run, [int(seed) for seed in asked.seeds.split(",")])
    pair = asked.show or asked.run or "small"
    show(json.loads(RESULT.read_text(encoding="utf-8"))[pair], one_vocabulary=pair != "words")


if __name__ == "__main__":
    main()
