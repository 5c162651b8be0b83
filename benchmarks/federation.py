"""What a federation's network costs: an empty round, long bytes, memory, and the time in which nothing happens.

All processes run on this machine: Lichen's and NVFlare's at the server, and two more for each site. Everything is told
as a ratio of two things that were taken in turn in one run, or as a share of one core.

======  ==============================================================================================================
round   a job with nothing to train, one client a site, over an echo of the job's bytes by as many sites side by side
bytes   a payload up and down again through ``ask_long`` and ``Pieces``, over pieces of 16 MiB that are echoed one
        after another, and over a plain gRPC stream with the certificates of the same kits
memory  by how much each process rises meanwhile above what it held before, over the payload
idle    time of the processor over a minute in which nobody asks, and bytes on the wire, counted by a relay
======  ==============================================================================================================

``python benchmarks/federation.py --take`` takes all of it, or the part that is named, into ``results/federation.json``,
seven minutes; without, one of the words above prints its table from there. ``busy`` tells whose work long bytes are.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from free_port import free_port

RESULT = Path(__file__).parent / "results" / "federation.json"
END = Path(__file__).with_name("federation_end.py")
COUNTS = (2, 8, 16)
SIZES = {"100 MiB": 100 << 20, "1 GiB": 1 << 30}
TURNS = {"100 MiB": 5, "1 GiB": 2}
ROUNDS, WARM = 30, 5
MINUTE = 60.0
NAMES = [f"site-{number:02}" for number in range(max(COUNTS))]
PROCESSES = ("Lichen, server", "NVFlare, server", "NVFlare, site", "Lichen, site")
TICK = os.sysconf("SC_CLK_TCK")


class Federation:
    """A federation on this machine: its kits, its server's end, and sites that are started and ended."""

    def __init__(self, folder: Path, transport: Any = "nvflare", names: Sequence[str] = NAMES) -> None:
        from lichen.federation.kits.make import new
        from lichen.federation.transports.choose import open_server

        self.folder, self.port, self.transport = folder, free_port(), transport
        new(folder / "trial", name="trial", host="localhost", port=self.port, sites=names, transport=transport)
        self.sites: Any = open_server(folder / "trial" / "server", say=print)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def startup(self, kit: str) -> Path:
        """The folder with the certificates of a kit."""
        return self.folder / "trial" / kit / "startup"

    def start(self, names: Sequence[str], port: int) -> None:
        """Start sites that reach the server at a port, and wait until it sees them all."""
        for name in names:
            if self.transport == "grpc":  # no table sends it through the relay
                self.processes[name] = self.end(name)
                continue
            file = self.startup(f"kits/{name}") / "fed_client.json"
            body = json.loads(file.read_text(encoding="utf-8"))
            body["servers"][0]["service"]["target"] = f"localhost:{port}"
            file.write_text(json.dumps(body), encoding="utf-8")
            self.processes[name] = self.end(name)
        deadline = time.monotonic() + 300
        while not set(names) <= set(self.sites.seen()):
            assert time.monotonic() < deadline, "the sites do not come"
            time.sleep(0.2)
        with ThreadPoolExecutor(len(names)) as pool:  # each answers once torch is there
            list(pool.map(lambda name: self.sites.ask(name, "echo", b"", 300), names))

    def end(self, name: str) -> subprocess.Popen[bytes]:
        """Start a site."""
        return end("site", self.folder / "state" / name, self.folder / "trial" / "kits" / name)

    def stop(self) -> None:
        """End all sites."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        while self.sites.seen():
            time.sleep(0.2)
        self.processes = {}

    def pids(self) -> dict[str, list[int]]:
        """The processes of each kind."""
        assert self.sites.parent.process is not None
        mine = [process.pid for process in self.processes.values()]
        theirs = [child for pid in mine for child in children(pid)]
        return dict(zip(PROCESSES, ([os.getpid()], [self.sites.parent.process.pid], theirs, mine), strict=True))


def end(*words: object) -> subprocess.Popen[bytes]:
    """Start one of the other ends."""
    from lichen.core.children import bound_command, bound_environment

    command = bound_command([sys.executable, str(END), *map(str, words)])
    return subprocess.Popen(command, env=bound_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text(encoding="utf-8").split()]


@contextmanager
def federation(transport: str = "nvflare", names: Sequence[str] = NAMES) -> Iterator[Federation]:
    """One that ends with the block."""
    with tempfile.TemporaryDirectory(prefix="lichen-", ignore_cleanup_errors=True) as folder:
        made = Federation(Path(folder), transport, names)
        try:
            yield made
        finally:
            made.stop()
            made.sites.close()


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- what is taken -----------------------------------------------------------------------------------------------


def rounds(made: Federation, count: int) -> dict[str, Any]:
    """Empty rounds and echoes in turn, of so many sites."""
    from lichen.core.message import Job, pack_job
    from lichen.core.wire.shared import Shared
    from lichen.engines.federated import FederatedEngine

    names, took = NAMES[:count], {"round": list[float](), "echo": list[float]()}
    everybody = Job(work="nothing", shared=Shared(), version=0, clients=tuple(range(count)), seed=0)
    body = pack_job(everybody)
    with FederatedEngine(made.sites, NAMES.__getitem__) as engine, ThreadPoolExecutor(count) as pool:

        def one_round(version: int) -> None:
            replies = list(engine.replies([engine.submit(replace(everybody, version=version))]))
            assert len(replies) == count
            assert all(reply.message is not None for reply in replies), replies[0].error

        def echo() -> None:
            assert all(one == body for one in pool.map(lambda name: made.sites.ask(name, "echo", body, 60), names))

        for version in range(ROUNDS + WARM):
            pair = seconds(lambda at=version: one_round(at)), seconds(echo)
            if version >= WARM:
                took["round"].append(pair[0])
                took["echo"].append(pair[1])
    middle = {name: statistics.median(some) for name, some in took.items()}
    return {**took, "ratio": middle["round"] / middle["echo"], "bytes": len(body)}


def long_bytes(made: Federation, size: int, turns: int, plain: int) -> dict[str, Any]:
    """A payload up and down, in turn through pieces, through the raw transport and over a plain stream."""
    from federation_end import send_and_take

    from lichen.engines.remote.pieces import PIECE, ask_long

    site, payload = NAMES[0], os.urandom(size)
    took = {"pieces": list[float](), "raw": list[float](), "plain": list[float]()}
    pids, busy = one_each(made), dict.fromkeys(one_each(made), 0.0)

    def pieces() -> None:
        before = {name: processor(pid) for name, pid in pids.items()}
        assert ask_long(made.sites, site, "long", payload, 600) == payload
        for name, pid in pids.items():
            busy[name] += processor(pid) - before[name]

    def raw() -> None:
        for at in range(0, size, PIECE):
            made.sites.ask(site, "echo", payload[at : at + PIECE], 600)

    def stream() -> None:
        send_and_take(made.startup(f"kits/{site}"), plain, size)

    for _turn in range(turns):
        for name, work in (("pieces", pieces), ("raw", raw), ("plain", stream)):
            took[name].append(seconds(work))
            gc.collect()
    middle = {name: statistics.median(some) for name, some in took.items()}
    ratios = {"over_raw": middle["pieces"] / middle["raw"], "over_plain": middle["pieces"] / middle["plain"]}
    return {**took, **ratios, "busy": {name: one / sum(busy.values()) for name, one in busy.items()}}


def memory(made: Federation, size: int) -> dict[str, float]:
    """By how much each process rises above what it held, over the payload."""
    from lichen.engines.remote.pieces import ask_long

    gc.collect()
    pids = one_each(made)
    for pid in pids.values():
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")
    before = {name: of_status(pid, "VmRSS") for name, pid in pids.items()}
    ask_long(made.sites, NAMES[0], "long", os.urandom(size), 600)
    return {name: (of_status(pid, "VmHWM") - before[name]) / size for name, pid in pids.items()}


def one_each(made: Federation) -> dict[str, int]:
    """A process of each kind: those of the server, and those of the first site."""
    return {name: some[0] for name, some in made.pids().items()}


def of_status(pid: int, what: str) -> int:
    """Bytes, of a process's status."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{what}:")).split()[1])


