"""Plans a recipe with a section ``pipeline``: bytes between hosts, exactly, and what a few steps take here.

All hosts are loaded into this process one after the other and time a few real steps through the run's own engine. A
run of hosts side by side takes less: what waits for what, and for how long, is counted along.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lichen.algorithms.hosts.pipeline import Pipeline
from lichen.clients.pipeline.schedule import most_in_flight, turns_of
from lichen.core.contracts.client import Source
from lichen.core.contracts.engine import Engine
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.models.arithmetic import arithmetic_of
from lichen.models.loading.dtypes import dtype_of
from lichen.models.pieces.partition import numbers_of
from lichen.present.units import bytes_text, seconds_text
from lichen.recipes.assemble.pieces.hosts import Hosts
from lichen.recipes.assemble.workload import Workload
from lichen.recipes.plan.estimate import Cost, Disk, Estimate, Memory, free_disk_bytes
from lichen.recipes.plan.memory import MemoryMeter
from lichen.recipes.plan.pieces.host_traffic import host_traffic
from lichen.recipes.plan.timing import evenly_spaced
from lichen.recipes.plan.traffic import TrafficEstimate
from lichen.recipes.plan.workload import evaluated
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.coverage import coverage_of
from lichen.recipes.tasks.hosts.opening import each_once, open_hosts

__all__ = ["estimate_hosts"]

RATES = (10, 100)
"""Mb/s for which seconds are told."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    """What was measured.

    Attributes:
        train: Seconds of a trained token, hosts one after the other.
        score: Of a scored one.
        pace: Of a trained one, were each host a machine of its own.
        idle: The share of the hosts' time in which they would wait then.
    """

    train: float
    score: float
    pace: float
    idle: float


def estimate_hosts(
    recipe: Recipe, folder: Path, meter: MemoryMeter, say: Callable[[str], None], seconds: float
) -> Estimate:
    """Open the recipe as a run does, count what crosses, and time a few steps.

    Args:
        recipe: With a section ``pipeline``.
        folder: For what is written; the caller removes it.
        meter: The device's memory.
        say: Called with lines of progress.
        seconds: About how long training and scoring are timed each.

    Raises:
        LichenError: what is wrong with the recipe or its files, as the run would say it.
    """
    start_time = time.perf_counter()
    setup = open_hosts(recipe, say)
    hosts, pipeline, server, rounds = setup.hosts, setup.pipeline, setup.server, recipe.federation.rounds
    engine = LocalEngine(hosts.client_tasks(), ClientStore(folder / "clients"), device=recipe.model.device)
    for stage in range(len(hosts.parts)):
        hosts.piece(stage)
    start = time.perf_counter() - start_time
    loaded, there, run = meter.now(), meter.available(), derive(recipe.seed, "run")
    sent, sampled = host_traffic(pipeline, hosts.start, [derive(run, "round", r) for r in range(rounds)])
    say("timing a few steps")
    meter.restart()
    test, everyone = each_once(server, setup.rows.test), range(len(server.roster))
    rates = _timed(pipeline, engine, hosts.start, test, sampled.seeds[0], seconds)
    block = max(0, meter.since() - loaded)
    trained = sum(
        (evaluated(pipeline.train, who, seed) for who, seed in zip(sampled.invited, sampled.seeds, strict=True)),
        Workload(),
    )
    tested, flops = evaluated(test, everyone), arithmetic_of(hosts.structure, hosts.start.trainable)
    scored = evaluated(pipeline.valid, everyone).times(sampled.validations) + tested
    columns = {
        "federated": Cost(
            seconds=sampled.tokens * rates.train + scored.tokens * rates.score,
            train_tokens=trained.tokens,
            evaluate_tokens=scored.tokens,
            train_flops=flops.train(trained),
            evaluate_flops=flops.forward(scored),
        )
    }
    if "base" in recipe.compare.baselines:
        cost = Cost(seconds=tested.tokens * rates.score, evaluate_tokens=tested.tokens)
        columns = {"base": replace(cost, evaluate_flops=flops.forward(tested)), **columns}
    weights = _weights(hosts)
    state = 2 * hosts.start.nbytes + sum(x.nbytes for x in pipeline.init(hosts.start).optimizer.values())
    every = recipe.engine.history
    return Estimate(
        clients=len(server.roster),
        trained=sum(x.numel() for x in hosts.start.trainable.values()),
        frozen=numbers_of(hosts.structure)[3],
        bytes=sent,
        memory=Memory(
            base=sum(weights),
            loaded=loaded,
            client=block,
            block=block,
            clients=1,
            peak=max(meter.peak(), loaded + block),
            available=there,
        ),
        disk=Disk(
            private=0,
            shared=2 * state,
            free=free_disk_bytes(),
            checkpoints=rounds // every * state if every else 0,
        ),
        columns=columns,
        start=start,
        notes=tuple(_notes(recipe, hosts, pipeline, weights, rates, sent, sampled.tokens / max(1, rounds))),
        seen={"federated": coverage_of(server, sampled.invited)},
        read=setup.read,
        hosts={
            "blocks": list(hosts.parts),
            "weights": weights,
            "pace": sampled.tokens * rates.pace,
            "idle": rates.idle,
        },
    )


def _weights(hosts: Hosts) -> list[int]:
    """Bytes of each host's weights."""
    whole, number = numbers_of(hosts.structure)[3], dtype_of(hosts.recipe.model.dtype).itemsize
    return [round(share * whole) * number for share in hosts.shares]


