"""The two transports of a federation in turn: short and long bytes, an empty round, and the memory of an end.

Two sites each, all processes on this machine, with the certificates and the encryption of real kits. An end is what
connects a kit, without torch: of NVFlare two processes, over gRPC one.

``python benchmarks/transports.py --take`` takes the numbers into ``results/transports.json``, four minutes; without, it
prints the table from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from free_port import free_port

from federation import NAMES, SIZES, end, federation, rounds, seconds

RESULT = Path(__file__).parent / "results" / "transports.json"


def bare_ends(transport: Any) -> dict[str, float]:
    """MiB of memory of a server's end and of a site's, without torch, all their processes together."""
    from lichen.federation.kits.make import new

    with tempfile.TemporaryDirectory(prefix="lichen-", ignore_cleanup_errors=True) as folder:
        trial = Path(folder) / "trial"
        new(trial, name="trial", host="localhost", port=free_port(), sites=NAMES[:1], transport=transport)
        ends = {"server": end("bare", trial / "server", "-"), "site": end("bare", trial / "kits" / NAMES[0], "-")}
        time.sleep(20)
        found = {}
        for name, one in ends.items():
            parent = psutil.Process(one.pid)
            found[name] = sum(each.memory_info().rss for each in (parent, *parent.children())) / (1 << 20)
        for one in ends.values():
            one.kill()
            one.wait()
    return found


def beside() -> dict[str, Any]:
    """Both transports in turn, two sites each: an empty round, an echo of 8 KiB, 100 MiB up and down, and memory."""
    from lichen.engines.remote.pieces import ask_long

    payload, small = os.urandom(SIZES["100 MiB"]), os.urandom(8192)
    found: dict[str, Any] = {"echo": {}, "long": {}, "round": {}, "memory": {}}
    bare = {name: bare_ends(name) for name in ("nvflare", "grpc")}
    with federation("nvflare", NAMES[:2]) as one, federation("grpc", NAMES[:2]) as other:
        both = {"nvflare": one, "grpc": other}
        for name, made in both.items():
            made.start(NAMES[:2], made.port)
            found["memory"][name] = bare[name]
            found["echo"][name], found["long"][name] = [], []
        for _turn in range(100):
            for name, made in both.items():
                found["echo"][name].append(seconds(lambda at=made: at.sites.ask(NAMES[0], "echo", small, 60)))
        for _turn in range(3):
            for name, made in both.items():
                found["long"][name].append(seconds(lambda at=made: ask_long(at.sites, NAMES[0], "long", payload, 600)))
        for _turn in range(2):
            for name, made in both.items():
                found["round"].setdefault(name, []).extend(rounds(made, 2)["round"])
    return found


def table_of_beside(found: dict[str, Any]) -> None:
    """The two transports."""
    print("| | NVFlare | gRPC | gRPC / NVFlare |\n|---|---:|---:|---:|")
    one = found
    rows = [
        *(
            (f"{what}, ms", [1000 * statistics.median(one[key][name]) for name in ("nvflare", "grpc")])
            for what, key in (
                ("8 KiB and back", "echo"),
                ("empty round of two sites", "round"),
                ("100 MiB and back", "long"),
            )
        ),
        *(
            (f"memory of the {what}'s end, MiB", [one["memory"][name][what] for name in ("nvflare", "grpc")])
            for what in ("server", "site")
        ),
    ]
    for what, (old, new) in rows:
        print(f"| {what} | {old:,.1f} | {new:,.1f} | {new / old:.2f} |")


def main() -> None:
    """Take, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", action="store_true", help="take the numbers anew")
    if parser.parse_args().take:
        found = {"date": f"{date.today()}", "load": os.getloadavg()[0], **beside()}
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table_of_beside(json.loads(RESULT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
