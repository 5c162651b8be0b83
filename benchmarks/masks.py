"""What do masks cost, and is a message anywhere in the server's memory?

``chat``: rounds of a chat model with and without masks, in turns. ``many``: a round of 1,000 clients of ``digits``.
``memory``: a server whose clients live in other processes is asked for all that its own memory holds, and 10,000 pieces
of eight bytes of what its clients had before masks lay over it are looked for there, in whole units and in floating
point; pieces of what the server may know are looked for, too, and must be found.

    python benchmarks/masks.py --run chat many memory

keeps what it found in ``results/masks.json``; ``rounds`` or ``memory`` prints a table from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import tables

import lichen
from lichen.core.collecting.history import History
from lichen.core.store import load_tree
from lichen.present.trace import read_trace
from lichen.server.mean import Mean

RESULT = Path(__file__).parent / "results" / "masks.json"
CHAT = (
    *("data.max_clients=8", "federation.clients_per_round=8", "federation.rounds=4", "federation.valid_every=4"),
    *("compare.baselines=[]", "compare.forms=[]", "compare.retention_text=null"),
)
DIGITS = (
    "data.partition={by: dirichlet, alpha: 1.0, clients: 8}",
    "optimizer.lr=[0.1]",
    "federation={rounds: 3, local_steps: 2, batch_size: 8, aggregate: mean}",
    "compare={baselines: []}",
    "data.valid=0.0",
    f"data.classes=[{', '.join(map(str, range(10)))}]",
)
MANY = (
    "data.partition={by: iid, clients: 1000}",
    "optimizer.lr=[0.1]",
    "federation={rounds: 2, local_steps: 1, batch_size: 1, aggregate: mean}",
    "compare={baselines: []}",
    *("data.valid=0.0", "data.test=0.2"),
)
PIECES = 10_000


def rounds(recipe: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Seconds and bytes of a run's rounds; the first is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        summary = lichen.run(lichen.read_recipe(recipe, keys), out=Path(folder) / "run").summary
        reports = [event.report for event in read_trace(Path(folder) / "run")]
    counted = reports[1:]
    train = [report.bytes_up - report.valid_up for report in counted]
    return {
        "clients": len(reports[0].clients),
        "seconds": sum(report.seconds for report in counted) / len(counted),
        "up": sum(train) / len(counted) / max(len(reports[0].clients), 1),
        "masks": summary["masks"] and {name: summary["masks"][name] for name in ("neighbours", "threshold")},
        "skipped": sum(bool(report.metrics.get("skipped")) for report in reports),
    }


def chat() -> dict[str, Any]:
    """Rounds of a chat model, in turns."""
    plain, masked = [], []
    for _ in range(2):
        plain.append(rounds("chat-lora", (*CHAT, "optimizer.lr=[1e-3]", "optimizer.grid_rounds=null")))
        masked.append(
            rounds("chat-lora", (*CHAT, "optimizer.lr=[1e-3]", "optimizer.grid_rounds=null", "privacy={secure: true}"))
        )
    return {"plain": plain, "masked": masked}


def many() -> dict[str, Any]:
    """A thousand clients of few numbers."""
    return {
        "plain": [rounds("digits", MANY)],
        "masked": [rounds("digits", (*MANY, "privacy={secure: true, dropped: 0.1, colluding: 0.1}"))],
    }


DRIVER = """
import re, sys, lichen
from pathlib import Path
if __name__ == "__main__":
    recipe = lichen.read_recipe(sys.argv[1], sys.argv[3:])
    lichen.run(recipe, out=Path(sys.argv[2]) / "run", server_alone=True)
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory, \\
            open(Path(sys.argv[2]) / "memory", "wb") as out:
        for line in maps:
            start, end, mode, inode = re.match(r"(\\w+)-(\\w+) (\\S+) \\S+ \\S+ (\\d+)", line).groups()
            if mode.startswith("rw") and inode == "0" and "[v" not in line:
                memory.seek(int(start, 16))
                try:
                    out.write(memory.read(int(end, 16) - int(start, 16)))
                except OSError:
                    pass
