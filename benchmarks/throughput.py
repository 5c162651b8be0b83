"""Everybody on the same workload, one after the other: tokens a second, whole commands, peak memory.

Each contestant is a process of its own and prints one JSON line; the lines are kept in
``throughput.json`` beside this file and the table and the plot are made from them. Peers run in
environments of their own, which ``benchmarks/peers/setup.sh`` makes; without them they are left out.

Run it: ``python benchmarks/throughput.py [--workloads chat reviews] [--only lichen peft] [--peers FOLDER]``
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
KEPT = HERE / "throughput.json"
PYTHON = sys.executable


def commands(workload: str, rows: Path, peers: Path) -> dict[str, list[str]]:
    """What is run, by name, in turn."""
    ours = [PYTHON, str(HERE / "contestant.py")]
    loop = [PYTHON, str(HERE / "peft_loop.py"), "--workload", str(rows), "--rounds", "2"]
    flower = [str(peers / "flower" / "bin" / "python"), str(HERE / "peers/flower_app/run.py"), "--workload", str(rows)]
    pfl = [str(peers / "pfl" / "bin" / "python"), str(HERE / "peers/pfl_app/run.py"), "--workload", str(rows)]
    lichen, central = [*ours, "lichen", "--workload", workload], [*ours, "central", "--workload", workload]
    return {
        "lichen": lichen,
        "central": central,
        "PEFT loop": loop,
        "lichen, bfloat16": [*lichen, "--dtype", "bfloat16"],
        "central, bfloat16": [*central, "--dtype", "bfloat16"],
        "PEFT loop, rows at full length": [*loop, "--padding", "max_length"],
        "PEFT loop, bfloat16": [*loop, "--dtype", "bfloat16"],
        "lichen, padded reference": [*lichen, "--padded", "--rounds", "2"],
        "pfl-research": [*pfl, "--rounds", "2", "--threads", "2"],
        "Flower, 2 actors": [*flower, "--rounds", "2", "--actors", "2", "--threads", "1"],
        "Flower, 1 actor": [*flower, "--rounds", "2", "--actors", "1", "--threads", "2"],
    }


def measure(name: str, workload: str, command: list[str]) -> dict[str, Any] | None:
    """One contestant's line, with the wall time of its whole command."""
    if not Path(command[0]).exists():
        print(f"{workload} {name}: no such environment, left out", flush=True)
        return None
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    wall = time.perf_counter() - begin
    if done.returncode:
        print(f"{workload} {name}: failed\n{done.stderr[-600:]}", flush=True)
        return None
    line = {**json.loads(done.stdout.strip().splitlines()[-1]), "name": name, "wall_s": round(wall, 1)}
    print(
        json.dumps({k: line.get(k) for k in ("workload", "name", "steady_s", "wall_s", "tokens_per_s", "peak_mib")}),
        flush=True,
    )
    return line


def table(lines: list[dict[str, Any]], workload: str) -> str:
    """Markdown, ratios to Lichen in float32."""
    mine = [line for line in lines if line["workload"] == workload]
    first = next(line for line in mine if line["name"] == "lichen")
    rows = ["| | round, s | tokens/s | lichen is | whole command, s | peak, MiB |", "|---|---:|---:|---:|---:|---:|"]
    for line in sorted(mine, key=lambda line: line["steady_s"]):
        times = line["steady_s"] / first["steady_s"]
        rows.append(
            f"| {line['name']} | {line['steady_s']:.1f} | {line['tokens_per_s']:.0f} | {times:.2f}× | "
            f"{line['wall_s']:.0f} ({len(line['round_s'])} rounds) | {line['peak_mib']:.0f} |"
        )
    return "\n".join(rows)


def plot(lines: list[dict[str, Any]], file: Path) -> None:
    """Bars of tokens a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads = sorted({line["workload"] for line in lines})
    figure, axes = pyplot.subplots(1, len(workloads), figsize=(6 * len(workloads), 4), squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=True):
        mine = sorted((line for line in lines if line["workload"] == workload), key=lambda line: line["tokens_per_s"])
        colours = ["#2a6f4e" if line["name"].startswith("lichen") else "#9a9a9a" for line in mine]
        axis.barh([line["name"] for line in mine], [line["tokens_per_s"] for line in mine], color=colours)
        axis.set_title(f"{workload}: real tokens a second")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=["chat", "reviews"], choices=["chat", "reviews"])
    parser.add_argument("--only", nargs="+", default=None, help="names of contestants, or their beginnings")
    parser.add_argument(
        "--peers", type=Path, default=Path("../peers"), help="where setup.sh made the peers' environments"
    )
    parser.add_argument("--show", choices=["chat", "reviews"], help="measure nothing, and print this table")
    asked = parser.parse_args()
    lines: list[dict[str, Any]] = json.loads(KEPT.read_text()) if KEPT.exists() else []
    if asked.show:
        print(table(lines, asked.show))
        return
    for workload in asked.workloads:
        with TemporaryDirectory() as folder:
            rows = Path(folder) / workload
            subprocess.run([PYTHON, str(HERE / "workload.py"), workload, str(rows)], check=True, capture_output=True)
            for name, command in commands(workload, rows, asked.peers.absolute()).items():
                if asked.only and not any(name.lower().startswith(only.lower()) for only in asked.only):
                    continue
                line = measure(name, workload, command)
                if line is not None:
                    lines = [x for x in lines if (x["workload"], x["name"]) != (workload, name)] + [line]
                    KEPT.write_text(json.dumps(lines, indent=1) + "\n")
    for workload in sorted({line["workload"] for line in lines}):
        print(f"\n{workload}\n\n{table(lines, workload)}")
    plot(lines, HERE / "throughput.png")


if __name__ == "__main__":
    main()
