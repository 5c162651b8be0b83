"""How often drift detectors alarm where nothing has changed, and how soon they see what was planted.

Ten clients. For MMD each has digits of its own, of one kind or two: sixty rows then and twenty now, drawn from the same
rows where nothing has changed, and turned by 90 degrees where something has. Page-Hinkley and ADWIN see losses of fifty
rows a period, drawn from a gamma distribution of each client's own scale, which rise by half a deviation or by a whole
one at five of the ten clients where something has changed.

Run it: ``python benchmarks/drift_alarms.py --run``; ``python benchmarks/drift_alarms.py`` prints the tables.

Legend: N rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).resolve().parent / "results" / "drift_alarms.json"
CLIENTS, PERIODS, REPEATS = 10, 1000, 100
THEN, NOW, LOSSES, QUIET = 60, 20, 50, 10
RECENT = 3
"""Periods in which clients may see one drift, each in its own."""
NOISES, QUIET_NOISES = (0.0, 0.5, 1.0), (0.0, 1.0)
TURNED = (1, 2, 5)
RISES = (0.5, 1.0)


def pools() -> list[Any]:
    """Each client's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.argsort(data.target, kind="stable")
    images = (data.images[order] / 16).astype(np.float32)
    return list(np.array_split(images, CLIENTS))


def alarms_of_mmd(noise: float, turned: int, periods: int, bandwidth: float | None) -> tuple[int, float]:
    """How many of so many periods alarm, and the bandwidth."""
    from lichen.clients.drift.distances import DistanceBins
    from lichen.clients.drift.embedding_sums import EmbeddingSums, numbers_of
    from lichen.clients.drift.periods import compare_periods
    from lichen.core.contracts.client import ClientTask
    from lichen.core.store import ClientStore
    from lichen.data.batches.shards import ArrayShard, EvalSource
    from lichen.data.batches.two_periods import TwoPeriods
    from lichen.engines.local import LocalEngine

    def source(rows: Sequence[Any]) -> EvalSource:
        return EvalSource([ArrayShard(x=x, labels=np.zeros(len(x), np.int64)) for x in rows], batch_size=THEN)

    own, alarms = pools(), 0
    with tempfile.TemporaryDirectory() as folder:
        for period in range(periods):
            draw = np.random.default_rng([period, turned])
            then = [x[draw.integers(0, len(x), THEN)] for x in own]
            now = [x[draw.integers(0, len(x), NOW)] for x in own]
            now = [np.ascontiguousarray(np.rot90(x, axes=(1, 2))) if c < turned else x for c, x in enumerate(now)]
            both = TwoPeriods(then=source(then), now=source(now))
            sums = EmbeddingSums(numbers_of, width=64, noise=noise)
            tasks = {
                "drift": ClientTask(work=sums, source=both),
                "distances": ClientTask(work=DistanceBins(numbers_of), source=both),
            }
            engine = LocalEngine(tasks, ClientStore(Path(folder)), block_size=CLIENTS)
            report = compare_periods(engine, range(CLIENTS), seed=period, bandwidth=bandwidth)
            alarms, bandwidth = alarms + report.alarm, report.bandwidth
    assert bandwidth is not None
    return alarms, bandwidth


def watched(name: Any, seed: int, periods: int, rise: float, drifted: int) -> tuple[int, list[int]]:
    """How often a client alarms in a period, and the periods in which the federation does.

    Losses of the first clients rise after ``QUIET`` periods. There is an alarm of the federation where a fifth of the
    clients were alarmed in the last three periods, or in those since its last alarm if they are fewer, as in a stream.
    """
    from lichen.clients.drift.loss_watch import enough
    from lichen.server.drift.detector import watch
    from lichen.server.drift.standardised import detector_of

    detector, clients_of = detector_of(name), [set[int]() for _ in range(periods)]
    for client in range(CLIENTS):
        draw = np.random.default_rng([seed, client])
        scale, shape, state = 0.1 * 2.0**client, 1.0 + client / 2, None
        for period in range(periods):
            losses = draw.gamma(shape, size=LOSSES)
            if rise and client < drifted and period >= QUIET:
                losses += rise * shape**0.5
            state, alarms = watch(detector, (scale * losses).tolist(), state)
            if alarms:
                clients_of[period].add(client)
    last, federation = -1, list[int]()
    for period in range(periods):
        if enough(len(set().union(*clients_of[max(last + 1, period - RECENT + 1) : period + 1])), CLIENTS, 0.2):
            last = period
            federation.append(period)
    return sum(map(len, clients_of)), federation


