"""How long five sites take to 88 % of digits, one of them ten times slower: rounds for all, FedBuff, FedAsync.

Each site is a process of its own, over NVFlare's network on this machine, with one client's digits. Before each
training a site sleeps half a second, the slow one five. Time is the wall's, of training alone; after each step the
server's model is scored on all validation rows, and that time is taken off.

``python benchmarks/asynchrony.py`` prints the table of the cells in ``results/asynchrony``. With ``--take`` it runs
those that are missing first, half a minute to four minutes each. ``same`` compares bytes instead: with a buffer of the
whole round, and nobody slow, the states after four steps are those of synchronous rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from free_port import free_port

RESULTS = Path(__file__).parent / "results" / "asynchrony"
NAMES = ("a", "b", "c", "d", "slow")
SLEEPS = {**dict.fromkeys(NAMES, 0.5), "slow": 5.0}
SEEDS = (0, 1, 2)
TARGET, MOST = 0.88, 240.0
BUFFERED = {"kind": "buffered", "concurrency": 5}
METHODS: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "FedBuff, K = 2": {**BUFFERED, "arrivals": 2},
    "FedAsync, α = 0.6": {**BUFFERED, "arrivals": 1, "mixing": 0.6},
    "whole buffer": {**BUFFERED, "arrivals": 5},
}


def experiment(seed: int, method: str) -> Any:
    """The recipe's, as server and sites open it."""
    from lichen.recipes.assemble.open import open_recipe
    from lichen.recipes.schema.read import read_recipe

    words = [
        f"seed={seed}",
        "data.partition={by: dirichlet, clients: 5, alpha: 1.0}",
        "data.valid=0.2",
        "optimizer={name: sgd, lr: [0.1], momentum: 0.9}",
        "federation={rounds: 400, local_steps: 8, batch_size: 16}",
        "compare={baselines: [], metric: accuracy}",
        "engine.name=spawned",
        f"federation.schedule={json.dumps(METHODS[method])}",
    ]
    return open_recipe(read_recipe("digits", words)).experiment


def site(name: str, folder: Path, kit: Path) -> None:
    """Answer the server until the process is ended; a private state's name is ``<seed> <method> <sleeps>``."""
    from lichen.federation.network import SiteEnd

    made: Future[Any] = Future()
    with SiteEnd(kit, lambda kind, body: made.result()(kind, body), say=lambda line: print(line, flush=True)):
        import torch

        from lichen.core.message import Job
        from lichen.core.store import ClientStore
        from lichen.engines.remote.pieces import Pieces
        from lichen.engines.remote.talks import Talks
        from lichen.engines.remote.worker import SiteWorker
        from lichen.recipes.assemble.parts import client_tasks

        torch.set_num_threads(1)

        def talks(state: str) -> Talks:
            seed, number, sleeps = map(int, state.split("."))

            def slept(job: Job, frames: Any) -> Any:
                time.sleep(SLEEPS[name] * sleeps)
                return frames

            own = experiment(seed, list(METHODS)[number])
            return Talks(client_tasks(own), ClientStore(folder / state), around=slept)

        worker = SiteWorker(talks)
        made.set_result(Pieces(worker.answer).answer)
        worker.work()


@contextmanager
def network() -> Iterator[Any]:
    """The transport, with all sites there."""
    from lichen.core.children import bound_command, bound_environment
    from lichen.federation.kits.make import new
    from lichen.federation.network import NetworkSites

    with tempfile.TemporaryDirectory(prefix="lichen-", ignore_cleanup_errors=True) as made:
        folder, processes = Path(made), list[subprocess.Popen[bytes]]()
        new(folder / "trial", name="trial", host="localhost", port=free_port(), sites=NAMES)
        sites = NetworkSites(folder / "trial" / "server", say=print)
        try:
            for name in NAMES:
                words = [sys.executable, __file__, "site", name, folder / "state" / name, folder / "trial/kits" / name]
                command = bound_command([str(word) for word in words])
                processes.append(subprocess.Popen(command, env=bound_environment()))
            end = time.monotonic() + 300
            while not set(NAMES) <= set(sites.seen()):
                assert time.monotonic() < end, "the sites do not come"
                time.sleep(0.2)
            yield sites
        finally:
            for process in processes:
                process.kill()
                process.wait()
            sites.close()


