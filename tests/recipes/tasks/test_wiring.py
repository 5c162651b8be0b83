"""What a recipe says reaches the part that does it: rates, splits, pulls and scalings, each by what it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lichen
from lichen.algorithms.scores import mean_loss
from lichen.core import tree as trees
from lichen.core.collecting.collect import drain
from lichen.core.contracts.algorithm import Report
from lichen.core.message import Job, Message
from lichen.core.rounds import run
from lichen.core.store import ClientStore, load_tree
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.present.trace import read_trace
from lichen.recipes.assemble.aggregation import server_of
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, summing
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.learning import choose_learning_rate, federate, scored
from lichen.transforms.downlink import Deltas
from lichen.transforms.parse import parse_codecs
from support.small_experiment import RECIPE, engine, experiment
from support.tiny_llama import recipe, save_model, save_rows

RATES = [1e-7, 0.3, 1e-6]  # neither the first nor the last is the best


@pytest.mark.parametrize("trial", [None, 1])
def test_the_rate_with_the_least_validation_loss_goes_on(trial: int | None) -> None:
    more = [] if trial is None else [f"optimizer.grid_rounds={trial}"]
    known = read_recipe("digits", [f"optimizer.lr={[*RATES, 0.5]}", "federation.rounds=4", *more])
    losses, went = dict(zip(known.optimizer.lr, [2.0, 1.0, 3.0, math.nan], strict=True)), []

    def go(lr: float, until: int) -> float:
        went.append((lr, until))
        return losses[lr]

    assert choose_learning_rate(known, 4, go) == 0.3
    assert went == [*((lr, trial or 4) for lr in known.optimizer.lr), (0.3, 4)]


def test_a_runs_columns_stand_at_their_best_validated_rate(tmp_path: Path) -> None:
    settings = [f"optimizer.lr={RATES}", "federation.rounds=2", "compare.baselines=[alone]"]
    result = lichen.run(read_recipe("digits", settings), out=tmp_path / "run")
    best: dict[str, float] = {}
    for event in read_trace(result.folder):
        if event.column == "federated" and "valid" in event.report.metrics:
            best[event.grid] = min(best.get(event.grid, math.inf), event.report.metrics["valid"])
    assert len(set(best.values())) == 3
    assert lr_name(float(result.summary["extra"]["lr.federated"])) == min(best, key=best.__getitem__)
    scores = result.folder / "state" / "scores"
    alone = {name: mean_loss(load_tree(scores / f"alone.alone.chosen.{name}.2.safetensors")[0]) for name in best}
    assert lr_name(float(result.summary["extra"]["lr.alone"])) == min(alone, key=alone.__getitem__)


SPLITS = {"train": "train", "alone": "train", "alone.valid": "valid", "alone.chosen": "valid", "alone.test": "test"}


def test_every_task_sees_the_rows_of_its_split_and_no_others() -> None:
    made = experiment()
    seen = set[str]()
    for name, task in client_tasks(made).items():
        kind = name.partition(" ")[0]
        seen.add(kind)
        if kind == "roster":
            continue
        split = SPLITS.get(kind, kind)
        for client, shard in enumerate(getattr(made.clients, split)):
            found = {
                tuple(row.tolist())
                for version in range(4)
                for batch in task.source.batches((client,), version)
                for row, index in zip(batch["x_CBF"][0], batch["index_CB"][0], strict=True)
                if index >= 0
            }
            assert found == {tuple(row) for row in shard.x.tolist()}, name
    assert seen == {"roster", "valid", "test", *SPLITS}


def test_the_validated_loss_is_that_of_the_validation_rows(tmp_path: Path) -> None:
    made = experiment()
    clients = engine(made, tmp_path / "own")
    state = federate(made.server, clients, 0.1, 3, tmp_path / "server.safetensors", lambda report: None)
    model: Any = made.model

    def loss(split: Any) -> float:
        """The mean over clients of each one's mean."""
        each = []
        for shard in split:
            logits = model.apply(state.best.trainable, torch.from_numpy(shard.x))
            each.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(shard.labels))))
        return sum(each) / len(each)

    assert state.best_value == pytest.approx(loss(made.clients.valid), rel=1e-5)
    assert mean_loss(scored(made.server, clients, state.best)) == pytest.approx(loss(made.clients.test), rel=1e-5)
    assert loss(made.clients.test) != pytest.approx(loss(made.clients.valid), rel=1e-2)


def test_a_strong_pull_holds_clients_at_the_shared_model_and_leaves_who_is_alone(tmp_path: Path) -> None:
    small = experiment()
    moved, alone = list[Tensor](), list[str]()
    for mu in (0.0, 2.0, 8.0):  # steps of 0.1: each takes 80 % of the way back at most
        known = read_recipe({**RECIPE, "optimizer": {"name": "sgd", "lr": [0.1], "prox": mu}})
        made = Experiment.of(known, small.model, small.clients)
        store = ClientStore(tmp_path / str(mu))
        nodes = LocalEngine(client_tasks(made), store, block_size=3)
        everyone = tuple(range(len(made.clients.train)))
        job = Job(work="train lr=0.1", shared=made.start, version=0, clients=everyone, seed=1, base=made.model.base)
        messages = sorted(drain(nodes, job), key=lambda message: int(message.client_C[0]))
        moved.append(torch.cat([trees.norm_C(message.tensors) for message in messages]))
        list(drain(nodes, replace(job, work="alone lr=0.1")))
        own = store.load(everyone, 1)
        assert own is not None
        alone.append(trees.digest(own))
    assert bool((moved[1] < 0.9 * moved[0]).all())
    assert bool((moved[2] < 0.8 * moved[1]).all())
    assert len(set(alone)) == 1


