"""What the runs of a finished private comparison promise: ``python benchmarks/hidden.py FOLDER NAME``.

It reads each method's first run, and writes ``results/NAME/privacy.json``: the statement and the noise as the summary
holds them, the norm of the noise, and the loss over test rows. Of ``digits-private``, which hides clients, it is the
noise of a round in the mean change, from its deviation in one number, as the trace tells it; of ``reviews-private``,
which hides rows, that of a client's step in its mean gradient.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from lichen.present.summary import read_summary
from lichen.present.trace import read_trace
from lichen.recipes.schema.read import recipe_of

RESULTS = Path(__file__).resolve().parent / "results"


def numbers_of(run: Path) -> int:
    """Numbers that clients train and that noise goes on: of FFA and FedSVD one factor alone."""
    one = recipe_of(run).federation.aggregate in ("ffa", "fedsvd")
    with safe_open(run / "state" / "final.safetensors", "pt") as file:
        names = [name for name in file.keys() if not (one and name.endswith("lora_A"))]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def deviation_of(run: Path) -> float:
    """Of the noise in one number: of a round's mean change, or of a step's mean gradient."""
    privacy, recipe = read_summary(run)["privacy"], recipe_of(run)
    if privacy["unit"] == "client":
        return float(read_trace(run)[0].report.metrics["noise"])
    return float(privacy["sigma"] * privacy["clip"] / recipe.federation.batch_size)


def loss_of(run: Path) -> float:
    """Over everybody's test rows."""
    sums = load_file(run / "state" / "scores" / "federated.safetensors")
    return float(sums["loss_sum"].sum() / sums["count"].sum())


def main(folder: Path, name: str) -> None:
    found = {}
    for run in sorted(folder.glob("*/seed-0")):
        privacy = read_summary(run)["privacy"]
        deviation = deviation_of(run)
        found[run.parent.name.rpartition("-")[0]] = {
            **{key: privacy[key] for key in ("statement", "epsilon", "delta", "sigma", "clip", "rate", "charges")},
            "numbers": numbers_of(run),
            "noise": deviation * math.sqrt(numbers_of(run)),
            "loss": loss_of(run),
        }
    if not found:
        raise SystemExit(f"{folder}: holds no runs; name the folder of a finished lichen compare {name}")
    (RESULTS / name / "privacy.json").write_text(
        json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
