"""Unlearns a client by an approximation: the rounds of it, and the new folder's model.

They are the column ``unlearning`` of the new folder, with a checkpoint after each, so that the same command goes on
after a kill, to the same bytes. What they end in is then the model of the federated column, and the run goes on from
there as a resumed one does: it scores it, and writes what a run leaves. Everything is computed in this process, which
has the rows at hand; that of other engines has the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from lichen.algorithms.average import Average
from lichen.algorithms.unlearning.alternate import Alternate
from lichen.algorithms.unlearning.erase import Erase
from lichen.algorithms.unlearning.negate import Negate
from lichen.clients.unlearning.referenced import Referenced, reference_scores
from lichen.core.collecting.history import History
from lichen.core.contracts.algorithm import Algorithm, Report, ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.files.durable import write_atomic
from lichen.core.files.lock import one_process
from lichen.core.rounds import load_state
from lichen.core.rounds import run as run_rounds
from lichen.core.seeds import derive
from lichen.core.store import ClientStore, load_tree, save_tree
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.models.preference.negative import NegativePreferenceModel
from lichen.present.summary import read_summary
from lichen.present.trace import Event, Trace
from lichen.recipes.artifacts.inputs import inputs_of, require_rows, require_same
from lichen.recipes.assemble.aggregation import weighting_of
from lichen.recipes.assemble.column import admission_of, block_size_of
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, initial_shared, trainer
from lichen.recipes.assemble.preference.references import with_references
from lichen.recipes.assemble.run_folder import LOCK, RunFolder
from lichen.recipes.assemble.sides.withdrawal.absent import without_absent
from lichen.recipes.run import run
from lichen.recipes.schema.read import recipe_of, recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.learning import HISTORY
from lichen.recipes.withdrawal.near_fits import require_messages, require_rounds
from lichen.recipes.withdrawal.options import NearOptions
from lichen.recipes.withdrawal.proof import require_alike
from lichen.recipes.withdrawal.report import REPORT, write_report
from lichen.recipes.withdrawal.request import Request, require_same_command
from lichen.server.unlearning.part import added_by
from lichen.transforms.downlink import WHOLE

__all__ = ["unlearn"]

COLUMN = "unlearning"

Say = Callable[[str], None]


def unlearn(
    request: Request, options: NearOptions, *, against: Path | None = None, say: Say = lambda _: None
) -> dict[str, Any]:
    """Write the new folder; called again after a kill, it goes on.

    Args:
        request: What was asked; ``how`` is eraser, negate or npo.
        options: How.
        against: A run that was trained or replayed without the client, which the model is held against.
        say: Called with lines of progress.

    Returns:
        What ``withdrawal.json`` holds.

    Raises:
        LichenError: if the run does not fit the way, its rows have changed, or a folder is another's.
    """
    old, new = request.folder, request.out
    recipe = recipe_of(old)
    require_rounds(recipe, old, request.how)
    lr = float(read_summary(old)["extra"]["lr.federated"])
    if against is not None:
        require_alike(old, against)
    history = History(old / "state" / "federated" / lr_name(lr) / HISTORY)
    require_messages(recipe, old, request.how, history)
    planned = _without(recipe, request.client, lr)
    with one_process(new, LOCK, say=say):
        _claim(new, planned)
        folder = RunFolder(new, recipe_sha256=recipe_sha256(planned), say=say)
        checkpoint = folder.checkpoint("federated", lr_name(lr))
        if not checkpoint.exists():
            require_rows(new, old)
            state, average = _rounds(request, options, recipe, lr, history, folder, say)
            folder.save(checkpoint, _finished(state, average, request.how, planned.federation.rounds))
        report = new / REPORT
        if not report.exists():  # before the summary, with which the folder is finished and nothing goes on in it
            model = replace(load_state(checkpoint).best.for_model, frozen={})
            save_tree(new / "state" / "final.safetensors", model.flat())
            say("measuring what is left of the client")
            write_report(request, options=options, against=against, more={"seconds": folder.seconds()})
    run(planned, out=new, resume=True, say=say)
    found: dict[str, Any] = json.loads((new / REPORT).read_text(encoding="utf-8"))
    return found


def _without(recipe: Recipe, client: str, lr: float) -> Recipe:
    """The new folder's recipe: the client is absent, and no column but what costs no training stands beside."""
    fed = recipe.federation.model_copy(update={"absent": (*recipe.federation.absent, client), "history": False})
    optimizer = recipe.optimizer.model_copy(update={"lr": (lr,), "grid_rounds": None})
    baselines = tuple(name for name in recipe.compare.baselines if name == "base")
    compare = recipe.compare.model_copy(update={"baselines": baselines})
    sections = {"federation": fed, "optimizer": optimizer, "compare": compare, "value": None, "audit": None}
    return recipe.model_copy(update=sections)


def _claim(new: Path, planned: Recipe) -> None:
    """Begin the new folder, or go on with one of the same words.

    Raises:
        LichenError: if it was begun by another command.
    """
    text = write_recipe(planned)
    if not require_same_command(new, text):
        write_atomic(new / "recipe.yaml", text.encode())