"""


def memory() -> dict[str, Any]:
    """Pieces of what clients sent, in all writable memory of a server without rows, and in its files."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        open_keys = (*DIGITS, "wire.clip=1.0", "federation.history=true")
        lichen.run(lichen.read_recipe("digits", open_keys), out=folder / "open")
        (kept,) = (folder / "open" / "state").glob("federated/*/history")
        messages = [message for message, _ in History(kept).messages()]
        units = np.concatenate([_flat(Mean().lift(message).tensors) for message in messages])
        plain = np.concatenate([_flat(message.tensors) for message in messages])
        units = units[np.abs(units) > 2**32]  # a small number stands anywhere
        floats = np.frombuffer(plain[: len(plain) // 2 * 2].tobytes(), dtype="<i8")
        floats = floats[(floats & 0xFFFFFFFF != 0) & (floats >> 32 != 0)]
        final = _flat(load_tree(folder / "open" / "state" / "final.safetensors")[0])
        known = np.frombuffer(final[: len(final) // 2 * 2].tobytes(), dtype="<i8")
        known = known[(known & 0xFFFFFFFF != 0) & (known >> 32 != 0)]
        draw = np.random.default_rng(0)
        for masked in (False, True):
            home = folder / ("masked" if masked else "plain")
            home.mkdir()
            keys = (
                *DIGITS,
                "engine={name: spawned, nodes: 2}",
                "privacy={secure: true, clip: 1.0}" if masked else "wire.clip=1.0",
            )
            subprocess.run([sys.executable, "-c", DRIVER, "digits", str(home), *keys], check=True)
            data = (home / "memory").read_bytes() + b"".join(
                file.read_bytes()
                for file in sorted((home / "run").rglob("*"))
                if file.is_file() and "clients" not in file.parts
            )
            words = _words(data)
            found["masked" if masked else "plain"] = {
                "bytes": len(data),
                "units": int(np.isin(draw.choice(units, PIECES // 2), words).sum()),
                "floats": int(np.isin(draw.choice(floats, PIECES // 2), words).sum()),
                "known": float(np.isin(draw.choice(known, 1000), words).mean()),
            }
    return found


def _flat(tensors: Any) -> Any:
    return np.concatenate([tensors[name].numpy().reshape(-1) for name in sorted(tensors) if "lifted/" not in name])


def _words(data: bytes) -> Any:
    """All words of eight bytes that begin at any fourth byte, sorted, each once."""
    whole = [np.frombuffer(data[start : start + (len(data) - start) // 8 * 8], dtype="<i8") for start in (0, 4)]
    return np.unique(np.concatenate(whole))


def rounds_table(result: dict[str, Any]) -> None:
    """Seconds and bytes."""
    rows = []
    for name, label in (("chat", "chat"), ("many", "digits")):
        if name not in result:
            continue
        plain, masked = result[name]["plain"], result[name]["masked"]
        before, after = (min(one["seconds"] for one in some) for some in (plain, masked))
        rows.append([
            label, str(masked[0]["clients"]), str(masked[0]["masks"]["neighbours"]), f"{before:.2f}", f"{after:.2f}",
            f"{after / before:.2f}", f"{masked[0]['up']:,.0f}", f"{masked[0]['up'] / plain[0]['up']:.2f}",
        ])  # fmt: skip
    heads = "round of | clients | neighbours | seconds without | with | times | bytes up of a client | times"
    tables.show(heads, rows)


def memory_table(result: dict[str, Any]) -> None:
    """What of the clients' messages lies in the server's memory and files."""
    rows = [
        ["under masks" if name == "masked" else "without", f"{one['bytes']:,}", f"{one['units']:,}",
         f"{one['floats']:,}", f"{100 * one['known']:.0f} %"]
        for name, one in result["memory"].items()
    ]  # fmt: skip
    heads = "server | bytes looked through | of 5,000 whole units | of 5,000 pairs of floats | of what it may know"
    tables.show(heads, rows)


def main() -> None:
    """Measure, or print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", nargs="?", choices=("rounds", "memory"), default="rounds")
    parser.add_argument("--run", nargs="*", choices=("chat", "many", "memory"), default=[])
    asked = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in asked.run:
        start = time.perf_counter()
        result[name] = {"chat": chat, "many": many, "memory": memory}[name]()
        result.setdefault("taken", {})[name] = date.today().isoformat()
        print(name, f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    {"rounds": rounds_table, "memory": memory_table}[asked.table](result)


if __name__ == "__main__":
    main()
