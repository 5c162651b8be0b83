"""Runs tasks ``chat`` and ``classify``, from experiment to result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lichen.algorithms.scores import score
from lichen.clients.attack.rows import Backdoor
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import CohortModel
from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder, write_atomic
from lichen.core.message import Job
from lichen.core.store import ClientStore, save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import Shard
from lichen.data.batches.text import LmForm
from lichen.data.sources.records import load_records
from lichen.engines.local import LocalEngine
from lichen.engines.ranks import Ranks
from lichen.models.adapters.ends.end_blocks import end_blocks
from lichen.models.loading.emulator_folder import EMULATOR
from lichen.models.peft.format import has_peft_format, save_adapter
from lichen.models.preference.model import PreferenceModel
from lichen.models.students.student import row_shape_of
from lichen.present.report import attack_text
from lichen.present.trace import read_trace
from lichen.recipes.artifacts.inputs import agree, inputs_of
from lichen.recipes.assemble.chat_template import keep_template
from lichen.recipes.assemble.class_names import save_class_names
from lichen.recipes.assemble.column import Column, block_size_of, over_ranks
from lichen.recipes.assemble.experiment import Experiment, metric_of, values_N
from lichen.recipes.assemble.model import SCRATCH, STUDENT_TOKENIZER, base_name_of, described_base, spec_of
from lichen.recipes.assemble.open import LoadedExperiment, fetch_named, open_recipe, shards_of
from lichen.recipes.assemble.parts import validators_of
from lichen.recipes.assemble.preference.numbers import preference_numbers
from lichen.recipes.assemble.preference.references import with_references
from lichen.recipes.assemble.run_folder import RunFolder, save_roster
from lichen.recipes.assemble.sides.attack import who_lied
from lichen.recipes.assemble.sides.canaries import canary_key
from lichen.recipes.assemble.sides.fingerprints import digests_of, fingerprints_of, register
from lichen.recipes.assemble.sides.limits import counting
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.assemble.sides.splitting.reading import crossing_numbers
from lichen.recipes.assemble.workload import pooled_experiment
from lichen.recipes.help.steps import apply_help
from lichen.recipes.proxy.columns import proxy_columns, refuse_proxy
from lichen.recipes.rows.client_counts import counts_of, shared_test
from lichen.recipes.rows.prepare import encode
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.columns import adapt
from lichen.recipes.tasks.coverage import trained
from lichen.recipes.tasks.learning import EventObserver
from lichen.recipes.tasks.offsite.owner_columns import open_owner
from lichen.recipes.tasks.offsite.realign import without_middle
from lichen.recipes.tasks.outcome import TaskResult, baseline, gained, not_scored, over_all_rows, tested
from lichen.recipes.tasks.personal_columns import personal_numbers
from lichen.recipes.tasks.repair import safety
from lichen.recipes.tasks.training_flops import compute_of
from lichen.tasks.registry import task_of

__all__ = ["retention_shard", "run_adapt", "save_result", "score_on"]

Say = Callable[[str], None]
Form = LmForm | Literal["stream"]


def run_adapt(recipe: Recipe, folder: RunFolder, observer: EventObserver, say: Say) -> TaskResult:
    """Any task that is learned in rounds."""
    with folder.ranks.ahead():
        fetch_named(recipe, say)
    loaded = open_recipe(recipe, say=say, report_counts=True)
    with folder.ranks.ahead():
        refuse_proxy(loaded, say)
        keep_template(recipe, loaded.tokenizer, folder.path)
    agree(folder, recipe, inputs_of(loaded))
    save_class_names(folder, loaded.classes)
    save_roster(folder, loaded.experiment.server.roster, loaded.cards)
    with folder.ranks.ahead():
        register(folder.path, digests_of(fingerprints_of(recipe, [one.name for one in loaded.clients_data])))
    loaded = _planted(loaded.fingerprinted(), folder, say)
    loaded = replace(loaded, experiment=with_references(loaded.experiment, folder.path / "state"))
    attack = who_lied(loaded.experiment.server)
    if attack is not None:
        say(f"attacked on purpose: {attack_text(attack, len(loaded.clients_data))}")
    owner = None if recipe.offsite is None else open_owner(loaded, recipe.offsite.model, say)
    if owner is not None:
        loaded = owner.aligning(loaded, say)
    help_result = apply_help(loaded, folder, say)
    columns = {**help_result.columns, **adapt(help_result.experiment, folder, observer, say, plain=loaded.experiment)}
    best = columns["federated"].shared or Shared()
    if owner is not None:
        columns |= owner.columns(columns, folder, observer, say)
    columns |= proxy_columns(loaded, folder, best, say, score=partial(score_on, path=folder.path, ranks=folder.ranks))
    extra = {**help_result.extra, **({} if owner is None else owner.numbers(columns))}
    if recipe.audit is not None:
        extra["canaries"] = recipe.audit.canaries
    if recipe.prefers:
        extra |= preference_numbers(recipe, columns) | not_scored(columns, len(loaded.clients_data))
    if recipe.writes:
        if "base" in columns and not recipe.prefers and owner is None:
            columns["base"], forms = _best_form(loaded, folder, columns["base"], say)
            extra |= forms
        if recipe.compare.retention_text:
            for name, shared in (("before", loaded.experiment.start), ("after", best)):
                say(f"perplexity on {recipe.compare.retention_text} {name} the federation")
                extra[f"forgotten.{name}"] = _forgotten(loaded, folder, name, shared)
        extra |= safety(recipe, folder, loaded.foundation, loaded.tokenizer, loaded.experiment.start, columns, say)
    else:
        columns |= baseline(recipe, loaded.experiment.clients.train, loaded.experiment.clients.test, loaded.classes)
        extra |= over_all_rows(recipe, columns)
        if recipe.classifies:
            extra |= tested([o.test for o in loaded.clients_data], loaded.classes)
    if "without" in columns:
        up = metric_of(recipe).higher_is_better
        extra |= gained(columns["federated"], columns["without"], higher_is_better=up)

    extra |= personal_numbers(recipe, columns)
    if recipe.personal is not None and shared_test(loaded.clients_data):
        extra["personal.tested on"] = "rows that all share, not of each client's mix, for which its own model is made"
    extra |= _attack_success(loaded.experiment, best, folder, say)
    extra |= crossing_numbers(loaded.experiment.server, loaded.experiment.clients.test, best)

    def side(column: str) -> ServerSide:
        if column in ("pooled", "full"):
            one = owner.full if owner is not None and column == "full" else loaded.experiment
            return pooled_experiment(one).server
        return (help_result.experiment if column == "federated" else loaded.experiment).server

    if folder.ranks.first:
        words = loaded.vocabulary.words if loaded.vocabulary else None
        model, classes = loaded.experiment.model, loaded.classes
        save_result(folder, recipe, best, model, loaded.foundation, loaded.tokenizer, classes, words=words)
    events = read_trace(folder.path) if folder.ranks.first else ()
    training, start = trained(side, columns, events), loaded.experiment.start.trainable
    on_foundation = {name: seen for name, seen in training.items() if name != "full"}
    return TaskResult(
        columns=columns,
        clients=tuple(o.name for o in loaded.clients_data),
        extra=extra,
        bytes_up=help_result.bytes_up,
        bytes_down=help_result.bytes_down,
        read=loaded.read,
        cards=loaded.cards,
        validators=len(validators_of(loaded.experiment.server)),
        counts=counts_of(recipe, loaded.clients_data, loaded.tokenizer),
        training=training,
        common_test=shared_test(loaded.clients_data),
        attack=attack,
        compute=compute_of(recipe, loaded.foundation, start, columns, on_foundation, events),
    )


def _planted(loaded: LoadedExperiment, folder: RunFolder, say: Say) -> LoadedExperiment:
    """With canaries among the rows that the federation trains on, where the recipe has them."""
    recipe = loaded.experiment.recipe
    if recipe.audit is None:
        return loaded
    folder.ranks.ask_first(lambda: canary_key(recipe, folder.path, begun=bool(folder.finished())) and None)
    say(f"{recipe.audit.canaries} canaries, each trained on by a secret coin: of `lichen audit`, not to be given away")
    return loaded.planted(canary_key(recipe, folder.path, begun=True))


def score_on(
    experiment: Experiment, shards: Sequence[Shard], shared: Shared, path: Path, ranks: Ranks | None = None
) -> Tree:
    """What a model scores on rows: sums over each shard, as :class:`Evaluate` gives them.

    Args:
        experiment: Whose model it is.
        shards: The rows, such as one shard a client.
        shared: The model's tensors.
        path: A folder whose ``state`` holds no private tensors that are needed here.
        ranks: Who scores together.
    """
    store = ClientStore(path / "state" / "none")
    model = experiment.model.inner if isinstance(experiment.model, PreferenceModel) else experiment.model
    work = Evaluate(model)
    local = LocalEngine(
        {"test": ClientTask(work=work, source=experiment.evaluating(shards))},
        store,
        base=experiment.model.base,
        block_size=block_size_of(experiment.recipe, store),
        device=experiment.recipe.model.device,
    )
    everyone = tuple(range(len(shards)))
    job = Job(work="test", shared=shared, version=0, clients=everyone, seed=0, base=experiment.model.base)
    each = experiment.recipe.data.max_length if experiment.recipe.writes else 1
    admission = counting("test", work, [shard.size * each for shard in shards])
    return score(over_ranks(ranks or Ranks(), local), job, admission)[1]


def _attack_success(experiment: Experiment, after: Shared, folder: RunFolder, say: Say) -> dict[str, float]:
    """Share of all test rows of other classes that are given a backdoor's target once the trigger is on them."""
    poison = experiment.clients.poison
    if not isinstance(poison, Backdoor):
        return {}
    say("scoring test rows with the trigger on them")
    victims, out = [poison.victims(shard) for shard in experiment.clients.test], dict[str, float]()
    for when, shared in (("before", experiment.start), ("after", after)):
        name = f"attack_success.{when}"
        metrics = folder.tree(name, partial(score_on, experiment, victims, shared, folder.path, folder.ranks))
        given_KK = metrics["confusion"].sum(0)
        out[name] = float(given_KK[:, poison.target].sum() / given_KK.sum())
    return out


