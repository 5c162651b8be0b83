"""How long a person waits for what is not the work: commands of two checkouts in turn, and their ratio.

Cases: ``list`` prints names; ``init`` reads a small CSV and writes a recipe; ``report`` prints a finished run's table;
``digits`` is the gallery recipe with the
baselines that both have; ``second chat`` starts a chat recipe that has run here before, so that what was
found out about its model is known. Each case is a process of its own, on this checkout and on the other by turns; the
first of each is not counted. Files of the system's cache are warm.

    python benchmarks/waits.py --against CHECKOUT

keeps what it found in ``results/waits.json``; without ``--against`` it prints the table from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "waits.json"
CHAT = ["chat-demo", *(word for s in (
    "data.max_clients=2", "data.max_rows=12", "federation.rounds=1", "federation.clients_per_round=1",
    "federation.local_steps=1", "compare.baselines=[base]", "compare.forms=[]", "optimizer.lr=[5e-3]",
) for word in ("-s", s))]  # fmt: skip
CASES: dict[str, list[str]] = {
    "list": ["list"],
    "init": ["init", "rows.csv", "--out", "OUT.yaml", "--task", "classify", "--label", "label", "--text", "text"],
    "report": ["report", "RUN"],
    "digits": ["run", "digits", "-s", "compare.baselines=[alone, pooled]", "--out", "OUT"],
    "second chat": ["run", *CHAT, "--out", "OUT"],
}
REPEATS = {"digits": 3, "second chat": 3}


def seconds(checkout: Path, words: list[str], folder: Path) -> float:
    """Wall time of one command with this checkout's package.

    Raises:
        subprocess.CalledProcessError: if it fails, with what it printed.
    """
    out = tempfile.mkdtemp(dir=folder)
    known = {"OUT": f"{out}/run", "OUT.yaml": f"{out}/recipe.yaml", "RUN": str(folder / checkout.name / "run")}
    command = [sys.executable, "-m", "lichen", *(known.get(word, word) for word in words)]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    took = time.perf_counter() - start
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return took


def measure(now: Path, before: Path) -> dict[str, object]:
    """Seconds of every case on both, by turns."""
    cases: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = "".join(f"a text of some words number {i},{'yes' if i % 2 else 'no'},p{i % 4}\n" for i in range(400))
        (folder / "rows.csv").write_text("text,label,who\n" + rows, encoding="utf-8")
        for checkout in (now, before):
            seconds(checkout, ["run", "digits", "--out", str(folder / checkout.name / "run")], folder)
        for case, words in CASES.items():
            found: dict[str, list[float]] = {"now": [], "before": []}
            for turn in range(1 + REPEATS.get(case, 5)):
                for side, checkout in (("now", now), ("before", before)):
                    took = seconds(checkout, words, folder)
                    if turn:
                        found[side].append(round(took, 3))
            cases[case] = found
            print(case, found, flush=True)
    return {"date": date.today().isoformat(), "cores": len(os.sched_getaffinity(0)), "cases": cases}


def table(result: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Medians, and the median of the ratios by turn."""
    lines = ["| command | seconds before | seconds now | now over before |", "|---|---:|---:|---:|"]
    for case, found in result["cases"].items():
        now, before = statistics.median(found["now"]), statistics.median(found["before"])
        ratio = statistics.median(a / b for a, b in zip(found["now"], found["before"], strict=True))
        lines.append(f"| {case} | {before:.2f} | {now:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was kept."""
    reads = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reads.add_argument("--against", type=Path, help="another checkout, to be measured by turns")
    other = reads.parse_args().against
    if other is not None:
        RESULT.write_text(json.dumps(measure(ROOT, other.resolve()), indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
