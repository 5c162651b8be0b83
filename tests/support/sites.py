"""Three sites with rows of their own: one file each, or a folder of two, in a folder that a simulation reads whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from lichen.core.seeds import numpy_generator
from support.tiny_llama import recipe, save_model
from support.tiny_llama import say as words

SITES = ("ward.b.jsonl", "clinic", "Ward-a.csv")
"""Not in the order of the clients' names."""


def save_sites(home: Path, shape: Literal["pair", "label"], *, named: bool = False) -> tuple[Path, ...]:
    """Write the sites' files; ``named``: with a column of clients, three at a site."""
    for at, site in enumerate(SITES):
        rng = numpy_generator(at, "site")
        rows: list[dict[str, Any]] = []
        for row in range(18 + 3 * at):
            # The first row is the same everywhere: a copy that other sites hold.
            ask, answer = ("w1 w2", "w3 w4") if row == 0 else (words(rng, 3), words(rng, 4 + at + row % 2))
            told = {"ask": ask, "reply": answer}
            if shape == "label":
                told = {"said": answer, "mood": ("calm", "glad", "sad")[row % (2 + (at > 0))]}
            # Of the clients in a column, one is named by no row but by its file.
            rows.append({**({"who": (f"p{5 - at}", "", f"q{at}")[row % 3]} if named else {}), **told})
        _write(home / site, rows)
    return tuple(home / site for site in SITES)


def _write(site: Path, rows: list[dict[str, Any]]) -> None:
    if not site.suffix:
        site.mkdir(parents=True)
        _write(site / "1.jsonl", rows[:5])
        _write(site / "2.jsonl", rows[5:])
        return
    site.parent.mkdir(parents=True, exist_ok=True)
    if site.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    site.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sites_recipe(home: Path, shape: Literal["pair", "label"], *, named: bool = False, **more: Any) -> dict[str, Any]:
    """The recipe of the folder ``home/sites``, with a tiny model in ``home/model``."""
    if not (home / "model").exists():
        save_model(home / "model")
    made = recipe(home / "model", home / "sites", shape, **more)
    if not named:
        made["data"]["columns"] = {role: column for role, column in made["data"]["columns"].items() if role != "client"}
    return made