def test_clients_step_as_the_optimizer_says(tmp_path: Path) -> None:
    small, plain = experiment(), {"name": "sgd", "lr": [0.05]}
    more: list[dict[str, Any]] = [{}, {"lr": [0.2]}, {"momentum": 0.9}, {"weight_decay": 0.5}, {"clip": 0.01}]
    sent = list[trees.Tree]()
    for k, said in enumerate([*more, {"name": "adamw"}]):
        made = Experiment.of(read_recipe({**RECIPE, "optimizer": {**plain, **said}}), small.model, small.clients)
        (lr,) = made.recipe.optimizer.lr
        job = Job(work=f"train {lr_name(lr)}", shared=made.start, version=0, clients=(1,), seed=1)
        (message,) = drain(LocalEngine(client_tasks(made), ClientStore(tmp_path / str(k))), job)
        sent.append(dict(message.tensors))
    assert len({trees.digest(change) for change in sent}) == 6
    assert float(trees.norm_C(sent[1])) > 2 * float(trees.norm_C(sent[0]))
    assert float(trees.norm_C(sent[4])) <= 3 * 0.05 * 0.01 * (1 + 1e-5)  # three steps, each cut


class Noted:
    """A downlink or an engine that remembers the seeds of its steps, or of the training it asks for."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seeds = inner, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def advance(self, shared: Shared, state: trees.Tree, seed: int) -> Any:
        self.seeds.append(seed)
        return self.inner.advance(shared, state, seed)

    def submit(self, job: Job) -> Any:
        if job.work.startswith("train"):
            self.seeds.append(job.seed)
        return self.inner.submit(job)


def test_nothing_random_is_drawn_twice_in_a_run(tmp_path: Path) -> None:
    """Batches, rounding up and rounding down: each round has seeds of its own; who has answered is sent changes."""
    made = experiment()
    down: Any = Noted(Deltas(parse_codecs(["int4"])))
    nodes: Any = Noted(engine(made, tmp_path))
    algorithm, reports = replace(algorithm_of(made.server, 0.1, 4), downlink=down, valid=None), list[Report]()
    run(algorithm, nodes, lambda: made.start, rounds=4, seed=3, observers=[reports.append])
    assert len(nodes.seeds) == len(down.seeds) == 4
    assert len({*nodes.seeds, *down.seeds}) == 8
    assert max(report.bytes_down for report in reports[1:]) < reports[0].bytes_down


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wiring")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair", clients=3)
    return folder


def adapted(home: Path, rslora: bool, **federation: Any) -> Experiment:
    adapter = {"target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 5, "rslora": rslora}
    model = {"name": str(home / "model"), "adapter": adapter}
    return open_recipe(
        read_recipe(recipe(home / "model", home / "rows.jsonl", "pair", model=model, federation=federation))
    ).experiment


def drawn(made: Experiment) -> trees.Tree:
    """An adapter that changes what the model says."""
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(x.shape, generator=g) * 0.3 for n, x in made.start.trainable.items()}


def losses(made: Experiment, shared: Shared, folder: Path) -> list[float]:
    nodes = LocalEngine(client_tasks(made), ClientStore(folder))
    return [float(x) for x in scored(made.server, nodes, shared)["loss_sum"]]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rule", ["fedex", "flora", "flexlora"])
def test_an_exact_rule_leaves_the_model_of_the_mean_product(
    home: Path, tmp_path: Path, rule: str, rslora: bool
) -> None:
    """Two clients, each along one of two directions: the mean of their products is one adapter's, which says so."""
    made = adapted(home, rslora, aggregate=rule)
    want, start = drawn(made), made.start.trainable

    def half(name: str, x: Tensor, client: int) -> Tensor:
        kept = torch.zeros_like(x)
        if name.endswith("lora_A"):
            kept[client] = x[client]
        else:
            kept[:, client] = 2 * x[:, client]
        return kept

    changes = [{n: half(n, x, client) - start[n] for n, x in want.items()} for client in range(2)]
    message = Message(
        group="g",
        client_C=torch.arange(2),
        version_C=torch.zeros(2, dtype=torch.int64),
        tensors=trees.stack(changes),
        weight_C=torch.ones(2, dtype=torch.float64),
    )
    aggregator, optimizer = summing(made.server, 0.02), server_of(made.recipe)
    change, _ = aggregator.close(aggregator.add(aggregator.zero(), message), made.start)
    after, _ = optimizer.update(change, optimizer.init(made.start), made.start)
    told = losses(made, after, tmp_path / "after")
    assert told == pytest.approx(losses(made, Shared(want), tmp_path / "want"), rel=1e-4)
    assert told != pytest.approx(losses(made, made.start, tmp_path / "start"), rel=1e-2)


@pytest.mark.parametrize("rslora", [False, True])
def test_blocks_that_a_client_does_not_train_stand_in_its_patch(home: Path, tmp_path: Path, rslora: bool) -> None:
    made = adapted(home, rslora, ranks=[2], aggregate="fedex")
    capacity, whole = made.server.capacity, Shared(drawn(made))
    assert capacity is not None
    cut = capacity.extract(whole, (2, 1))
    assert len(cut.trainable) < len(whole.trainable)
    told = losses(made, cut, tmp_path / "cut")
    assert told == pytest.approx(losses(made, whole, tmp_path / "whole"), rel=1e-4)