def _timed(pipeline: Pipeline, engine: Engine, start: Shared, test: Source, seed: int, seconds: float) -> _Rates:
    """Rounds of as many steps as there is time for, and scores of as many clients; the first round only warms up."""
    one = replace(pipeline, steps=1, rounds=2, valid_every=2)  # which does not validate its first round
    report = one.round(one.init(start), engine, seed)[1]
    if report.seconds < seconds:
        some = replace(one, steps=max(1, min(pipeline.steps, int(seconds / report.seconds))))
        report = some.round(some.init(start), engine, seed)[1]
    tokens = max(1, report.tokens or 0)
    train = report.seconds / tokens
    everyone = range(len(pipeline.weight_N))
    each = evaluated(test, evenly_spaced(everyone, 8)).tokens / min(8, len(everyone))
    clients = evenly_spaced(everyone, max(1, int(seconds / max(1e-9, each * train / 2))))
    begun = time.perf_counter()
    pipeline.score(engine, start, test, clients)
    took, scored = time.perf_counter() - begun, evaluated(test, clients).tokens
    return _Rates(
        train=train,
        score=took / scored if scored else train / 2,
        pace=report.metrics["pace"] / tokens,
        idle=report.metrics["idle"],
    )


def _notes(
    recipe: Recipe,
    hosts: Hosts,
    pipeline: Pipeline,
    weights: Sequence[int],
    rates: _Rates,
    sent: TrafficEstimate,
    tokens: float,
) -> Iterator[str]:
    """What a person should know of a pipeline before it runs."""
    section = recipe.pipeline
    assert section is not None
    for place, (blocks, nbytes) in enumerate(zip(hosts.parts, weights, strict=True)):
        most = most_in_flight(turns_of(place, section.hosts, section.micro, section.schedule))
        yield (
            f"pipeline: host {place + 1} holds {blocks} block{'s' if blocks > 1 else ''}, {bytes_text(nbytes)} of "
            f"weights, and graphs of {most} micro-batch{'es' if most > 1 else ''} at once"
        )
    up, down = ((whole - valid) / recipe.federation.rounds for whole, valid in _both(sent))
    times = ", ".join(f"{seconds_text(8 * (up + down) / (rate * 1e6))} at {rate} Mb/s" for rate in RATES)
    yield (
        f"pipeline: seconds are those of hosts one after the other; with a machine each a round of training takes "
        f"{seconds_text(tokens * rates.pace)}, of which hosts wait {rates.idle:.0%}, and its {bytes_text(up)} up and "
        f"{bytes_text(down)} down cross in {times}"
    )
    yield "bytes are those of all hosts, which send to whoever runs this; memory is that of all hosts in one process"
    if recipe.federation.patience is not None:
        yield "federation.patience may end a column before its last round: all numbers are the most it takes"


def _both(sent: TrafficEstimate) -> tuple[tuple[int, int], tuple[int, int]]:
    """``(all, of validation)``, up and down."""
    return (sent.up, sent.valid_up), (sent.down, sent.valid_down)
