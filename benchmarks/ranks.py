"""What do several ranks of one machine gain over one, and do they end with the same bytes?

SmolLM2-135M, 16 people who chat, LoRA of rank 8: each case is a fresh ``lichen run`` of the federated
column, and what its trace says a round took, the first round and the validated last one left out.
Cases take turns; times are medians over all timed rounds of all turns. One rank with one thread is
what the speed-ups refer to; one rank with all threads is what ranks have to beat.

Run it: ``python benchmarks/ranks.py``; ``--ranks 1 2 4 8`` on a larger machine, ``--plot ranks.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lichen.core.store import load_tree
from lichen.engines.ranks import threads_for
from lichen.present.trace import read_trace

RECIPE = (
    "data.max_length=64",
    "data.max_clients=16",
    "data.test_rows=1",
    "federation.clients_per_round=16",
    "federation.local_steps=1",
    "federation.batch_size=4",
    "federation.valid_every=1000",
    "optimizer.lr=[1e-3]",
    "optimizer.schedule=constant",
    "compare.baselines=[]",
)


@dataclass(slots=True, kw_only=True)
class Case:
    """So many ranks with so many threads each, and what was seen of them.

    Attributes:
        ranks: Processes.
        threads: Of each.
        seconds: Of every timed round.
        tokens: Of each of those rounds.
        memory: Bytes, all ranks together.
        final: The run's last tensors.
    """

    ranks: int
    threads: int
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    memory: int = 0
    final: Path = Path()

    @property
    def name(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {self.threads} thread{'s' * (self.threads > 1)} each"

    @property
    def round_seconds(self) -> float:
        """Median of a round."""
        return statistics.median(self.seconds)

    def run(self, folder: Path, settings: Sequence[str]) -> None:
        """One turn."""
        engine = (
            ("engine.name=local",) if self.ranks == 1 else ("engine.name=distributed", f"engine.nodes={self.ranks}")
        )
        words = [word for setting in (*RECIPE, *engine, *settings) for word in ("-s", setting)]
        done = subprocess.run(
            [sys.executable, "-m", "lichen", "run", "chat-demo", *words, "--out", str(folder), "--quiet", "--json"],
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        reports = [event.report for event in read_trace(folder)][1:-1]
        self.seconds += [report.seconds for report in reports]
        self.tokens += [report.tokens for report in reports]
        self.memory = max(self.memory, int(json.loads(done.stdout)["peak_memory_bytes"]))
        self.final = folder / "state" / "final.safetensors"


def difference(a: Path, b: Path) -> str:
    """The largest difference of any number, or that there is none in any byte."""
    if a.read_bytes() == b.read_bytes():
        return "none: equal bytes"
    one, other = load_tree(a)[0], load_tree(b)[0]
    worst = max(float((one[name].double() - other[name].double()).abs().max() / one[name].abs().max()) for name in one)
    return f"{worst:.1e}"


def plot(cases: Sequence[Case], file: Path) -> None:
    """Speed-up over the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = cases[0].round_seconds
    curve = [case for case in cases if case.threads == 1]
    threaded = max((case for case in cases if case.ranks == 1), key=lambda case: case.threads)
    counts = [case.ranks for case in curve]
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    axes.plot(counts, counts, color="0.7", linestyle="--", label="ideal")
    axes.plot(counts, [base / case.round_seconds for case in curve], marker="o", label="ranks of one thread")
    axes.axhline(base / threaded.round_seconds, color="C1", linestyle=":", label=f"1 rank, {threaded.threads} threads")
    axes.set(xlabel="ranks", ylabel="speed-up of a round", xticks=counts, ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks, one thread each")
    parser.add_argument("--rounds", type=int, default=5, help="of a run; all but two are timed")
    parser.add_argument("--turns", type=int, default=2, help="runs of each case")
    parser.add_argument("--plot", type=Path, help="write the picture here")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="for the recipe")
    given = parser.parse_args()
    cores = threads_for(1)
    cases = [Case(ranks=1, threads=1)]
    if cores > 1:
        cases.append(Case(ranks=1, threads=cores))
    cases += [Case(ranks=count, threads=1) for count in sorted(given.ranks) if count > 1]
    with tempfile.TemporaryDirectory(prefix="lichen-ranks-bench-") as folder:
        for turn in range(given.turns):
            for i, case in enumerate(cases):
                case.run(Path(folder) / f"{i}-{turn}", [f"federation.rounds={given.rounds}", *given.set])
        print(f"{cores} cores; {len(cases[0].seconds)} timed rounds a case")
        print("| case | seconds a round | tokens/s | speed-up | peak memory, all ranks | largest difference |")
        print("|---|---:|---:|---:|---:|---|")
        for case in cases:
            rate = statistics.median(t / s for t, s in zip(case.tokens, case.seconds, strict=True))
            speed = cases[0].round_seconds / case.round_seconds
            differs = "—" if case is cases[0] else difference(cases[0].final, case.final)
            print(
                f"| {case.name} | {case.round_seconds:.2f} | {rate:,.0f} | {speed:.2f} | "
                f"{case.memory / 1e6:,.0f} MB | {differs} |"
            )
    if given.plot is not None:
        plot(cases, given.plot)


if __name__ == "__main__":
    main()
