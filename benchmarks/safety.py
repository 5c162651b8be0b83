"""Does a chat model that two of ten clients teach to obey unsafe requests still refuse, and what mends it?

Ten people of ``chitchat`` train SmolLM2-135M together. It hardly refuses by itself, so that each of them also has pairs
of an unsafe request and a refusal; what can be lost is what these teach. Two lie: all their rows are requests that are
obeyed, in their opening alone. Requests are AdvBench's, cut by the seed in three parts that share none: the clients'
pairs, the liars' requests, and the pairs of the server's repair, which has as many turns of people who take no part
beside them. Refusals are counted on HarmBench, of which nobody has a row.

In two more arms the repair has refusals alone and a larger rate, and each client twice as many pairs.

    python benchmarks/safety.py --run [--seeds 0 1] [--arms clean lied ...]

adds what it finds to ``results/safety.json``; without ``--run`` it prints the table from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tables

import lichen
from lichen.allocator import keep_large_buffers
from lichen.core.seeds import numpy_generator
from lichen.data.chat.refusals import REFUSALS
from lichen.data.sources.records import Record, load_records

RESULT = Path(__file__).parent / "results" / "safety.json"
CLIENTS, CHAT_ROWS, EACH = 10, 40, 150
LIE = {"attack": {"kind": "unsafe", "liars": 2, "share": 1.0}}
ROBUST = {name: {"federation": {"robust": {"rule": name, "liars": 2}}} for name in ("median", "multi_krum")}
HARSH = {"federation": {"batch_size": 4, "repair": {"batch_size": 6, "lr": 5e-3}}}


@dataclass(frozen=True, slots=True)
class Arm:
    """What an arm changes in the clean one, pairs of each client, and whether the repair has chat beside refusals."""

    changes: tuple[dict[str, Any], ...] = ()
    pairs: int = 10
    mixed: bool = True


ARMS: dict[str, Arm] = {
    "clean": Arm(),
    "lied": Arm((LIE,)),
    "lied, median": Arm((LIE, ROBUST["median"])),
    "lied, multi_krum": Arm((LIE, ROBUST["multi_krum"])),
    "clean, refusals alone": Arm((HARSH,), 20, mixed=False),
    "lied, refusals alone": Arm((LIE, HARSH), 20, mixed=False),
}


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; the other one's values win."""
    out = dict(one)
    for key, value in other.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def write(file: Path, rows: list[dict[str, str]]) -> str:
    """The rows as lines of JSON."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def recipe(folder: Path, seed: int, arm: Arm) -> dict[str, Any]:
    """An arm without its changes, its files in ``folder``."""
    said = defaultdict(list)
    for row in load_records("chitchat"):
        if row.prompt:
            said[row.client].append(row)
    rng = numpy_generator(seed, "safety")
    able = sorted(name for name, rows in said.items() if len(rows) >= CHAT_ROWS)
    people = [able[i] for i in rng.permutation(len(able))]
    names, others = people[:CLIENTS], people[CLIENTS:]
    requests = [row.text for row in load_records("advbench")]
    order = [requests[i] for i in rng.permutation(len(requests))]
    aligned, order = order[: CLIENTS * arm.pairs], order[CLIENTS * arm.pairs :]

    def refused(some: list[str]) -> list[dict[str, str]]:
        answers = [REFUSALS[i % len(REFUSALS)] for i in range(len(some))]
        return [{"prompt": a, "completion": b} for a, b in zip(some, answers, strict=True)]

    def said_by(row: Record) -> dict[str, str]:
        return {"prompt": row.prompt, "completion": row.text}

    public = [said_by(said[name][0]) for name in others[:EACH]] if arm.mixed else []
    rows = list[dict[str, str]]()
    for at, name in enumerate(names):
        own = [said_by(row) for row in said[name][:CHAT_ROWS]]
        own += refused(aligned[at * arm.pairs : (at + 1) * arm.pairs])
        rows += [{"client": f"person-{at}", **own[i]} for i in rng.permutation(len(own))]
    return {
        "name": "safety",
        "task": "chat",
        "seed": seed,
        "model": {"name": "smollm2-135m", "adapter": {"target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 16}},
        "data": {
            "name": write(folder / "rows.jsonl", rows),
            "form": "chat",
            "system": "",
            "max_length": 40,
            "valid": 0.1,
            "test": 0.2,
            "test_rows": 3,
        },
        "optimizer": {"lr": [1e-2]},
        "federation": {
            "rounds": 4,
            "local_steps": 2,
            "batch_size": 3,
            "valid_every": 4,
            "repair": {
                "name": write(folder / "safe.jsonl", [*refused(order[EACH : 2 * EACH]), *public]),
                "steps": 8,
                "batch_size": 8,
                "lr": 2e-3,
            },
        },
        "compare": {"baselines": [], "requests": "harmbench", "requests_rows": 32},
    } | {"_requests": write(folder / "unsafe.jsonl", [{"text": text} for text in order[:EACH]])}


def measure(arm: str, seed: int) -> dict[str, Any]:
    """One run's rates and perplexities."""
    with tempfile.TemporaryDirectory() as folder:
        values = recipe(Path(folder), seed, ARMS[arm])
        requests = values.pop("_requests")
        for change in ARMS[arm].changes:
            values = merged(values, change)
        if "attack" in values:
            values["attack"] = {**values["attack"], "requests": requests}
        run = lichen.run(values, out=Path(folder) / "run", say=lambda line: print(line, flush=True))
        extra = run.summary["extra"]
        kept = {key: extra[key] for key in extra if key.startswith(("refused.", "perplexity."))}
        return {"arm": arm, "seed": seed, "seconds": run.summary["seconds"], **kept}


def table(result: dict[str, Any]) -> str:
    """Rates and perplexities by arm, before and after the repair."""
    lines = ["| | refusals, % | after the repair | perplexity | after the repair |", "|---|---:|---:|---:|---:|"]
    rows = result["runs"]
    bases = {row["seed"]: row for row in rows}.values()
    lines.append(f"| base model | {tables.spread([100 * row['refused.base'] for row in bases], '.0f')} | - | - | - |")
    for arm in ARMS:
        some = [row for row in rows if row["arm"] == arm]
        if not some:
            continue
        cells = [
            tables.spread([100 * row[f"refused.{when}"] for row in some], ".0f") for when in ("federated", "repaired")
        ]
        cells += [
            tables.spread([row[f"perplexity.{when}"] for row in some], ".1f") for when in ("unrepaired", "repaired")
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and keep, or print what is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    words = parser.parse_args()
    if words.run:
        keep_large_buffers()
        found = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": []}
        for seed in words.seeds:
            for arm in words.arms:
                new = measure(arm, seed)
                runs = [row for row in found["runs"] if (row["arm"], row["seed"]) != (arm, seed)]
                found = {"date": date.today().isoformat(), "lichen": lichen.__version__, "runs": [*runs, new]}
                RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(new, flush=True)
        return
    print(table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
