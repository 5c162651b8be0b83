"""What does it cost to forget a client exactly, and has what is left the bytes of a run to which it never came?

Four recipes of the gallery, cut to minutes, are run whole, and once more with ``federation.absent: [NAME]``. `lichen
forget` then makes a run without NAME out of the first. Its model is held against the second by its bytes, and its
seconds against those of the whole run; baselines are left out, since they are trained anew in any case. A late
client is the one whose first invitation comes last, an early one, of digits, is invited to the first round.

Run it: ``python benchmarks/forget.py --run`` (rows and models are downloaded once; name recipes to run these alone);
``python benchmarks/forget.py`` prints the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "forget.json"
WHICH = ("late", "early")
CASES: dict[str, tuple[str, ...]] = {
    "digits": ("engine.history=1", "federation.clients_per_round=3"),
    "reviews-oneshot": ("data.max_clients=12", "data.max_rows=60", "compare.partitions=1"),
    "reviews-lora": (
        *("engine.history=1", "data.max_clients=12", "data.max_rows=60", "optimizer={lr: 6e-3}"),
        *("federation={rounds: 12, clients_per_round: 2, local_steps: 2, batch_size: 4, valid_every: 3}",),
    ),
    "chat-lora": (
        *("engine.history=1", "data.max_clients=6", "data.max_rows=60", "data.test_rows=2", "optimizer={lr: 2e-3}"),
        *("federation={rounds: 4, clients_per_round: 2, local_steps: 1, batch_size: 4, valid_every: 4}",),
        *("compare={retention_text: null}", "engine.packing=false"),
    ),
}


def first_rounds(folder: Path) -> dict[int, int]:
    """The first round that each client was invited to, by its number."""
    from lichen.present.trace import read_trace

    found: dict[int, int] = {}
    for event in read_trace(folder):
        if event.column == "federated":
            for client in event.report.clients:
                found.setdefault(client, event.report.round)
    return found


def measured(name: str, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """One recipe: whole, without a client, and with one forgotten."""
    import lichen
    from lichen.recipes.schema.read import read_recipe

    recipe = read_recipe(name, [*words, "compare.baselines=[]"])
    whole = lichen.run(recipe, out=folder / "whole")
    first, names = first_rounds(whole.folder), [row["client"] for row in whole.clients()]
    chosen = {"late": max(first, key=lambda c: (first[c], -c)), "early": min(first, key=lambda c: (first[c], c))}
    found: dict[str, Any] = {}
    for which in WHICH if name == "digits" else WHICH[:1]:
        gone = names[chosen[which]]
        fed = recipe.federation.model_copy(update={"absent": (gone,)})
        absent = lichen.run(recipe.model_copy(update={"federation": fed}), out=folder / f"absent-{which}")
        done = lichen.forget(whole.folder, gone, out=folder / which)
        model = [(one / "state" / "final.safetensors").read_bytes() for one in (absent.folder, done.new)]
        found[which] = {
            "how": done.how,
            "first": first[chosen[which]],
            "rounds": recipe.federation.rounds if done.starts else 1,
            "copied": max((start for start, _ in done.starts.values()), default=0),
            "same": model[0] == model[1],
            "seconds": done.seconds,
            "run_seconds": done.run_seconds,
            "before": done.before,
            "after": done.after,
        }
    return found


def run(names: Sequence[str]) -> None:
    """What the table says, written after each recipe."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name in names or CASES:
        with tempfile.TemporaryDirectory(prefix="lichen-forget-") as folder:
            found[name] = measured(name, CASES[name], Path(folder))
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name} is done", flush=True)


def show(found: dict[str, Any]) -> None:
    """The table."""
    print(
        "| recipe, client | way | first invited | rounds copied | same bytes as absent | forget, s | whole run, s "
        "| share | others before | others after |"
    )
    print("|---|---|---:|---:|---|---:|---:|---:|---:|---:|")
    for name in CASES:
        for which, one in found.get(name, {}).items():
            cells = [
                f"{name}, {which}",
                one["how"],
                f"{one['first']} of {one['rounds']}",
                str(one["copied"]),
                "yes" if one["same"] else "no",
                f"{one['seconds']:.1f}",
                f"{one['run_seconds']:.1f}",
                f"{100 * one['seconds'] / one['run_seconds']:.0f}%",
                f"{one['before']:.3f}",
                f"{one['after']:.3f}",
            ]
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Run it, or print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", nargs="*", choices=list(CASES), default=None)
    given = parser.parse_args().run
    if given is not None:
        run(given)
    show(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
