"""Write ``river_alarms.json``: where river 0.26.1 alarms on the series of its documentation and on two more.

pip install river==0.26.1      # in an environment of its own
python tests/server/drift/river_alarms.py
"""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any


def series() -> dict[str, list[float]]:
    """The documented one of both detectors, normal numbers whose mean goes up and down, errors that become frequent."""
    rng = random.Random(12345)
    documented = rng.choices([0, 1], k=1000) + rng.choices(range(4, 8), k=1000)
    rng = random.Random(7)
    normal = [round(rng.gauss(mean, 1), 4) for mean, count in ((0, 600), (1.2, 600), (-1, 400)) for _ in range(count)]
    errors = [int(rng.random() < rate) for rate in (0.1, 0.4) for _ in range(1000)]
    return {"documented": documented, "normal": normal, "errors": errors}


def alarms(detector: Any, values: list[float]) -> list[int]:
    found = []
    for position, value in enumerate(values):
        detector.update(value)
        if detector.drift_detected:
            found.append(position)
    return found


def main() -> None:
    drift = importlib.import_module("river.drift")
    found = {}
    for name, values in series().items():
        found[name] = {
            "values": values,
            "page-hinkley up": alarms(drift.PageHinkley(mode="up"), values),
            "page-hinkley down": alarms(drift.PageHinkley(mode="down"), values),
            "page-hinkley both": alarms(drift.PageHinkley(mode="both"), values),
            "adwin": alarms(drift.ADWIN(), values),
            "adwin every number": alarms(drift.ADWIN(clock=1, delta=0.01), values),
        }
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
