"""How near do approximations come to a model that never met a client?

A run of each recipe, and one in which the client with the most training rows never answered (``federation.absent``).
Then the client is unlearned from the first by each approximation at its defaults, and at one other number. All models
are measured on the client's training rows, on rows of its own that none was trained on, and on the other clients' test
rows.

``digits`` is the whole recipe, but for more validation rows, since its test rows are a set that all share;
``reviews-lora`` is cut to eight articles, twelve rounds and one learning rate. A seed deals rows, and begins models and
batches.

Run it: ``python benchmarks/forget_near.py --run`` (model and reviews are downloaded once); ``python
benchmarks/forget_near.py`` prints the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "forget_near.json"
WAYS: dict[str, tuple[str, dict[str, float]]] = {
    "eraser": ("eraser", {}),
    "eraser, every round": ("eraser", {"every": 1}),
    "negate": ("negate", {}),
    "npo": ("npo", {}),
    "npo, gamma 0.1": ("npo", {"gamma": 0.1}),
}
"""The defaults of each way, and one other number."""

SEEDS = {"digits": (0, 1, 2), "reviews-lora": (0, 1, 2)}
MORE = {
    "digits": ["data.valid=0.3", "optimizer.lr=[0.1]"],
    "reviews-lora": [
        "data.max_clients=8",
        "data.max_rows=120",
        "data.valid=0.2",
        "optimizer={name: adamw, lr: [2e-3], schedule: constant}",
        "federation={rounds: 12, clients_per_round: 4, local_steps: 4, batch_size: 8, valid_every: 4}",
    ],
}


def measured(recipe: str, seed: int, home: Path) -> dict[str, Any]:
    """One seed of a recipe: what each model does, by its name, and the seconds that it took."""
    import lichen
    from lichen.recipes.schema.read import read_recipe
    from lichen.recipes.withdrawal.near import unlearn
    from lichen.recipes.withdrawal.options import NearOptions
    from lichen.recipes.withdrawal.proof import prove
    from lichen.recipes.withdrawal.request import read_request

    def run(out: str, *more: str) -> tuple[Any, float]:
        given = [*MORE[recipe], "compare.baselines=[]", "federation.history=true", f"seed={seed}", *more]
        begun = time.perf_counter()
        done = lichen.run(read_recipe(recipe, given), out=home / out)
        return done, time.perf_counter() - begun

    old, seconds = run("old")
    rows = old.clients()
    number = max(range(len(rows)), key=lambda place: int(rows[place]["train"]))
    name = rows[number]["client"]
    retrained, again = run("retrained", f"federation.absent=[{json.dumps(name)}]")
    took = {"old": seconds, "retrained": again}
    models: dict[str, Any] = {}
    for way, (how, options) in WAYS.items():
        begun, out = time.perf_counter(), home / way
        unlearn(read_request(old.folder, name, how, out), NearOptions(**options))  # type: ignore[arg-type]
        took[way] = time.perf_counter() - begun
        found = prove(old.folder, out, number, against=retrained.folder).as_dict()
        models |= {"old": found["old"], "retrained": found["replayed"]}
        models[way] = {**found["new"], "distance": found["distance"]}
    about = {key: found[key] for key in ("metric", "rows", "held_out_rows")}
    return {**about, "models": models, "seconds": {key: round(x, 2) for key, x in took.items()}}


def run(recipes: Sequence[str], seeds: Sequence[int] | None = None) -> None:
    """Everything that the tables say, written after each seed."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for recipe in recipes:
        for seed in SEEDS[recipe] if seeds is None else seeds:
            with tempfile.TemporaryDirectory(prefix="lichen-forget-") as home:
                found.setdefault(recipe, {})[str(seed)] = measured(recipe, seed, Path(home))
            RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{recipe}: seed {seed} is done", flush=True)


def show(found: dict[str, Any]) -> None:
    """The tables, means over seeds."""
    for recipe, by_seed in found.items():
        seeds = list(by_seed.values())
        count = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
        metric = seeds[0]["metric"].replace("_", " ")
        print(
            f"| {recipe}, {count} | loss, trained on | loss, held out | gap | membership AUC | 95 % | distance "
            f"| others, {metric} | seconds |"
        )
        print("|---|---:|---:|---:|---:|---|---:|---:|---:|")
        for name in ("old", "retrained", *WAYS):
            models = [one["models"][name] for one in seeds]

            def mean(key: str, models: Sequence[dict[str, Any]] = models) -> float:
                return statistics.fmean(one[key] for one in models)

            far = {"old": "1", "retrained": "0"}.get(name) or f"{mean('distance'):.2f}"
            seconds = statistics.fmean(one["seconds"][name] for one in seeds)
            print(
                f"| {name} | {mean('train'):.3f} | {mean('held_out'):.3f} | {mean('gap'):+.3f} | {mean('auc'):.3f} "
                f"| {mean('auc_low'):.2f} to {mean('auc_high'):.2f} | {far} | {mean('others'):.3f} | {seconds:.0f} |"
            )
        print()


def main() -> None:
    """Run it, or print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--only", choices=SEEDS, help="one recipe")
    parser.add_argument("--seed", type=int, help="one seed")
    given = parser.parse_args()
    if given.run:
        run([given.only] if given.only else list(SEEDS), None if given.seed is None else (given.seed,))
    show(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
