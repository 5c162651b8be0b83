"""What does a round cost where very many clients hold very few rows?

So many clients with six short texts each of two classes; 50 of them train a round. ``python benchmarks/crowd.py``
plans the run, runs it, and prints both: bytes and seconds of a round, training and validation apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from lichen.core.seeds import numpy_generator

WORDS = {"good": "good great fine lovely warm soft", "bad": "bad poor harsh cold thin torn"}
COMMON = ("the", "a", "this", "dress", "shirt", "coat", "was", "is", "very", "for", "my", "size")


def write_rows(file: Path, clients: int, rows: int = 6) -> None:
    """Texts of eight words whose class shows in three of them."""
    rng = numpy_generator(0, "crowd")
    with open(file, "w", encoding="utf-8") as out:
        for client in range(clients):
            for row in range(rows):
                label = ("good", "bad")[row % 2]
                words = [*rng.choice(WORDS[label].split(), 3), *rng.choice(COMMON, 5)]
                text = " ".join(rng.permutation(words).tolist())
                out.write(json.dumps({"client": f"c{client:05d}", "text": text, "label": label}) + "\n")


def recipe(file: Path, *, rounds: int, per_round: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """A text CNN of a million weights for those clients."""
    return {
        "name": "crowd",
        "task": "classify",
        "model": {"student": {"kind": "text-cnn", "width": 32}},
        "data": {
            "name": str(file),
            "max_length": 32,
            "valid": 0.2,
            "test": 0.2,
            "on_too_few_rows": "drop",
            "on_single_class": "keep",
        },
        "federation": {"rounds": rounds, "clients_per_round": per_round},
        "compare": {"baselines": list(columns)},
    }


def main() -> None:
    """Plan, run, print."""
    reads = argparse.ArgumentParser(description=__doc__)
    reads.add_argument("--clients", type=int, default=5_000)
    reads.add_argument("--per-round", type=int, default=50)
    reads.add_argument("--rounds", type=int, default=4)
    reads.add_argument("--columns", nargs="*", default=())
    chosen = reads.parse_args()
    import torch

    import lichen
    from lichen.allocator import keep_large_buffers
    from lichen.present.trace import read_trace
    from lichen.recipes.plan.plan import plan

    torch.set_num_threads(1)
    keep_large_buffers()  # as the command line does
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, chosen.clients)
        known = recipe(file, rounds=chosen.rounds, per_round=chosen.per_round, columns=tuple(chosen.columns))
        expected = plan(known)
        processor = [time.process_time()]
        done = lichen.run(known, out=Path(folder) / "run", observers=[lambda _: processor.append(time.process_time())])
        processor.append(time.process_time())
        rounds = [e.report for e in read_trace(done.folder) if e.column == "federated"]
    print(f"{done.summary['clients']} clients, {chosen.per_round} a round, {chosen.rounds} rounds")
    print(f"planned {expected.seconds:8.1f} s  run {done.summary['seconds']:8.1f} s")
    for name, cost in expected.expected.columns.items():
        print(f"  planned {name}: {cost.seconds:.1f} s; loading {expected.expected.start:.1f} s")
    print(f"planned {expected.expected.bytes.down / 1e9:8.3f} GB down  run {done.summary['bytes_down'] / 1e9:8.3f} GB")
    for report, before, after in zip(rounds, processor, processor[1:], strict=False):
        print(
            f"round {report.round}: {report.seconds:6.2f} s, {after - before:6.2f} of a processor, "
            f"{(report.bytes_down - report.valid_down) / 1e9:.3f} GB down to train and "
            f"{report.valid_down / 1e9:.3f} to validate"
        )
    print(f"after the last round: {processor[-1] - processor[-2]:.2f} of a processor")


if __name__ == "__main__":
    main()