def _best_form(
    loaded: LoadedExperiment, folder: RunFolder, own: Column, say: Say
) -> tuple[Column, dict[str, float | str | None]]:
    """The bare model in the form that suits it best on validation rows: no straw man, and none chosen by its score."""
    recipe, experiment = loaded.experiment.recipe, loaded.experiment

    def scored(form: Form, part: Literal["valid", "test"]) -> Column:
        name = f"base.{form}" if part == "test" else f"base.{form}.{part}"
        shards = experiment.clients.valid
        if form != recipe.data.form:
            shards = shards_of(loaded.clients_data, part, encode(recipe, loaded.tokenizer, (), form=form))
        metrics = folder.tree(name, partial(score_on, experiment, shards, experiment.start, folder.path, folder.ranks))
        return Column(value_N=values_N(recipe, metrics), metrics=metrics)

    forms: tuple[Form, ...] = tuple(dict.fromkeys((recipe.data.form, *recipe.compare.forms)))
    if len(forms) == 1:
        return own, {"base.form": forms[0], f"base.{forms[0]}": float(own.value_N.nanmean())}
    found: dict[Form, Column] = {recipe.data.form: own}
    valid: dict[Form, float] = {}
    for form in forms:
        say(f"scoring the foundation model in form {form}")
        valid[form] = float(scored(form, "valid").value_N.nanmean())
        found.setdefault(form, own if form == recipe.data.form else scored(form, "test"))
    best = min(valid, key=lambda form: math.inf if math.isnan(valid[form]) else valid[form])
    scores = {f"base.{form}": float(column.value_N.nanmean()) for form, column in found.items()}
    return found[best], {"base.form": best, **scores}


