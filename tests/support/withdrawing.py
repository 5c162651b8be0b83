"""A run with a client that is going to go, and a run that stands for the one without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lichen
from support.tiny_llama import recipe, save_model

NAME = "ada-lovelace"
CANARY = "w1 w2 zanzibar w3 w4"
CLIENTS = ("abe", NAME, "ada-lovelace-2", "person-3")


def save_people(file: Path) -> Path:
    """Rows of four people, one of whom writes a word that nobody else does; another's name begins with hers."""
    lines = [
        {"who": who, "ask": f"w{row} w{place}", "reply": f"w{place} {CANARY if who == NAME else 'w5 w6'} w{row}"}
        for place, who in enumerate(CLIENTS)
        for row in range(10)
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return file


def about(home: Path, **more: Any) -> dict[str, Any]:
    """The recipe over them: messages retained, clients alone."""
    sections = recipe(home / "llama", home / "rows.jsonl", "pair", **more)
    federation = {"rounds": 2, "local_steps": 1, "batch_size": 2, "history": True}
    return {**sections, "federation": federation, "compare": {"baselines": ["alone"]}}


def save_runs(home: Path) -> None:
    """``run`` and ``new`` in a folder, with their data: the second has another seed and says that it is without her."""
    save_model(home / "llama", more=("zanzibar",))
    save_people(home / "rows.jsonl")
    lichen.run(about(home), out=home / "run")
    lichen.run({**about(home), "seed": 1}, out=home / "new")
    say_without(home / "new")


def say_without(folder: Path) -> None:
    """Let a folder be one from which the client was made to go."""
    found = {"client": NAME, "how": "replay", "proof": {"loss_gap": 0.25, "by client": {NAME: 1}}}
    (folder / "withdrawal.json").write_text(json.dumps(found), encoding="utf-8")


def copied(home: Path, target: Path) -> Path:
    """Both runs elsewhere, to be changed."""
    for name in ("run", "new"):
        shutil.copytree(home / name, target / name)
    return target


def everything(folder: Path) -> dict[str, bytes]:
    """All bytes of a folder by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
