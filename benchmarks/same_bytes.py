"""Digests of what small runs of many methods give: what a change that must change no result is held against.

``python benchmarks/same_bytes.py`` runs them (some ten minutes) and prints a digest of the learned tensors, of
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

CHAT = (
    "federation.rounds=2",
    "federation.clients_per_round=4",
    "federation.local_steps=2",
    "federation.valid_every=2",
    "data.max_clients=4",
    "data.max_rows=100",
    "data.test_rows=4",
    "compare.baselines=[]",
)
"""A cut of ``chat-demo`` of about half a minute."""

FEW = ("federation.rounds=3", "federation.valid_every=3", "compare.baselines=[]")
"""A cut of ``digits`` of a few seconds: enough rounds for what a method keeps from one round to the next."""

SCRATCH = (
    "model.scratch={text: sotu, vocabulary: 512, width: 32, layers: 1, heads: 2}",
    "federation.rounds=3",
    "federation.local_steps=10",
    "optimizer.warmup=5",
    "federation.valid_every=3",
    "compare.baselines=[]",
)
"""A cut of ``sotu-diloco`` of some seconds: a model of one layer."""

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits": ("digits", ()),
    "digits, both chains": ("digits", (*FEW, "wire.up=[topk:8/256, int4]", "wire.down=[int8]")),
    "digits, sign and sketch": ("digits", (*FEW, "wire.up=[sketch:2, bf16]", "wire.down=[sign]")),
    "digits, q-FFL": ("digits", (*FEW, "federation.fair=qffl")),
    "digits, agnostic": ("digits", (*FEW, "federation.fair=minmax")),
    "digits, Yogi": ("digits", (*FEW, "federation.server={name: yogi, lr: 0.03}", "federation.clients_per_round=4")),
    "digits, MeZO": ("digits", (*FEW, "optimizer.name=mezo", "optimizer.momentum=0")),
    "digits-unequal": ("digits-unequal", ("federation.rounds=2",)),
    "digits-unequal, FedMD": ("digits-unequal", ("federation.rounds=2", "exchange.kind=fedmd", "exchange.sharpen=1")),
    "digits-unequal, FedDF": ("digits-unequal", ("federation.rounds=2", "exchange={kind: feddf}")),
    "reviews-few, semi": (
        "reviews-few",
        ("federation.rounds=3", "semi={kind: flexmatch, warmup_rounds: 1, threshold: 0.3}", "compare.baselines=[]"),
    ),
    "reviews-oneshot, a cut": (
        "reviews-oneshot",
        ("data.max_clients=10", "data.max_length=32"),
    ),
    "sotu-diloco": ("sotu-diloco", SCRATCH),
    "sotu-diloco, streamed": (
        "sotu-diloco",
        (*SCRATCH, "federation.stream_fragments=2", "federation.drop_prob=0.2", "wire.up=[int4]"),
    ),
    "sotu-diloco, FedKSeed": (
        "sotu-diloco",
        (
            *SCRATCH,
            "optimizer={name: kseed, lr: 1e-4, seeds: 64}",
            "federation.keep_optimizer=false",
            "federation.server={name: sgd}",
        ),
    ),
    "chat-demo, two rounds": ("chat-demo", ("federation.rounds=2", "federation.valid_every=2", "data.max_clients=8")),
    "chat-demo, FedEx": ("chat-demo", (*CHAT, "federation.aggregate=fedex")),
    "chat-demo, RoLoRA": ("chat-demo", (*CHAT, "federation.aggregate=rolora")),
    "chat-demo, both chains": ("chat-demo", (*CHAT, "wire.up=[topk:8/264, int4~]", "wire.down=[topk:7/32, int4~]")),
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
            folder = Path(home) / str(len(found))
            lichen.run(lichen.read_recipe(recipe, settings), out=folder)
            found[name] = digests(folder)
            print(f"{name:25}", *(f"{what} {digest}" for what, digest in found[name].items()), sep="  ", flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if asked.against is None:
        return 0
    before = json.loads(asked.against.read_text())
    both = [name for name in found if name in before]
    other = [f"{name}: {what}" for name in both for what in found[name] if found[name][what] != before[name][what]]
    print(
        "\n".join(["differs:", *other]) if other else f"the same bytes as before, in {len(both)} of {len(found)} runs"
    )
    return bool(other) or not both


if __name__ == "__main__":
    sys.exit(main())