def processor(pid: int) -> float:
    """Seconds of the processor that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, words[11:13])) / TICK


def idle(made: Federation, passing: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Shares of a core, by kind of process and each, and bytes of a site in a minute."""

    def used() -> dict[str, list[float]]:
        return {name: [processor(pid) for pid in some] for name, some in made.pids().items()}

    def passed() -> list[int]:
        assert passing.stdin is not None
        assert passing.stdout is not None
        passing.stdin.write(b"\n")
        passing.stdin.flush()
        return list(map(int, passing.stdout.readline().split()))

    before, at, start = used(), passed(), time.perf_counter()
    time.sleep(MINUTE)
    after, then, took = used(), passed(), time.perf_counter() - start
    shares = {name: [(y - x) / took for x, y in zip(before[name], after[name], strict=True)] for name in before}
    count = len(made.processes)
    up, down = ((b - a) * 60 / took / count for a, b in zip(at, then, strict=True))
    return {"share": shares, "bytes_up": up, "bytes_down": down}


def take(parts: Sequence[str]) -> dict[str, Any]:
    """What each of these tables tells."""
    found: dict[str, Any] = {part: {} for part in parts}
    with federation() as made:
        made.start(NAMES[:1], made.port)
        for name, size in SIZES.items() if "memory" in parts else ():
            note(found, "memory", name, memory(made, size))
        plain_port = free_port()
        plain = end("stream", made.startup("server"), plain_port)
        for name, size in SIZES.items() if "bytes" in parts else ():
            note(found, "bytes", name, long_bytes(made, size, TURNS[name], plain_port))
        plain.kill()
        for count in COUNTS if "round" in parts else ():
            made.start(NAMES[len(made.processes) : count], made.port)
            note(found, "round", str(count), rounds(made, count))
        port = free_port()
        passing = end("relay", port, made.port)
        for count in (1, max(COUNTS)) if "idle" in parts else ():
            made.stop()
            made.start(NAMES[:count], port)
            time.sleep(10)
            note(found, "idle", str(count), idle(made, passing))
        passing.kill()
    return found


