"""What the runs of a finished ``lichen compare digits-private`` promise: ``python benchmarks/hidden.py FOLDER``.

It reads each method's first run, and writes ``results/digits-private/privacy.json``: the statement and the noise as the
summary holds them, and the norm of a round's noise, from its deviation in one number, as the trace tells it.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from safetensors import safe_open

from lichen.present.summary import read_summary
from lichen.present.trace import read_trace

RESULT = Path(__file__).resolve().parent / "results" / "digits-private" / "privacy.json"


def numbers_of(run: Path) -> int:
    """Numbers of what was learned."""
    with safe_open(run / "state" / "final.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def main(folder: Path) -> None:
    found = {}
    for run in sorted(folder.glob("*/seed-0")):
        privacy = read_summary(run)["privacy"]
        deviation = read_trace(run)[0].report.metrics["noise"]
        found[run.parent.name.rpartition("-")[0]] = {
            **{key: privacy[key] for key in ("statement", "epsilon", "delta", "sigma", "clip", "rate", "charges")},
            "numbers": numbers_of(run),
            "noise": deviation * math.sqrt(numbers_of(run)),
        }
    if not found:
        raise SystemExit(f"{folder}: holds no runs; name the folder of a finished lichen compare digits-private")
    RESULT.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