def _forgotten(loaded: LoadedExperiment, folder: RunFolder, name: str, shared: Shared) -> float:
    experiment, shard = loaded.experiment, retention_shard(loaded)
    metrics = folder.tree(f"forgotten.{name}", lambda: score_on(experiment, [shard], shared, folder.path, folder.ranks))
    return float(torch.exp(metrics["loss_sum"] / metrics["count"])[0])


def retention_shard(loaded: LoadedExperiment) -> Shard:
    """The rows of ``compare.retention_text``, as the recipe's model reads them."""
    recipe = loaded.experiment.recipe
    records = load_records(str(recipe.compare.retention_text), columns={})
    step = max(1, len(records) // recipe.compare.retention_rows)
    return encode(recipe, loaded.tokenizer, (), form="plain")(records[::step][: recipe.compare.retention_rows])


def save_result(
    folder: RunFolder,
    recipe: Recipe,
    best: Shared,
    model: CohortModel,
    foundation: Any,
    tokenizer: Any,
    classes: Sequence[str],
    *,
    words: Mapping[int, int] | None = None,
) -> None:
    """Write the result, as PEFT reads it where it is an adapter, else as plain tensors.

    Args:
        folder: The run folder.
        recipe: The recipe.
        best: The tensors.
        model: What they are of.
        foundation: The frozen transformers model; None for a student.
        tokenizer: Its tokenizer, or the one that a student's texts need; None without one.
        classes: In the order of the logits; none for a language model.
        words: A student's words, where they were taken from public text.
    """
    tree, patch, flat = best.trainable, best.patch, replace(best, frozen={}).flat()
    save_tree(folder.path / "state" / "final.safetensors", flat)
    if recipe.model.scratch is not None:  # its tokenizer was learned from rows that may be gone tomorrow
        for file in sorted(Path(base_name_of(foundation)).glob("[!.]*")):
            write_atomic(folder.path / SCRATCH / file.name, file.read_bytes())
    if foundation is not None and not recipe.model.adapter.facts.whole and not recipe.method.asks_only:
        spec = spec_of(recipe, foundation)
        try:
            with whole_folder(folder.path / "adapter") as draft:
                save_adapter(
                    draft,
                    tree,
                    spec=spec,
                    base_name=described_base(recipe, foundation),
                    task=task_of(recipe.task).peft,
                    patch=without_middle(patch, model),
                    full_names=end_blocks(foundation) is not None,
                )
                tokenizer.save_pretrained(draft)
                _copy_manifest(foundation, draft)
                if classes:
                    write_atomic(
                        draft / "classes.json", (json.dumps(list(classes), indent=2) + "\n").encode(), shared=True
                    )
            return
        except LichenError:
            if not patch and has_peft_format(spec):
                raise  # only a patch of too high a rank may stay out of the adapter: `export --merge` takes it in
    student = recipe.model.student
    save_tree(folder.path / "model" / "model.safetensors", flat, shared=True)
    if foundation is not None:
        _copy_manifest(foundation, folder.path / "model")
    reads_text = tokenizer is not None and foundation is None
    about = {
        "classes": list(classes),
        "student": student.model_dump() if student else None,
        "tokenizer": STUDENT_TOKENIZER if reads_text else None,
        "vocabulary": list(words) if words else None,
        "row_shape": list(row_shape_of(model)),
    }
    folder.write_json("model/config.json", about, shared=True)


def _copy_manifest(foundation: Any, folder: Path) -> None:
    """Put the emulator's manifest beside what was trained on one, which says into which model it goes."""
    if end_blocks(foundation) is not None:
        write_atomic(folder / EMULATOR, (Path(base_name_of(foundation)) / EMULATOR).read_bytes(), shared=True)