def steps(sites: Any, seed: int, method: str, sleeps: bool = True) -> Iterator[tuple[float, float, Any, Any]]:
    """After each step: seconds of training so far, accuracy on all validation rows, the report, the state."""
    from lichen.clients.evaluation.metrics import accuracy
    from lichen.core.collecting.collect import drain
    from lichen.core.message import Job
    from lichen.core.seeds import derive
    from lichen.core.store import ClientStore
    from lichen.engines.federated import FederatedEngine
    from lichen.engines.local import LocalEngine
    from lichen.recipes.assemble.parts import algorithm_of, client_tasks

    own = experiment(seed, method)
    algorithm = replace(algorithm_of(own.server, 0.1, 400), valid=None)
    judge = LocalEngine(client_tasks(own), ClientStore(Path(tempfile.gettempdir())), block_size=1)
    state, spent = algorithm.init(own.start), 0.0
    name = f"{seed}.{list(METHODS).index(method)}.{int(sleeps)}"
    with FederatedEngine(sites, NAMES.__getitem__, state=name) as engine:
        opening = Job(work="valid", shared=state.shared, version=0, clients=tuple(range(5)), seed=0)
        list(drain(engine, opening))  # so that no site is still loading
        while True:
            start = time.perf_counter()
            state, report = algorithm.round(state, engine, derive(seed, "round", state.round))
            spent += time.perf_counter() - start
            job = Job(work="valid", shared=state.shared, version=0, clients=tuple(range(5)), seed=0)
            confusion = sum(message.metrics["confusion"].sum(0) for message in drain(judge, job))
            yield spent, accuracy(confusion.sum(0) if confusion.dim() > 2 else confusion), report, state


def cell(sites: Any, seed: int, method: str) -> dict[str, Any]:
    """Until the target, or the most time."""
    ages, trainings, order = list[float](), 0, list[list[int]]()
    for spent, right, report, _state in steps(sites, seed, method):
        trainings += report.attendance.arrived
        ages.append(report.metrics.get("age", 0.0))
        order.append([client for client, _ in report.attendance.order])
        if right >= TARGET or spent > MOST:
            break
    return {
        "method": method,
        "seed": seed,
        "seconds": spent if right >= TARGET else None,
        "accuracy": right,
        "steps": len(ages),
        "trainings": trainings,
        "age": statistics.mean(ages),
        "slow": sum(client == 4 for some in order for client in some) if any(order) else len(ages),
    }


def table() -> str:
    """What the cells say, a line a method."""
    lines = [
        "| method | seconds to 88 % | steps | trainings | of the slow site | mean age of answers |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method in list(METHODS)[:3]:
        cells = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
        cells = [one for one in cells if one["method"] == method]
        if not cells:
            continue
        parts = [[one[key] for one in cells] for key in ("seconds", "steps", "trainings", "slow", "age")]
        assert None not in parts[0], f"{method} did not get there"
        shown = [f"{statistics.mean(some):.1f}" for some in parts]
        spread = statistics.stdev(parts[0]) if len(cells) > 1 else 0.0
        lines.append(f"| {method} | {shown[0]} ± {spread:.1f} | {' | '.join(shown[1:])} |")
    return "\n".join(lines)


def same(sites: Any) -> bool:
    """Whether four steps of a whole buffer have the bytes of four synchronous rounds."""
    found = []
    for method in ("synchronous", "whole buffer"):
        made = steps(sites, 0, method, sleeps=False)
        state = [next(made)[-1] for _ in range(4)][-1]
        made.close()
        found.append({name: x.numpy().tobytes() for name, x in state.shared.flat().items()})
    return found[0] == found[1]


def main(words: list[str]) -> None:
    """Run what is missing, and print."""
    if words[:1] == ["site"]:
        return site(words[1], Path(words[2]), Path(words[3]))
    if words == ["same"]:
        with network() as sites:
            print("the bytes are the same" if same(sites) else "the bytes differ")
        return None
    files = {
        (seed, method): RESULTS / f"{number}-{seed}.json"
        for seed in SEEDS
        for number, method in enumerate(list(METHODS)[:3])
    }
    missing = {key: file for key, file in files.items() if words == ["--take"] and not file.exists()}
    if missing:
        RESULTS.mkdir(parents=True, exist_ok=True)
        with network() as sites:
            for (seed, method), file in missing.items():
                file.write_text(json.dumps(cell(sites, seed, method), indent=1, ensure_ascii=False) + "\n")
                print(file.read_text(), flush=True)
    print(table())
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