def run(found: dict[str, Any]) -> dict[str, Any]:
    """Everything that the tables say; what MMD has found is there already or not."""
    import torch

    torch.set_num_threads(1)
    if not found:
        found = {"mmd": {}, "bandwidth": None}
    bandwidth = found["bandwidth"]
    for noise in () if found["mmd"] else NOISES:
        one: dict[str, Any] = {}
        if noise in QUIET_NOISES:
            one["quiet"], bandwidth = alarms_of_mmd(noise, 0, PERIODS, bandwidth)
        one["turned"] = {str(n): alarms_of_mmd(noise, n, REPEATS, bandwidth)[0] for n in TURNED}
        found["mmd"][str(noise)] = one
        print("mmd", noise, one, flush=True)
    found |= {"bandwidth": bandwidth, "losses": {}}
    for name in ("page-hinkley", "adwin"):
        clients, quiet = watched(name, 0, PERIODS, 0.0, 0)
        one = {"clients": clients, "federation": len(quiet), "rise": {}}
        for rise in RISES:
            after = [watched(name, 1 + seed, QUIET + 20, rise, CLIENTS // 2) for seed in range(REPEATS // 5)]
            one["rise"][str(rise)] = [next((p - QUIET + 1 for p in seen if p >= QUIET), None) for _, seen in after]
        found["losses"][name] = one
        print(name, one, flush=True)
    return found


def show(found: dict[str, Any]) -> None:
    """The tables."""
    print(f"| detector | alarms in {PERIODS:,} quiet periods | of a client in a quiet period |")
    print("|---|---:|---:|")
    for noise, one in found["mmd"].items():
        if "quiet" in one:
            print(f"| MMD{_with(noise)} | {one['quiet']} | |")
    for name, one in found["losses"].items():
        print(f"| {name} | {one['federation']} | {one['clients'] / (PERIODS * CLIENTS):.2%} |")
    print()
    print("| MMD sees digits turned at | " + " | ".join(f"{n} of {CLIENTS} clients" for n in TURNED) + " |")
    print("|---|" + "---:|" * len(TURNED))
    for noise, one in found["mmd"].items():
        cells = [f"{one['turned'][str(n)] / REPEATS:.0%}" for n in TURNED]
        print(f"| {'without noise' if float(noise) == 0 else _with(noise).strip(', ')} | " + " | ".join(cells) + " |")
    print()
    print("| losses rise at half of the clients by | " + " | ".join(f"{rise} deviations" for rise in RISES) + " |")
    print("|---|" + "---:|" * len(RISES))
    for name, one in found["losses"].items():
        cells = []
        for rise in RISES:
            seen = [period for period in one["rise"][str(rise)] if period is not None]
            middle = f"{statistics.median(seen):g}" if seen else "never"
            cells.append(f"{middle} ({len(seen)} of {len(one['rise'][str(rise)])} seen)")
        print(f"| {name}: periods until seen, median | " + " | ".join(cells) + " |")


def _with(noise: str) -> str:
    return "" if float(noise) == 0 else f", noise of {float(noise):g} on each number from each client"


def main() -> None:
    """Run it, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--losses", action="store_true", help="run what watches losses alone")
    asked = parser.parse_args()
    if asked.run or asked.losses:
        before = json.loads(RESULT.read_text(encoding="utf-8")) if asked.losses else {}
        RESULT.write_text(json.dumps(run(before), indent=1) + "\n", encoding="utf-8")
    show(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