def _finished(state: ServerState, average: Average, how: str, rounds: int) -> ServerState:
    """The federated column at its end; eraser's rounds are judged as the run's were, the others' last one is it."""
    model = state.best if how == "eraser" and state.best_round >= 0 else state.shared
    return ServerState(
        round=rounds,
        shared=model,
        optimizer=average.optimizer.init(model),
        best=model,
        best_round=rounds,
        best_value=state.best_value,
    )


def _rounds(
    request: Request,
    options: NearOptions,
    recipe: Recipe,
    lr: float,
    history: History,
    folder: RunFolder,
    say: Say,
) -> tuple[ServerState, Average]:
    """The rounds of unlearning."""
    loaded = open_recipe(recipe, say=say)
    require_same(request.folder, recipe, inputs_of(loaded))
    experiment = with_references(loaded.experiment, folder.path / "state")
    server, grid = experiment.server, lr_name(lr)
    tree, _ = load_tree(request.folder / "state" / "final.safetensors")
    learned = Shared.of_flat(tree)
    tasks, admission = dict(client_tasks(experiment)), admission_of(server, experiment.clients.auxiliary)
    average = replace(algorithm_of(server, lr, recipe.federation.rounds), admission=admission, valid_every=1)
    if recipe.wire.down:  # nothing crosses here
        average = replace(average, downlink=WHOLE)
    algorithm: Algorithm
    gone = frozenset((request.number,))
    if request.how == "eraser":
        work = tasks[average.work]
        tasks[average.work] = ClientTask(work=work.work, source=_calibrating(experiment, options))
        algorithm, start = Erase(average, history=history, gone=gone, every=options.every), initial_shared(server, lr)
    elif request.how == "negate":
        average = replace(average, rounds=options.repair, lr_scale=lambda _: 1.0)
        algorithm, start = (
            Negate(average, added=_added(request, server.recipe, history), gone=gone, rate=options.rate),
            learned,
        )
    else:
        name = f"npo {grid}"
        tasks[name] = _forgetting(experiment, lr, learned, options.beta)
        works = {**admission.works, name: tasks[name].work}
        average = replace(average, rounds=options.rounds, admission=replace(admission, works=works))
        algorithm = Alternate(
            average, client=request.number, forget=name, forget_rate=options.gamma, retain_rate=options.alpha
        )
        start = learned
    store = ClientStore(folder.clients(COLUMN, grid), listed=True)
    local = LocalEngine(
        tasks,
        store,
        base=server.model.base,
        block_size=block_size_of(recipe, store),
        device=recipe.model.device,
    )
    engine = without_absent(local, experiment.clients.absent)
    rounds, trace = average.rounds, Trace(folder.path)

    def watch(report: Report) -> None:
        event = Event(column=COLUMN, report=report, total_rounds=rounds, grid=grid)
        if not folder.traced(event):
            trace(event)
        say(f"{request.how}: round {report.round} of {rounds}")

    state = run_rounds(
        algorithm,
        engine,
        lambda: start,
        rounds=rounds,
        seed=derive(recipe.seed, "unlearning"),
        checkpoint=folder.checkpoint(COLUMN, grid),
        save=folder.save,
        observers=[watch],
    )
    return state, average


def _calibrating(experiment: Experiment, options: NearOptions) -> Any:
    """The clients' rows, for as many steps or passes as a calibration takes."""
    fed = experiment.recipe.federation
    some = None if fed.local_steps is None else max(1, round(fed.local_steps * options.local))
    passes = None if fed.local_epochs is None else max(1, round(fed.local_epochs * options.local))
    parts, rows = fed.gradient_accumulation_steps, experiment.clients.train
    return experiment.training(rows, batch=fed.batch_size, steps=some, epochs=passes, parts=parts)


def _added(request: Request, recipe: Recipe, history: History) -> dict[str, Tensor]:
    """What the client's messages have added to the model that the run gave, which is that of its best round."""
    columns = read_summary(request.folder)["training"]["federated"]
    until = columns["kept"] or columns["rounds"]
    stride = recipe.federation.server.lr
    return added_by(history, request.number, until=until, weighting=weighting_of(recipe), stride=stride)


def _forgetting(experiment: Experiment, lr: float, learned: Shared, beta: float) -> ClientTask:
    """The work of the client that goes, on its own rows, which the model before has scored once."""
    server, rows, fed = experiment.server, experiment.clients.train, experiment.recipe.federation
    parts = fed.gradient_accumulation_steps
    train = replace(trainer(server, lr), model=NegativePreferenceModel(server.model, beta=beta), accumulate=parts)

    @cache
    def scores(client: int) -> Tensor:
        source, size = experiment.evaluating(rows), rows[client].size
        device = experiment.recipe.model.device
        return reference_scores(server.model, learned, source, client, rows=size, device=device)

    batches = experiment.training(
        rows, batch=fed.batch_size, steps=fed.local_steps, epochs=fed.local_epochs, parts=parts
    )
    return ClientTask(work=train, source=Referenced(batches, scores))
