"""What kinds of values say of honest clients, one with random labels, a twin, and one that sends zeros.

Eight clients hold digits: five honest ones, one whose labels are drawn, one that sends zeros in the name of its rows,
and one that is the first one's twin and sends the same. Shares of classes are drawn (Dirichlet, 0.5). In each round all
coalitions are judged once, on 300 public rows, under both denominators; every kind of value looks coalitions up there.
The same rounds again, where an honest client has split in two, or has every row twice. A round is two epochs of each.

``python benchmarks/valued.py --run 0 1 2`` takes these seeds, two minutes each, and keeps ``results/valued.json``;
``python benchmarks/valued.py agree`` prints how kinds agree, ``gains`` what the split client and the doubled one have.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.datasets import load_digits

from lichen import fl
from lichen.clients.evaluation.evaluate import measure
from lichen.clients.evaluation.gradient import Gradient
from lichen.core import tree as trees
from lichen.core.collecting.round_messages import RoundMessages
from lichen.core.contracts.value import RoundValue
from lichen.server.value.coalitions import Coalitions, Denominator
from lichen.server.value.game import exact, guided, leave_one_out

RESULTS = Path(__file__).with_name("results") / "valued.json"
ROUNDS, PUBLIC, OWNERS = 10, 300, 7
NOISE, RIDER, TWIN, CHANGED = 5, 6, 7, 3
World = Literal["plain", "split", "doubled"]
KINDS = ("exact", "gtg", "loo", "first")


def rows(seed: int) -> tuple[fl.ArrayShard, list[fl.ArrayShard]]:
    """``(public rows, each owner's)``."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    public, rest = order[:PUBLIC], order[PUBLIC:]
    while True:
        parts: list[list[int]] = [[] for _ in range(OWNERS)]
        for label in range(10):
            mine = rest[y[rest] == label]
            cuts = (np.cumsum(rng.dirichlet([0.5] * OWNERS)) * len(mine)).astype(int)[:-1]
            for part, some in zip(parts, np.split(mine, cuts), strict=True):
                part.extend(some.tolist())
        if min(map(len, parts)) >= 40:
            break
    shards = [fl.ArrayShard(x=x[part], labels=y[part]) for part in map(np.asarray, parts)]
    shards[NOISE] = fl.ArrayShard(x=shards[NOISE].x, labels=rng.integers(0, 10, len(shards[NOISE].labels)))
    return fl.ArrayShard(x=x[public], labels=y[public]), shards


def clients_of(shards: list[fl.ArrayShard], world: World) -> list[fl.ArrayShard]:
    """The clients of a world: the twin is last but for the other half of one that has split."""
    clients = [*shards, shards[0]]
    whole = shards[CHANGED]
    if world == "split":
        even, odd = (fl.ArrayShard(x=whole.x[at::2], labels=whole.labels[at::2]) for at in (0, 1))
        clients = [*clients[:CHANGED], even, *clients[CHANGED + 1 :], odd]
    if world == "doubled":
        twice = fl.ArrayShard(x=np.concatenate([whole.x] * 2), labels=np.concatenate([whole.labels] * 2))
        clients[CHANGED] = twice
    return clients


def without_twin(job: fl.Job) -> fl.Job:
    """The twin does not train: it sends what the first client does."""
    return replace(job, clients=tuple(client for client in job.clients if client != TWIN))


def lied(reply: fl.Reply, job: fl.Job) -> Iterator[fl.Reply]:
    """The rider's zeros, and the twin's copy."""
    message = reply.message
    assert message is not None
    (client,) = reply.clients
    if client == RIDER:
        reply = replace(reply, message=replace(message, tensors=trees.zeros_like(message.tensors)))
    yield reply
    if client == 0:
        copy = replace(message, client_C=torch.tensor([TWIN]))
        yield replace(reply, clients=(TWIN,), message=copy)


class Judge:
    """The loss of public rows."""

    def __init__(self, model: Any, public: fl.ArrayShard) -> None:
        self.model = model
        source = fl.EvalSource((public,), batch_size=PUBLIC)
        (self.batch,) = source.batches((0,), 0)
        self.seconds, self.asked = 0.0, 0

    def utility(self, shared: fl.Shared) -> float:
        sums = measure(self.model, trees.broadcast(shared.trainable, 1), {}, self.batch)
        return -float(sums["loss_sum"][0] / sums["count"][0])

    def gradient(self, shared: fl.Shared) -> fl.Tree:
        work, job = Gradient(self.model), fl.Job(work="g", shared=shared, version=0, clients=(0,), seed=0)
        message, _ = work.final(work.step(work.init(job, (0,), None), self.batch))
        return trees.take(message.tensors, 0)


def valued(kind: str, coalitions: Coalitions, judge: Judge, table: dict[frozenset[int], float], at: int) -> RoundValue:
    """The values of a round, by a kind."""

    def utility(coalition: frozenset[int]) -> float:
        if coalition not in table:
            start = time.perf_counter()
            table[coalition] = judge.utility(coalitions.shared(coalition))
            judge.seconds += time.perf_counter() - start
            judge.asked += 1
        return table[coalition]

    players = coalitions.players
    if kind == "exact":
        return exact(players, utility)
    if kind == "gtg":
        return guided(players, utility, seed=at)
    if kind == "loo":
        return leave_one_out(players, utility)
    value = coalitions.slopes(judge.gradient(coalitions.start))
    return RoundValue(value=value, before=utility(frozenset()), after=utility(frozenset(players)), evaluations=1)


def run(seed: int, world: World) -> dict[str, Any]:
    """Totals over all rounds by kind and denominator, coalitions a round and the sum of gaps."""
    public, shards = rows(seed)
    clients = clients_of(shards, world)
    model = fl.ImageMLP(64, hidden=(64,), classes=10)
    train = fl.Train(model, optimizer=fl.ClientOptimizer(name="sgd", lr=0.1, momentum=0.9))
    source = fl.TrainSource(clients, batch_size=16, steps=0, epochs=2)
    judge, everyone = Judge(model, public), list(range(len(clients)))
    totals: dict[str, list[list[float]]] = {}
    gaps: dict[str, list[float]] = {}
    asked: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        local = fl.LocalEngine(
            {"train": fl.ClientTask(work=train, source=source)}, fl.ClientStore(Path(folder)), block_size=1
        )
        engine = fl.AroundEngine(local, on_job=without_twin, on_reply=lied)
        optimizer = fl.ServerSGD()
        rounds = fl.Average(
            aggregator=fl.Mean(),
            optimizer=optimizer,
            sampler=fl.Everyone(),
            weight_N=torch.tensor([float(shard.size) for shard in clients]),
            rounds=ROUNDS,
            valid=None,
        )
        state = rounds.init(fl.Shared(model.init(seed)))
        first = state
        for at in range(ROUNDS):
            messages = RoundMessages(fl.History(Path(folder) / "spill"))
            after, _ = replace(rounds, history=messages).round(state, engine, 1000 * seed + at)
            for of in get_args(Denominator):
                table: dict[frozenset[int], float] = {}
                coalitions = Coalitions(
                    messages=messages,
                    aggregator=rounds.aggregator,
                    start=state.shared,
                    step=lambda change, now=state: optimizer.update(change, {}, now.shared)[0],  # type: ignore[misc]
                    of=of,
                )
                for kind in KINDS:
                    if kind == "first" and of == "coalition":
                        continue
                    found = valued(kind, coalitions, judge, table, at)
                    key = f"{kind}/{of}"
                    totals.setdefault(key, []).append([found.value[client] for client in everyone])
                    gaps.setdefault(key, []).append(found.gap)
                    asked.setdefault(key, []).append(found.evaluations)
            state = after
    return {
        "clients": [shard.size for shard in clients],
        "loss": [-judge.utility(first.shared), -judge.utility(state.shared)],
        "totals": {key: np.sum(one, axis=0).tolist() for key, one in totals.items()},
        "gap": {key: max(map(abs, one)) for key, one in gaps.items()},
        "gap.sum": {key: math.fsum(one) for key, one in gaps.items()},
        "asked": {key: float(np.mean(one)) for key, one in asked.items()},
        "ms": 1000 * judge.seconds / judge.asked,
    }


def write(seeds: Sequence[int]) -> None:
    """Run these seeds in every world and keep what came out, beside what other seeds have given."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["seeds"] if RESULTS.exists() else {}
    found |= {str(seed): {world: run(seed, world) for world in get_args(World)} for seed in seeds}
    kept = {"rounds": ROUNDS, "torch": torch.__version__, "seeds": dict(sorted(found.items()))}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks; equal values share their mean rank."""
    ranks = [[(sum(y < x for y in some) + sum(y <= x for y in some) - 1) / 2 for x in some] for some in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def _each(values: Sequence[float], form: str) -> str:
    return " ".join(format(value, form) for value in values)


def agree(seeds: dict[str, Any]) -> None:
    """How kinds agree with exact values, and what they say of the odd clients; three numbers are three seeds."""
    print(
        "| kind | of | rank correlation with exact | off by | coalitions a round | largest gap | random labels "
        "| sends zeros | twins differ by |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    plain = [seed["plain"] for seed in seeds.values()]
    for key in plain[0]["totals"]:
        kind, of = key.split("/")
        cells = []
        mine = [one["totals"][key] for one in plain]
        true = [one["totals"][f"exact/{of}"] for one in plain]
        size = [sum(map(abs, one)) for one in mine]
        off = [
            sum(abs(x - y) for x, y in zip(a, b, strict=True)) / sum(map(abs, b))
            for a, b in zip(mine, true, strict=True)
        ]
        cells.append(_each([spearman(a, b) for a, b in zip(mine, true, strict=True)], ".3f"))
        cells.append(_each(off, ".1%"))
        asked = np.mean([one["asked"][key] for one in plain])
        cells.append("1, a gradient" if kind == "first" else f"{asked:.0f}")
        cells.append(f"{max(one['gap'][key] for one in plain):.1g}")
        cells.append(_each([one[NOISE] / whole for one, whole in zip(mine, size, strict=True)], "+.1%"))
        cells.append(_each([one[RIDER] / whole for one, whole in zip(mine, size, strict=True)], "+.1%"))
        cells.append(_each([abs(one[TWIN] - one[0]) / whole for one, whole in zip(mine, size, strict=True)], ".2%"))
        print(f"| `{kind}` | {'-' if kind == 'first' else of} | {' | '.join(cells)} |")
    counts = [spearman(one["clients"], one["totals"]["exact/cohort"]) for one in plain]
    print(f"| number of rows | - | {_each(counts, '.3f')} | - | - | - | - | - | - |")


def gains(seeds: dict[str, Any]) -> None:
    """An honest client's share of all positive value: as it is, split in two (both halves), with every row twice."""
    print("| kind | of | as it is | split in two | times | every row twice | times |")
    print("|---|---|---:|---:|---:|---:|---:|")

    def share(one: dict[str, Any], key: str) -> float:
        totals = one["totals"][key]
        more = max(totals[TWIN + 1], 0) if len(totals) > TWIN + 1 else 0.0
        return (max(totals[CHANGED], 0) + more) / sum(max(x, 0) for x in totals)

    def counted(one: dict[str, Any]) -> float:
        counts = one["clients"]
        return (counts[CHANGED] + sum(counts[TWIN + 1 :])) / sum(counts)

    worlds = {world: [seed[world] for seed in seeds.values()] for world in get_args(World)}
    keys = list(worlds["plain"][0]["totals"])
    for key in [*keys, "rows"]:
        kind, _, of = key.partition("/")
        found = {
            world: [counted(one) if key == "rows" else share(one, key) for one in some]
            for world, some in worlds.items()
        }
        cells = [_each(found["plain"], ".1%")]
        for world in ("split", "doubled"):
            ratio = [b / a if a else math.nan for a, b in zip(found["plain"], found[world], strict=True)]
            cells += [_each(found[world], ".1%"), _each(ratio, ".2f")]
        name = "number of rows" if key == "rows" else f"`{kind}`"
        print(f"| {name} | {'-' if kind in ('first', 'rows') else of} | {' | '.join(cells)} |")


def main() -> int:
    """Run seeds, or print a table of what was kept."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("table", nargs="?", choices=("agree", "gains"), default="agree")
    ask.add_argument("--run", nargs="+", type=int, metavar="SEED", help="measure anew")
    args = ask.parse_args()
    if args.run:
        write(args.run)
    seeds = json.loads(RESULTS.read_text(encoding="utf-8"))["seeds"]
    (agree if args.table == "agree" else gains)(seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