def note(found: dict[str, Any], part: str, name: str, one: dict[str, Any]) -> None:
    """Keep and print what was found."""
    found[part][name] = {"date": f"{date.today()}", "load": os.getloadavg()[0], **one}
    print(part, name, json.dumps(one), flush=True)


# --- tables ------------------------------------------------------------------------------------------------------


def table_of_rounds(found: dict[str, Any]) -> None:
    """Empty rounds."""
    print("| sites | empty round, ms | echo, ms | round / echo |\n|---:|---:|---:|---:|")
    for count, one in found["round"].items():
        middle = [1000 * statistics.median(one[name]) for name in ("round", "echo")]
        print(f"| {count} | {middle[0]:.0f} | {middle[1]:.0f} | {one['ratio']:.2f} |")


def table_of_bytes(found: dict[str, Any]) -> None:
    """Long bytes."""
    print(
        "| payload, both ways | pieces, MiB/s | pieces / raw transport | pieces / plain stream |\n|---|---:|---:|---:|"
    )
    for name, one in found["bytes"].items():
        speed = 2 * SIZES[name] / (1 << 20) / statistics.median(one["pieces"])
        print(f"| {name} | {speed:.0f} | {one['over_raw']:.2f} | {one['over_plain']:.1f} |")


def table_of_busy(found: dict[str, Any]) -> None:
    """Who works on long bytes."""
    print(f"| share of the processor's time | {' | '.join(found['bytes'])} |\n|---|{'---:|' * len(found['bytes'])}")
    for process in PROCESSES:
        shares = (one["busy"][process] for one in found["bytes"].values())
        print(f"| {process} | {' | '.join(f'{share:.0%}' for share in shares)} |")


def table_of_memory(found: dict[str, Any]) -> None:
    """Peaks over the payload."""
    print(f"| peak above idle / payload | {' | '.join(found['memory'])} |\n|---|{'---:|' * len(found['memory'])}")
    for process in PROCESSES:
        print(f"| {process} | {' | '.join(f'{one[process]:.2f}' for one in found['memory'].values())} |")


def table_of_idle(found: dict[str, Any]) -> None:
    """Nothing to do."""
    heads = (f"{count} site{'s' * (count != '1')}" for count in found["idle"])
    print(f"| idle for a minute | {' | '.join(heads)} |")
    print(f"|---|{'---:|' * len(found['idle'])}")
    for process in PROCESSES:
        shares = (one["share"][process] for one in found["idle"].values())
        told = " | ".join(f"{statistics.mean(some):.2%}" for some in shares)
        print(f"| {process}, share of a core | {told} |")
    for way, name in (("up", "site to server"), ("down", "server to site")):
        told = " | ".join(f"{one[f'bytes_{way}']:,.0f}" for one in found["idle"].values())
        print(f"| {name}, bytes a minute and site | {told} |")


PARTS = ("round", "bytes", "memory", "idle")
TABLES = {
    "round": table_of_rounds,
    "bytes": table_of_bytes,
    "busy": table_of_busy,
    "memory": table_of_memory,
    "idle": table_of_idle,
}


def main() -> None:
    """Take, or print."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("table", nargs="?", choices=TABLES, help="all if none is named")
    ask.add_argument("--take", action="store_true", help="take the numbers anew")
    asked = ask.parse_args()
    if asked.take:
        kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        kept |= take([asked.table] if asked.table else list(PARTS))
        RESULT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    for name in [asked.table] if asked.table else TABLES:
        TABLES[name](found)


if __name__ == "__main__":
    main()
