"""Runs task ``classify`` with clients of different architectures that share predictions.

The column ``federated`` is every client's own model after the last round, on its test rows; for feddf its
architecture's average, of the best validated round. ``alone`` takes as many local steps as the exchange takes on
private and public rows together, rows for rows, and keeps each client's best round; ``alone_best`` goes on until
nobody gains. ``ensemble`` is what all models
say together: the mean of their probabilities on every test row. Learning rates are chosen on validation rows.

A killed run goes on from the server's state and the clients' private state of its last whole round.

References:
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581
    Sohei Itahara, Takayuki Nishio, Yusuke Koda, Masahiro Morikura and Koji Yamamoto. "Distillation-Based
    Semi-Supervised Federated Learning for Communication-Efficient Collaborative Training with Non-IID
    Private Data." IEEE Transactions on Mobile Computing 22(1), 2023. https://arxiv.org/abs/2008.06180
    Tao Lin, Lingjing Kong, Sebastian U. Stich and Martin Jaggi. "Ensemble Distillation for Robust Model
    Fusion in Federated Learning." NeurIPS 2020. https://arxiv.org/abs/2006.07242

Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Callable

from lichen.algorithms.alone import Alone, UntilBest
from lichen.algorithms.exchange import PredictionExchange, score_architectures
from lichen.algorithms.fusion import Fusion, join_architectures, of_architecture
from lichen.algorithms.scores import mean_loss, score
from lichen.core.collecting.admission import Admission
from lichen.core.contracts.algorithm import Algorithm, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.recipes.artifacts.inputs import agree, inputs_of
from lichen.recipes.assemble.aggregation import sampler_of, server_of
from lichen.recipes.assemble.class_names import save_class_names
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import lr_name, values_N
from lichen.recipes.assemble.heterogeneous import HeterogeneousClients, open_heterogeneous
from lichen.recipes.assemble.heterogeneous_parts import (
    ByArchitecture,
    admission_of_architectures,
    alone_steps,
    averaged_tasks,
    engine_of,
    private_tasks,
    server,
)
from lichen.recipes.assemble.parts import lr_scale, validators_of
from lichen.recipes.assemble.run_folder import RunFolder, save_roster
from lichen.recipes.assemble.workload import Unbudgeted, alone_rounds, stop_of, unbudgeted
from lichen.recipes.rows.client_counts import counts_of, shared_test
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.exchange_report import Trained, ensemble_column, metrics_by_arch, public_bytes, save_models
from lichen.recipes.tasks.learning import EventObserver, choose_learning_rate, go_rounds, observing
from lichen.recipes.tasks.outcome import TaskResult, baseline, over_all_rows, tested
from lichen.recipes.tasks.private_columns import stops, until_best
from lichen.server.knowledge.ensemble import Ensemble
from lichen.server.mean import Mean

__all__ = ["run_exchange"]

Say = Callable[[str], None]


def run_exchange(recipe: Recipe, folder: RunFolder, observer: EventObserver, say: Say) -> TaskResult:
    """Run a recipe with a section ``exchange``.

    Args:
        recipe: The recipe.
        folder: The run folder.
        observer: Sees every round.
        say: Called with lines of progress.

    Raises:
        LichenError: whatever does not fit, by its key.
    """
    loaded, heterogeneous = open_heterogeneous(recipe, say)
    agree(folder, recipe, inputs_of(loaded, *heterogeneous.experiments.values()))
    save_class_names(folder, loaded.classes)
    save_roster(folder, heterogeneous.server.roster, loaded.cards)
    trained = _federated(heterogeneous, folder, observer)
    columns = {"federated": trained.column}
    if "alone" in recipe.compare.baselines:
        columns["alone"] = _alone(heterogeneous, folder, observer)
    if "alone_best" in recipe.compare.baselines:
        free = unbudgeted(heterogeneous.server, steps=alone_steps(heterogeneous))
        columns["alone_best"] = _alone(heterogeneous, folder, observer, free=free)
    say("asking all models for every test row")
    columns["ensemble"] = ensemble_column(loaded, heterogeneous, trained, folder)
    columns |= baseline(recipe, loaded.experiment.clients.train, loaded.experiment.clients.test, loaded.classes)
    save_models(loaded, heterogeneous, trained, folder)
    # Whoever learns from public rows is sent them once.
    sent = 0 if heterogeneous.fused else heterogeneous.count * public_bytes(loaded, heterogeneous.public)
    return TaskResult(
        columns=columns,
        clients=tuple(client_data.name for client_data in loaded.clients_data),
        extra={
            **metrics_by_arch(heterogeneous, columns),
            **over_all_rows(recipe, columns),
            **tested([client_data.test for client_data in loaded.clients_data], loaded.classes),
            "public_rows.bytes": float(sent),
        },
        read=loaded.read,
        cards=loaded.cards,
        bytes_down=sent,
        validators=len(validators_of(loaded.experiment.server)),
        counts=counts_of(recipe, loaded.clients_data, loaded.tokenizer),
        common_test=shared_test(loaded.clients_data),
    )


def _algorithm(heterogeneous: HeterogeneousClients, lr: float, until: int, admission: Admission) -> Algorithm:
    """The exchange at one learning rate, up to round ``until``."""
    recipe, section, fed = heterogeneous.recipe, heterogeneous.exchange, heterogeneous.recipe.federation
    side = heterogeneous.server
    classes = side.model.classes
    assert classes is not None
    ensemble = Ensemble(section.means, classes=classes, weigh=section.weighting, sharpen=section.sharpened)
    weight_N, scale, sampler = side.roster.rows_N("train"), lr_scale(recipe, fed.rounds), sampler_of(side)
    if not heterogeneous.fused:
        return PredictionExchange(
            architectures=heterogeneous.architectures,
            ensemble=ensemble,
            sampler=sampler,
            weight_N=weight_N,
            rounds=until,
            valid_every=fed.valid_every,
            validators=validators_of(side),
            valid_average=fed.judged_by,
            admission=admission,
            lr_scale=scale,
        )
    predict, distil = server(heterogeneous, lr)
    return Fusion(
        architectures=heterogeneous.architectures,
        predict=predict,
        distil=distil,
        aggregator=Mean(weighting="uniform" if fed.weighting == "uniform" else "examples"),
        optimizer=server_of(recipe),
        ensemble=ensemble,
        sampler=sampler,
        weight_N=weight_N,
        rounds=until,
        valid_every=fed.valid_every,
        validators=validators_of(side),
        valid_average=fed.judged_by,
        admission=admission,
        lr_scale=scale,
    )


def _federated(heterogeneous: HeterogeneousClients, folder: RunFolder, observer: EventObserver) -> Trained:
    recipe, rounds = heterogeneous.recipe, heterogeneous.recipe.federation.rounds
    fused, everyone = heterogeneous.fused, tuple(range(heterogeneous.count))
    states: dict[float, ServerState] = {}
    engines: dict[float, LocalEngine] = {}
    admissions: dict[float, Admission] = {}

    def initial() -> Shared:
        starts = {arch: experiment.start.trainable for arch, experiment in heterogeneous.experiments.items()}
        return join_architectures(starts) if fused else Shared()

    def scored(lr: float, work: str, until: int) -> Tree:
        job = Job(work=work, shared=Shared(), version=2 * until, clients=everyone, seed=0)
        best = states[lr].best
        make = lambda arch: of_architecture(best, arch) if fused else Shared()  # noqa: E731
        return score_architectures(engines[lr], job, heterogeneous.architectures, make, admission=admissions[lr])[1]

    def go(lr: float, until: int) -> float:
        grid = lr_name(lr)
        client_tasks = averaged_tasks(heterogeneous, lr) if fused else private_tasks(heterogeneous, lr)
        engines[lr] = engine_of(
            heterogeneous, client_tasks, ClientStore(folder.clients("federated", grid), listed=True)
        )
        admissions[lr] = admission_of_architectures(heterogeneous, client_tasks)
        states[lr] = run(
            _algorithm(heterogeneous, lr, until, admissions[lr]),
            engines[lr],
            initial,
            rounds=until,
            seed=derive(recipe.seed, "run"),
            checkpoint=folder.checkpoint("federated", grid),
            once=folder.ranks.ask_first,
            save=folder.save,
            stop=stop_of(recipe),
            observers=[observing(observer, "federated", lr, rounds)],
        )
        if fused or len(recipe.optimizer.lr) == 1:
            return states[lr].best_value
        return mean_loss(
            folder.tree(f"federated.chosen.{grid}.{until}", lambda: scored(lr, "valid", until)),
            recipe.federation.judged_by,
        )

    lr = choose_learning_rate(recipe, rounds, go)
    state = states[lr]
    metrics = folder.tree("federated", lambda: scored(lr, "test", rounds))
    best = state.best_round if fused else rounds
    column = Column(value_N=values_N(recipe, metrics), metrics=metrics, lr=lr, shared=Shared(), best_round=best)
    return Trained(
        column=column,
        state=state,
        store=engines[lr].store,
        models=lambda arch: of_architecture(state.best, arch) if fused else Shared(),
    )


def _alone(
    heterogeneous: HeterogeneousClients, folder: RunFolder, observer: EventObserver, *, free: Unbudgeted | None = None
) -> Column:
    """Everybody by itself, with the exchange's budget of local steps, or until it has stopped gaining."""
    recipe, fed, name = heterogeneous.recipe, heterogeneous.recipe.federation, "alone_best" if free else "alone"
    everyone = tuple(range(heterogeneous.count))
    rounds = free.rounds if free else alone_rounds(heterogeneous.server)
    engines: dict[float, Engine] = {}

    def scored(lr: float, until: int, work: str) -> Tree:
        job = Job(work=work, shared=Shared(), version=2 * until, clients=everyone, seed=0)
        file = f"{work}.{lr_name(lr)}.{until}"
        return folder.tree(f"{name}.{file}" if free else file, lambda: score(engines[lr], job)[1])

    def go(lr: float, until: int) -> float:
        grid = lr_name(lr)
        store = ClientStore(folder.clients(name, grid), listed=True)
        local = engine_of(heterogeneous, private_tasks(heterogeneous, lr), store)
        engines[lr] = ByArchitecture(local, architectures=heterogeneous.architectures)
        alone = Alone(
            clients=heterogeneous.count,
            rounds=until,
            work="alone",
            valid="alone.valid",
            valid_every=free.every if free else fed.valid_every,
            lr_scale=free.lr_scale if free else lr_scale(recipe, rounds),
        )
        algorithm = until_best(alone, free) if free else alone
        go_rounds(
            heterogeneous.server,
            algorithm,
            engines[lr],
            until,
            folder.checkpoint(name, grid),
            observing(observer, name, lr, rounds),
            folder.ranks.ask_first,
            folder.save,
            initial=Shared(),
            stop=stops(algorithm) if isinstance(algorithm, UntilBest) else None,
        )
        return mean_loss(scored(lr, until, "alone.chosen")) if len(recipe.optimizer.lr) > 1 else 0.0

    lr = choose_learning_rate(recipe, rounds, go)
    metrics = scored(lr, rounds, "alone.test")
    return Column(value_N=values_N(recipe, metrics), metrics=metrics, lr=lr)
