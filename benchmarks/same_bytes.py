"""Digests of what four small runs give: what a change that must change no result is held against.

``python benchmarks/same_bytes.py`` runs them (a few minutes) and prints a digest of the learned tensors, of
``clients.csv`` and of the columns of the summary; ``--json FILE`` writes them, ``--against FILE`` compares and says
what differs. Equal digests are promised on one machine with one set of versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file

import lichen

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits": ("digits", ()),
    "digits-unequal": ("digits-unequal", ("federation.rounds=2",)),
    "chat-demo, two rounds": ("chat-demo", ("federation.rounds=2", "federation.valid_every=2", "data.max_clients=8")),
    "reviews-oneshot": ("reviews-oneshot", ()),
}
"""The recipe and its settings by the name in the table."""


def tensors_digest(folder: Path) -> str:
    """One digest of every tensor that a run leaves to its user: names, kinds, shapes and bytes."""
    digest = hashlib.sha256()
    for part in ("adapter", "model"):
        for file in sorted((folder / part).rglob("*.safetensors")):
            for name, tensor in sorted(load_file(file).items()):
                digest.update(f"{part}/{file.name}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def digests(folder: Path) -> dict[str, str]:
    """The digests of one finished run."""
    columns = json.loads((folder / "summary.json").read_text())["columns"]
    return {
        "tensors": tensors_digest(folder),
        "clients.csv": hashlib.sha256((folder / "clients.csv").read_bytes()).hexdigest()[:16],
        "columns": hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()[:16],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where the digests are written")
    parser.add_argument("--against", type=Path, help="digests of another state of the code")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="which runs; all if not given")
    asked = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    with TemporaryDirectory() as home:
        for name in asked.only:
            recipe, settings = RUNS[name]
            folder = Path(home) / recipe
            lichen.run(lichen.read_recipe(recipe, settings), out=folder)
            found[name] = digests(folder)
            print(f"{name:24}", *(f"{what} {digest}" for what, digest in found[name].items()), sep="  ", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if asked.against is None:
        return 0
    before = json.loads(asked.against.read_text())
    other = [f"{name}: {what}" for name in found for what in found[name] if found[name][what] != before[name][what]]
    print("\n".join(["differs:", *other]) if other else "the same bytes as before")
    return bool(other)


if __name__ == "__main__":
    sys.exit(main())
