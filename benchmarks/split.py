"""The tables of ``split.md``: what each side of a split SmolLM2 holds, and what crosses.

``python benchmarks/split.py measure`` opens the recipe of ``lichen compare split-chat`` at several cuts, counts the
bytes of the whole run and the memory of one client's round, and keeps them in ``results/split_sides.json``. It trains
for a minute a cut. ``python benchmarks/split.py sides`` prints them and needs no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lichen.present.units import bytes_text, seconds_text

RESULT = Path(__file__).resolve().parent / "results" / "split_sides.json"
CUTS: dict[str, dict[str, Any]] = {
    "1 + 1": {"client": {"first": (1,), "last": (1,)}},
    "2 + 1": {"client": {"first": (2,), "last": (1,)}},
    "4 + 1": {"client": {"first": (4,), "last": (1,)}},
    "8 + 1": {"client": {"first": (8,), "last": (1,)}},
    "2 + 1, local head": {"client": {"first": (2,), "last": (1,)}, "local_head": True},
}
PLAIN = "whole"


def measure() -> None:
    """Count and measure, and keep what was found."""
    from dataclasses import asdict

    from lichen.recipes.assemble.experiment import lr_name
    from lichen.recipes.assemble.open import open_recipe
    from lichen.recipes.assemble.parts import client_tasks
    from lichen.recipes.assemble.pieces.split_memory import split_memory
    from lichen.recipes.comparison import read_comparison
    from lichen.recipes.plan.footprint import footprint
    from lichen.recipes.plan.pieces.split_costs import split_traffic
    from lichen.recipes.plan.workload import invitations
    from lichen.recipes.schema.sections.split import SplitConfig

    base = next(m for m in read_comparison(["split-chat"]).methods if m.name == "FedIT").recipe
    found: dict[str, Any] = {}
    for name, split in CUTS.items():
        recipe = base.model_copy(update={"split": SplitConfig.model_validate(split)})
        opened = open_recipe(recipe).experiment
        sent = split_traffic(opened, invitations(opened))
        task = client_tasks(opened)[f"train {lr_name(recipe.optimizer.lr[0])}"]
        memory = asdict(split_memory(opened, task, 0))
        found[name] = {**memory, "up": sent.client_up, "down": sent.client_down, "run": sent.up + sent.down}
        print(name, found[name], flush=True)
    whole = footprint(base)
    assert whole is not None
    found[PLAIN] = {"client_frozen": whole.frozen, "client_training": whole.training}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def sides() -> None:
    """A row a cut."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    heads = ("blocks at the client", "client's weights", "of the whole", "client's training", "server's weights")
    heads += ("server, a client", "up", "down", "at 100 Mb/s", "at 10 Mb/s")
    print(f"| {' | '.join(heads)} |")
    print(f"|---|{'---:|' * (len(heads) - 1)}")
    for name, one in found.items():
        frozen, training = one["client_frozen"], one["client_training"]
        cells = [name, bytes_text(frozen)]
        if name == PLAIN:
            cells += ["1.00", bytes_text(training), *["-"] * 6]
        else:
            both = one["up"] + one["down"]
            cells += [f"{frozen / one['whole_frozen']:.2f}", bytes_text(training), bytes_text(one["server_frozen"])]
            cells += [bytes_text(one[key]) for key in ("server_training", "up", "down")]
            cells += [seconds_text(8 * both / (rate * 1e6)) for rate in (100, 10)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    {"measure": measure, "sides": sides}[sys.argv[1]]()
