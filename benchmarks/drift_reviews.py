"""After how many periods do ten shops see that reviews of another department come in, by MMD of frozen MiniLM features?

Each shop has ten new reviews of dresses a period, and thirty of before. From one period on a share of the new ones at
five of the shops is of lingerie. A period is compared with what was there before the drift; it is seen in the first
period that alarms, of twenty.

Run it: ``python benchmarks/drift_reviews.py --run`` (the model and the reviews are downloaded once);
``python benchmarks/drift_reviews.py`` prints the table.

Legend: N rows, d features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).resolve().parent / "results" / "drift_reviews.json"
SHOPS, DRIFTED, THEN, NOW, PERIODS, REPEATS, QUIET = 10, 5, 30, 10, 20, 10, 200
POOL = {"Dresses": 700, "Intimate": 300}
SHARES = (0.1, 0.25, 0.5, 1.0)


def embedded() -> dict[str, Any]:
    """Features of reviews by department, ``(N, d)`` of length one."""
    from lichen.data.sources.records import load_records
    from lichen.recipes.assemble.features import encoder_of, featurizer
    from lichen.recipes.schema.read import read_recipe

    recipe = read_recipe("reviews-oneshot")
    records = load_records("clothing-reviews", columns={"label": "Department Name"})
    features, tokenizer = encoder_of(recipe, "minilm-l6", exact=False)
    out = {}
    for department, count in POOL.items():
        mine = [record for record in records if record.label == department]
        chosen = np.random.default_rng(0).permutation(len(mine))[:count]
        make = featurizer(recipe, features, tokenizer, [department])
        out[department] = make([mine[i] for i in chosen]).x
    return out


def alarm(then: Any, now: Any, seed: int, bandwidth: float | None, folder: Path) -> tuple[bool, float]:
    """Whether MMD alarms, and the bandwidth."""
    from lichen.clients.drift.distances import DistanceBins
    from lichen.clients.drift.embedding_sums import EmbeddingSums, numbers_of
    from lichen.clients.drift.periods import compare_periods
    from lichen.core.contracts.client import ClientTask
    from lichen.core.store import ClientStore
    from lichen.data.batches.shards import ArrayShard, EvalSource
    from lichen.data.batches.two_periods import TwoPeriods
    from lichen.engines.local import LocalEngine

    sources = [
        EvalSource([ArrayShard(x=x, labels=np.zeros(len(x), np.int64)) for x in rows], batch_size=THEN)
        for rows in (then, now)
    ]
    both = TwoPeriods(then=sources[0], now=sources[1])
    tasks = {
        "drift": ClientTask(work=EmbeddingSums(numbers_of, width=then[0].shape[1]), source=both),
        "distances": ClientTask(work=DistanceBins(numbers_of), source=both),
    }
    engine = LocalEngine(tasks, ClientStore(folder), block_size=SHOPS)
    report = compare_periods(engine, range(SHOPS), seed=seed, bandwidth=bandwidth)
    return report.alarm, report.bandwidth


def run() -> dict[str, Any]:
    """Everything that the table says."""
    import torch

    torch.set_num_threads(1)
    pools = embedded()
    dresses, others = pools.values()
    found: dict[str, Any] = {"seen": {}}
    bandwidth = None

    def reviews(draw: np.random.Generator, count: int, share: float) -> Any:
        other = int(draw.binomial(count, share))
        rows = dresses[draw.integers(0, len(dresses), count - other)], others[draw.integers(0, len(others), other)]
        return np.concatenate(rows)

    with tempfile.TemporaryDirectory() as folder:
        for share in SHARES:
            seen: list[int | None] = []
            for repeat in range(REPEATS):
                draw = np.random.default_rng([repeat, round(100 * share)])
                then = [reviews(draw, THEN, 0.0) for _ in range(SHOPS)]
                first = None
                for period in range(1, PERIODS + 1):
                    now = [reviews(draw, NOW, share if shop < DRIFTED else 0.0) for shop in range(SHOPS)]
                    alarmed, bandwidth = alarm(then, now, 1000 * repeat + period, bandwidth, Path(folder))
                    if alarmed:
                        first = period
                        break
                seen.append(first)
            found["seen"][str(share)] = seen
            print(share, seen, flush=True)
        draw, quiet = np.random.default_rng(77), 0
        for period in range(QUIET):
            then, now = ([reviews(draw, count, 0.0) for _ in range(SHOPS)] for count in (THEN, NOW))
            quiet += alarm(then, now, period, bandwidth, Path(folder))[0]
    return {**found, "quiet": quiet, "bandwidth": bandwidth}


def show(found: dict[str, Any]) -> None:
    """The table."""
    print(
        f"| of another department at {DRIFTED} of {SHOPS} shops | seen in {PERIODS} periods | after how many, median |"
    )
    print("|---|---:|---:|")
    for share, periods in found["seen"].items():
        seen = [period for period in periods if period is not None]
        middle = f"{statistics.median(seen):g}" if seen else ""
        print(f"| {float(share):.0%} of new reviews | {len(seen)} of {len(periods)} | {middle} |")
    print(f"| none | {found['quiet']} alarms in {QUIET} periods | |")


def main() -> None:
    """Run it, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true")
    if parser.parse_args().run:
        RESULT.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
    show(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
