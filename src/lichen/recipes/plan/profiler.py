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

from lichen.algorithms.scores import score
from lichen.core.contracts.client import Source
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.wrapping import with_innermost
from lichen.engines.local import LocalEngine
from lichen.present.trace import Event, Trace
from lichen.recipes.assemble.column import admission_of, local_engine
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, initial_shared
from lichen.recipes.assemble.sides.server import steps_per_round
from lichen.recipes.assemble.workload import Workload, workload_of
from lichen.recipes.plan.memory import MemoryMeter
from lichen.recipes.plan.timing import Rate, Timed, Timings, evenly_spaced, with_timing
from lichen.recipes.plan.workload import Kind, evaluated
from lichen.server.mean import Mean

__all__ = ["Private", "Profiler"]


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
class Profiler:
    """Times an experiment's works in a folder of its own.

    Args:
        experiment: The recipe's.
        folder: For checkpoints and private state; the caller removes it.
        meter: The device's memory.
        seconds: About how long a kind of work is timed.
    """

    def __init__(self, experiment: Experiment, folder: Path, meter: MemoryMeter, *, seconds: float) -> None:
        self.experiment, self.folder, self.meter, self.budget = experiment, folder, meter, seconds
        self._lr = experiment.recipe.optimizer.lr[0]

    def _with_steps(self, steps: int) -> Experiment:
        fed = self.experiment.recipe.federation
        # What a client of FedKSeed sends is as long as it takes steps.
        whole = self._steps()
        changes = {
            "local_steps": whole if self.experiment.recipe.method.grows_by_steps else min(steps, whole),
            "local_epochs": None,
        }
        # So few steps hold no warm-up that is counted in them.
        optimizer = self.experiment.recipe.optimizer.model_copy(update={"warmup": 0})
        recipe = self.experiment.recipe.model_copy(
            update={"federation": fed.model_copy(update=changes), "optimizer": optimizer}
        )
        return self.experiment.with_server(recipe=recipe)

    def _steps(self) -> int:
        """Steps of a client in a round, about."""
        return max(1, round(steps_per_round(self.experiment.server)))

    def _timed(self, engine: LocalEngine, timings: Timings, clients: int, go: Callable[[], object]) -> Timed:
        del timings[:]
        up, down, start = engine.bytes_up, engine.bytes_down, time.perf_counter()
        go()
        self.meter.settle()
        whole = time.perf_counter() - start
        return Timed(
            workload=sum((workload for workload, _ in timings), Workload()),
            inside=sum(seconds for _, seconds in timings),
            whole=whole,
            clients=clients,
            up=round((engine.bytes_up - up) / clients),
            down=round((engine.bytes_down - down) / clients),
            largest=max((workload.units for workload, _ in timings), default=0.0),
        )

    def source(self, *, steps: int) -> Source:
        """Training batches of so many steps."""
        return client_tasks(self._with_steps(steps))[f"train {lr_name(self._lr)}"].source

    def block(self, kind: Literal["train", "alone"], clients: tuple[int, ...]) -> int:
        """How many of these clients stand side by side."""
        engine = local_engine(self.experiment, ClientStore(self.folder / "none" / "clients"))
        return min(len(clients), _sized(engine, self._job(f"{kind} {lr_name(self._lr)}", clients, 0)))

    def train(self, clients: tuple[int, ...], *, steps: int, rounds: int = 1) -> Timed:
        """Federated rounds of these clients, with so many local steps at most."""
        experiment, run_folder = self._with_steps(steps), self.folder / f"train-{len(clients)}-{steps}-{rounds}"
        engine = local_engine(experiment, ClientStore(run_folder / "clients"))
        _sized(engine, self._job(f"train {lr_name(self._lr)}", clients, 0))
        timings, trace = with_timing(engine, self.meter), Trace(run_folder)
        algorithm = algorithm_of(experiment.server, self._lr, rounds)
        private = experiment.recipe.noised
        if private is not None and private.unit == "client":  # what is timed is thrown away, and spends nothing
            algorithm = replace(algorithm, aggregator=with_innermost(algorithm.aggregator, Mean("uniform")))
        algorithm = replace(
            algorithm,
            sampler=_These(clients),
            valid=None,
            admission=admission_of(experiment.server, experiment.clients.auxiliary),
        )

        def go() -> None:
            run(
                algorithm,
                engine,
                lambda: initial_shared(experiment.server, self._lr),
                rounds=rounds,
                seed=experiment.recipe.seed,
                checkpoint=run_folder / "server.safetensors",
                observers=[lambda report: trace(Event(column="", report=report, total_rounds=rounds, grid=""))],
            )

        return self._timed(engine, timings, rounds * len(clients), go)

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
        totals = []
        for r in range(min(16, rounds)):
            each = [[workload_of(batch).units for batch in source.batches((c,), r)] for c in clients]
            totals += [sum(step) for step in zip_longest(*each, fillvalue=0.0)]
        return max(1.0, max(totals, default=0.0) / max(1.0, timed.largest))

    def _afford(self, first: Timed) -> tuple[int, int]:
        """``(steps, rounds)`` that fit into the time allowed, by a first round of one step."""
        target = self._steps()
        steps = max(1, min(target, int(self.budget / max(first.inside, 1e-6))))
        return steps, max(1, min(4, int(self.budget / max(first.whole + (steps - 1) * first.inside, 1e-6))))

    def scored(self, unit: float) -> Timed:
        """Shared tensors on some clients' test rows, evenly over the roster.

        Args:
            unit: A guess of the seconds a token takes, to choose how many.
        """
        some = self._affordable(unit)
        engine = local_engine(self.experiment, ClientStore(self.folder / "none"))
        timings = with_timing(engine, self.meter, every=self._thin(unit))
        job = self._job("test", some, 0)
        _sized(engine, job)
        return self._timed(engine, timings, len(some), lambda: score(engine, job))

    def _affordable(self, unit: float, candidates: Sequence[int] | None = None) -> tuple[int, ...]:
        everyone = range(len(self.experiment.server.roster)) if candidates is None else candidates
        pilot = evenly_spaced(everyone, 8)
        workload = evaluated(self.experiment.evaluating(self.experiment.clients.test), pilot)
        each = unit * workload.units / len(pilot)
        return evenly_spaced(everyone, max(2, int(self.budget / max(each, 1e-9))))

    def _thin(self, unit: float) -> int:
        """Every how many batches of a single client, who cannot be thinned otherwise."""
        if len(self.experiment.server.roster) > 1:
            return 1
        workload = evaluated(self.experiment.evaluating(self.experiment.clients.test), (0,))
        return max(1, int(unit * workload.units / self.budget))

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
        unit, store, work = like["score"].unit, ClientStore(self.folder / name), f"alone {lr_name(self._lr)}"
        step = evaluated(self.source(steps=1), clients[:1]) if len(clients) > 1 else Workload()
        some = evenly_spaced(clients, max(2, int(self.budget / max(1e-9, like["train"].unit * step.units))))
        engine = local_engine(self._with_steps(1), store)
        _sized(engine, self._job(work, some, 0))
        timings = with_timing(engine, self.meter, every=self._thin(unit))
        first = self._timed(engine, timings, len(some), lambda: score(engine, self._job(work, some, 0)))
        some = self._affordable(unit, some)
        score(engine, self._job("alone.valid", some, 1))
        longer = local_engine(self._with_steps(self._afford(first)[0]), store)
        more, block_size = with_timing(longer, self.meter, every=self._thin(unit)), longer.block_size

        def ask(work: str, version: int, kind: Kind) -> Rate:
            job, longer.block_size = self._job(work, some, version), block_size
            _sized(longer, job)
            rate = Rate.of(self._timed(longer, more, len(some), lambda: score(longer, job)))
            return replace(rate, unit=like[kind].unit) if len(some) < len(clients) else rate

        trained, validated = ask(work, 2, "train"), ask("alone.valid", 3, "score")
        tested = ask("alone.test", 4, "score")
        rates: dict[Kind, Rate] = (
            {"alone": trained, "alone.keep": validated, "alone.score": tested}
            if name == "alone"
            else {"pooled": trained, "pooled.keep": validated, "pooled.score": tested}
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
