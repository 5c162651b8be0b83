"""What do the record of a run and the gate of norms cost, as a share of a round?

Runs a gallery recipe with both, and takes the time inside of them beside that of the whole rounds: digests of messages,
lines of the record, norms. Rounds of ``digits`` are short and of many small messages; those of ``chat-demo`` (four
people, three rounds) are long. The first round of each is not counted.

    python benchmarks/record.py --run

keeps what it found in ``results/record.json``; without ``--run`` it prints the table from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import lichen
from lichen.core.collecting import collect
from lichen.core.files.record import Record
from lichen.transforms.bounds.gate import NormGate

RESULT = Path(__file__).parent / "results" / "record.json"
CASES: dict[str, tuple[str, ...]] = {
    "digits": ("optimizer.lr=[0.1]", "federation.rounds=60", "compare.baselines=[]"),
    "chat-demo": ("data.max_clients=4", "federation.clients_per_round=4", "federation.rounds=3", "compare.baselines=[]",
                  "compare.forms=[]"),
}  # fmt: skip


def measure(case: str) -> dict[str, Any]:
    """Seconds of the rounds, and those within record and gate."""
    spent = dict.fromkeys(("digests", "lines", "norms"), 0.0)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def do(*words: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*words, **more)
            finally:
                spent[name] += time.perf_counter() - start

        return do

    kept = collect.digest_C, Record.append, NormGate.on_arrival
    collect.digest_C = timed("digests", kept[0])
    Record.append = timed("lines", kept[1])  # type: ignore[method-assign]
    NormGate.on_arrival = timed("norms", kept[2])  # type: ignore[method-assign]
    marks: list[tuple[float, dict[str, float]]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            keys = (*CASES[case], "wire.gate=100")
            lichen.run(
                lichen.read_recipe(case, keys),
                out=Path(folder) / "run",
                observers=[lambda _: marks.append((time.perf_counter(), dict(spent)))],
            )
    finally:
        collect.digest_C, Record.append, NormGate.on_arrival = kept  # type: ignore[method-assign]
    (begin, before), (end, after) = marks[0], marks[-1]
    return {
        "rounds": len(marks) - 1,
        "seconds": (end - begin) / (len(marks) - 1),
        **{name: (after[name] - before[name]) / (len(marks) - 1) for name in spent},
    }


def table(result: dict[str, Any]) -> str:
    """The shares of each case."""
    lines = ["| rounds of | ms a round | digests | lines | norms | share |", "|---|---:|---:|---:|---:|---:|"]
    for case, found in result["cases"].items():
        parts = [found[name] for name in ("digests", "lines", "norms")]
        times = " | ".join(f"{1000 * part:.2f}" for part in parts)
        share = sum(parts) / found["seconds"]
        lines.append(f"| {case} | {1000 * found['seconds']:.1f} | {times} | {100 * share:.2f} % |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was kept."""
    reads = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reads.add_argument("--run", action="store_true", help="measure")
    if reads.parse_args().run:
        found = {"date": date.today().isoformat(), "cases": {case: measure(case) for case in CASES}}
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
