"""Times a few real batches of each kind of work.

The works are the run's own, asked through the run's own engine, checkpoints and private state included; only
their batches pass a clock, and are fewer. What a batch takes is told by its tokens, and what a client takes
besides (its state on disk, its bytes, the server's fold) by the rest of the job's time. The first, small job of
a kind warms the machine up and is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, final

import torch

from lichen.algorithms.average import score
from lichen.core.contracts import Source
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.engines.local import LocalEngine
from lichen.present.trace import Event, Trace
from lichen.recipes.assemble.column import local_engine
from lichen.recipes.assemble.experiment import Experiment, grid_name, steps_of
from lichen.recipes.assemble.parts import algorithm_of, begin_of, client_tasks
from lichen.recipes.assemble.workload import Load, load_of
from lichen.recipes.plan.memory import Gauge
from lichen.recipes.plan.timing import Laps, Rate, Timed, clocked, spread
from lichen.recipes.plan.workload import Kind, evaluated

__all__ = ["Private", "Probe"]


@final
@dataclass(frozen=True, slots=True)
class _These:
    """A sampler that invites the same clients every time."""

    clients: tuple[int, ...]

    def invite(self, weight_N: torch.Tensor, seed: int) -> tuple[int, ...]:
        return self.clients


def _sized(engine: LocalEngine, job: Job) -> int:
    """Find the clients side by side before the clock starts, where the engine would find them in the job."""
    if not isinstance(engine.block_size, int):
        engine.block_size, client_task = engine.block_size(job, engine.client_tasks[job.work])
        engine.client_tasks = {**engine.client_tasks, job.work: client_task}
    return engine.block_size


@final
class Probe:
    """Times a bench's works in a folder of its own.

    Args:
        experiment: The recipe's.
        folder: For checkpoints and private state; the caller removes it.
        gauge: The device's memory.
        seconds: About how long a kind of work is timed.
    """

    def __init__(self, experiment: Experiment, folder: Path, gauge: Gauge, *, seconds: float) -> None:
        self.experiment, self.folder, self.gauge, self.budget = experiment, folder, gauge, seconds
        self._lr = experiment.recipe.optimizer.lr[0]

    def _few(self, steps: int) -> Experiment:
        fed = self.experiment.recipe.federation
        # What a client of FedKSeed sends is as long as it takes steps.
        whole = self._steps()
        changes = {
            "local_steps": whole if self.experiment.recipe.optimizer.name == "kseed" else min(steps, whole),
            "local_epochs": None,
        }
        recipe = self.experiment.recipe.model_copy(update={"federation": fed.model_copy(update=changes)})
        return replace(self.experiment, recipe=recipe)

    def _steps(self) -> int:
        """Steps of a client in a round, about."""
        return max(1, round(steps_of(self.experiment)))

    def _timed(self, engine: LocalEngine, laps: Laps, clients: int, go: Callable[[], object]) -> Timed:
        del laps[:]
        up, down, start = engine.bytes_up, engine.bytes_down, time.perf_counter()
        go()
        self.gauge.settle()
        whole = time.perf_counter() - start
        return Timed(
            load=sum((load for load, _ in laps), Load()),
            inside=sum(seconds for _, seconds in laps),
            whole=whole,
            clients=clients,
            up=round((engine.bytes_up - up) / clients),
            down=round((engine.bytes_down - down) / clients),
            largest=max((load.units for load, _ in laps), default=0.0),
        )

    def source(self, *, steps: int) -> Source:
        """Training batches of so many steps."""
        return client_tasks(self._few(steps))[f"train {grid_name(self._lr)}"].source

    def block(self, kind: Literal["train", "alone"], clients: tuple[int, ...]) -> int:
        """How many of these clients stand side by side."""
        engine = local_engine(self.experiment, ClientStore(self.folder / "none" / "clients"))
        return min(len(clients), _sized(engine, self._job(f"{kind} {grid_name(self._lr)}", clients, 0)))

    def train(self, clients: tuple[int, ...], *, steps: int, rounds: int = 1) -> Timed:
        """Federated rounds of these clients, with so many local steps at most."""
        experiment, home = self._few(steps), self.folder / f"train-{len(clients)}-{steps}-{rounds}"
        engine = local_engine(experiment, ClientStore(home / "clients"))
        _sized(engine, self._job(f"train {grid_name(self._lr)}", clients, 0))
        laps, trace = clocked(engine, self.gauge), Trace(home)
        algorithm = replace(algorithm_of(experiment, self._lr, rounds), sampler=_These(clients), valid=None)

        def go() -> None:
            run(
                algorithm,
                engine,
                lambda: begin_of(experiment, self._lr),
                rounds=rounds,
                seed=experiment.recipe.seed,
                checkpoint=home / "server.safetensors",
                observers=[lambda report: trace(Event(column="", report=report, total_rounds=rounds, grid=""))],
            )

        return self._timed(engine, laps, rounds * len(clients), go)

    def own(self) -> int:
        """Bytes of one version of a client's private state, of those that were trained."""
        files = (f for f in self.folder.glob("train-*/clients/**/*.safetensors"))
        return max((f.stat().st_size for f in files), default=0)

    def trained(self, clients: tuple[int, ...]) -> Timed:
        """Federated rounds of these clients for about the time allowed; the first only warms up, if there is time."""
        first = self.train(clients, steps=1)
        if first.inside > self.budget:
            return first
        steps, rounds = self._afford(first)
        timed = self.train(clients, steps=steps, rounds=rounds)
        return replace(timed, largest=max(first.largest, timed.largest))

    def luck(self, clients: tuple[int, ...], timed: Timed) -> float:
        """How much larger than the largest timed batch that of some sixteen rounds is, at least 1.

        Rows are drawn, and a run draws many more of them than are timed: its memory is that of its
        unluckiest batch.
        """
        source, rounds = self.source(steps=self._steps()), self.experiment.recipe.federation.rounds
        drawn = []
        for r in range(min(16, rounds)):
            each = [[load_of(batch).units for batch in source.batches((c,), r)] for c in clients]
            drawn += [sum(step) for step in zip_longest(*each, fillvalue=0.0)]
        return max(1.0, max(drawn, default=0.0) / max(1.0, timed.largest))

    def _afford(self, first: Timed) -> tuple[int, int]:
        """``(steps, rounds)`` that fit into the time allowed, by a first round of one step."""
        wanted = self._steps()
        steps = max(1, min(wanted, int(self.budget / max(first.inside, 1e-6))))
        return steps, max(1, min(4, int(self.budget / max(first.whole + (steps - 1) * first.inside, 1e-6))))

    def scored(self, unit: float) -> Timed:
        """Shared tensors on some clients' test rows, evenly over the roster.

        Args:
            unit: A guess of the seconds a token takes, to choose how many.
        """
        some = self._affordable(unit)
        engine = local_engine(self.experiment, ClientStore(self.folder / "none"))
        laps = clocked(engine, self.gauge, every=self._thin(unit))
        job = self._job("test", some, 0)
        _sized(engine, job)
        return self._timed(engine, laps, len(some), lambda: score(engine, job))

    def _affordable(self, unit: float, among: Sequence[int] | None = None) -> tuple[int, ...]:
        everyone = range(len(self.experiment.train)) if among is None else among
        pilot = spread(everyone, 8)
        load = evaluated(self.experiment.evaluating(self.experiment.test), pilot)
        each = unit * load.units / len(pilot)
        return spread(everyone, max(2, int(self.budget / max(each, 1e-9))))

    def _thin(self, unit: float) -> int:
        """Every how many batches of a single client, who cannot be thinned otherwise."""
        if len(self.experiment.test) > 1:
            return 1
        load = evaluated(self.experiment.evaluating(self.experiment.test), (0,))
        return max(1, int(unit * load.units / self.budget))

    def _job(self, work: str, clients: tuple[int, ...], version: int) -> Job:
        experiment = self.experiment
        return Job(
            work=work,
            shared=experiment.start,
            version=version,
            clients=clients,
            seed=version,
            base=experiment.model.base,
            settings={"lr_scale": 1.0} if work.startswith(("train ", "alone lr")) else {},
        )

    def private(self, clients: tuple[int, ...], like: Mapping[Kind, Rate], name: Literal["alone", "pooled"]) -> Private:
        """Training alone as the run does it: train, keep the best, train again, keep, score.

        Args:
            clients: A full block, of which as many are taken as there is time for.
            like: Rates of ``train`` and ``score``, taken over where a few of many clients are not a full block.
            name: Whose rates these are.
        """
        unit, store, work = like["score"].unit, ClientStore(self.folder / name), f"alone {grid_name(self._lr)}"
        step = evaluated(self.source(steps=1), clients[:1]) if len(clients) > 1 else Load()
        some = spread(clients, max(2, int(self.budget / max(1e-9, like["train"].unit * step.units))))
        engine = local_engine(self._few(1), store)
        _sized(engine, self._job(work, some, 0))
        laps = clocked(engine, self.gauge, every=self._thin(unit))
        first = self._timed(engine, laps, len(some), lambda: score(engine, self._job(work, some, 0)))
        some = self._affordable(unit, some)
        score(engine, self._job("alone.valid", some, 1))
        longer = local_engine(self._few(self._afford(first)[0]), store)
        more, room = clocked(longer, self.gauge, every=self._thin(unit)), longer.block_size

        def ask(work: str, version: int, kind: Kind) -> Rate:
            job, longer.block_size = self._job(work, some, version), room
            _sized(longer, job)
            rate = Rate.of(self._timed(longer, more, len(some), lambda: score(longer, job)))
            return replace(rate, unit=like[kind].unit) if len(some) < len(clients) else rate

        trained, kept = ask(work, 2, "train"), ask("alone.valid", 3, "score")
        tested = ask("alone.test", 4, "score")
        rates: dict[Kind, Rate] = (
            {"alone": trained, "alone.keep": kept, "alone.score": tested}
            if name == "alone"
            else {"pooled": trained, "pooled.keep": kept, "pooled.score": tested}
        )
        largest = max((f.stat().st_size for f in store.folder.rglob("*.safetensors")), default=0)
        return Private(rates=rates, bytes=3 * largest)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Private:
    """Training alone, measured.

    Attributes:
        rates: Of training, keeping and scoring.
        bytes: Private state of one client on disk: the store keeps the last three versions.
    """

    rates: dict[Kind, Rate]
    bytes: int
