"""Write ``byzfl_vectors.json``: what byzfl 0.0.11 makes of a few small rounds.

    pip install byzfl==0.0.11 numpy scipy torch      # in an environment of its own
    python tests/server/robust/byzfl_vectors.py

byzfl imports plots and data sets as well, which are not needed here and are left out.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

CLIENTS, NUMBERS, LIARS = 11, 7, 2


def main() -> None:
    for name in ("matplotlib", "matplotlib.pyplot", "seaborn", "torchvision", "torchvision.transforms"):
        sys.modules[name] = MagicMock()
    byzfl = importlib.import_module("byzfl")
    rounds = []
    for seed in range(3):
        g = np.random.default_rng(seed)
        x_CN = g.normal(size=(CLIENTS, NUMBERS))
        x_CN[:LIARS] = 5 * x_CN[:LIARS] + 3
        answers = {
            "median": byzfl.Median()(x_CN),
            "trimmed_mean": byzfl.TrMean(LIARS)(x_CN),
            "krum": byzfl.Krum(LIARS)(x_CN),
            "multi_krum": byzfl.MultiKrum(LIARS)(x_CN),
            "geometric_median": byzfl.GeometricMedian(nu=0.1, T=3)(x_CN),
            "centred_clipping": byzfl.CenteredClipping(L=4, tau=1.5)(x_CN),
            "nnm": byzfl.NNM(LIARS)(x_CN),
        }
        rounds.append({"rows": x_CN.tolist(), **{name: x.tolist() for name, x in answers.items()}})
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps({"liars": LIARS, "rounds": rounds}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
