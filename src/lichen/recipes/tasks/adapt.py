"""Runs tasks ``chat`` and ``classify``, from experiment to result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lichen.algorithms.average import score
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.core.contracts import Station
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.store import ClientStore, save_tree, write_atomic
from lichen.core.tree import Tree
from lichen.data.batches.shards import Shard
from lichen.data.sources.records import load_records
from lichen.engines.local import LocalEngine
from lichen.models.peft.format import has_peft_format, save_adapter
from lichen.present.trace import read_trace
from lichen.recipes.artifacts.inputs import agree, inputs_of
from lichen.recipes.assemble.chat_template import keep_template
from lichen.recipes.assemble.class_names import save_class_names
from lichen.recipes.assemble.column import Column, among, room_of
from lichen.recipes.assemble.experiment import Bench, values_N
from lichen.recipes.assemble.model import SCRATCH, STUDENT_TOKENIZER, base_name_of, described_base, spec_of
from lichen.recipes.assemble.open import Opened, fetch_named, open_recipe, shards_of
from lichen.recipes.assemble.parts import validators_of
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.help.steps import help_of
from lichen.recipes.rows.client_counts import counts_of, shared_test
from lichen.recipes.rows.prepare import encode
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.columns import Watch, adapt
from lichen.recipes.tasks.coverage import trained
from lichen.recipes.tasks.outcome import Done, classified, gained, majority, tested

__all__ = ["run_adapt"]

Say = Callable[[str], None]


def run_adapt(recipe: Recipe, folder: RunFolder, watch: Watch, say: Say) -> Done:
    """Tasks ``chat`` and ``classify``."""
    with folder.ranks.ahead():
        fetch_named(recipe, say)
    opened = open_recipe(recipe, say=say, tell_read=True)
    with folder.ranks.ahead():
        keep_template(recipe, opened.tokenizer, folder.path)
    agree(folder, recipe, inputs_of(opened))
    save_class_names(folder, opened.classes)
    helped = help_of(opened, folder, say)
    columns = {**helped.columns, **adapt(helped.bench, folder, watch, say, plain=opened.bench)}
    best = columns["federated"].shared or {}
    extra = dict(helped.extra)
    if recipe.task == "chat":
        if "base" in columns:
            columns["base"], forms = _best_form(opened, folder, columns["base"], say)
            extra |= forms
        if recipe.compare.forgotten:
            for name, shared in (("before", opened.bench.start), ("after", best)):
                say(f"perplexity on {recipe.compare.forgotten} {name} the federation")
                extra[f"forgotten.{name}"] = _forgotten(opened, folder, name, shared)
        if "without" in columns:
            extra |= gained(columns["federated"], columns["without"], lower_is_better=True)
    else:
        columns["majority"] = majority(recipe, opened.bench.train, opened.bench.test, len(opened.classes))
        extra |= classified(columns) | tested([o.test for o in opened.owners], opened.classes)
        if "without" in columns:
            extra |= gained(columns["federated"], columns["without"])
    if folder.ranks.first:
        _save(opened, folder, best)
    return Done(
        columns=columns,
        clients=tuple(o.name for o in opened.owners),
        extra=extra,
        bytes_up=helped.bytes_up,
        bytes_down=helped.bytes_down,
        read=opened.read,
        validators=len(validators_of(opened.bench)),
        counts=counts_of(recipe, opened.owners, opened.tokenizer),
        training=trained(helped.bench, opened.bench, columns, read_trace(folder.path)) if folder.ranks.first else {},
        common_test=shared_test(opened.owners),
    )


def _score_on(bench: Bench, shards: Sequence[Shard], shared: Tree, folder: RunFolder) -> Tree:
    store = ClientStore(folder.path / "state" / "none")
    local = LocalEngine(
        {"test": Station(work=Evaluate(bench.model), source=bench.evaluating(shards))},
        store,
        base=bench.model.base,
        block_size=room_of(bench.recipe, store),
        device=bench.recipe.model.device,
    )
    everyone = tuple(range(len(shards)))
    job = Job(work="test", shared=shared, version=0, clients=everyone, seed=0, base=bench.model.base)
    return score(among(folder.ranks, local), job)[1]


def _best_form(
    opened: Opened, folder: RunFolder, own: Column, say: Say
) -> tuple[Column, dict[str, float | str | None]]:
    """The bare model in the form that suits it best: no straw man."""
    recipe, bench = opened.bench.recipe, opened.bench
    found = {recipe.data.form: own}
    for form in recipe.compare.forms:
        if form not in found:
            say(f"scoring the foundation model in form {form}")
            shards = shards_of(opened.owners, "test", encode(recipe, opened.tokenizer, (), form=form))
            metrics = folder.tree(f"base.{form}", lambda shards=shards: _score_on(bench, shards, bench.start, folder))  # type: ignore[misc]
            found[form] = Column(value_N=values_N(recipe, metrics), metrics=metrics)
    best = min(found, key=lambda form: float(found[form].value_N.mean()))
    scores = {f"base.{form}": float(column.value_N.mean()) for form, column in found.items()}
    return found[best], {"base.form": best, **scores}


def _forgotten(opened: Opened, folder: RunFolder, name: str, shared: Tree) -> float:
    recipe, bench = opened.bench.recipe, opened.bench
    records = load_records(str(recipe.compare.forgotten), columns={})
    step = max(1, len(records) // recipe.compare.forgotten_rows)
    shard = encode(recipe, opened.tokenizer, (), form="plain")(records[::step][: recipe.compare.forgotten_rows])
    metrics = folder.tree(f"forgotten.{name}", lambda: _score_on(bench, [shard], shared, folder))
    return float(torch.exp(metrics["loss_sum"] / metrics["count"])[0])


def _save(opened: Opened, folder: RunFolder, best: Tree) -> None:
    """The result, as PEFT reads it where it is an adapter, else as plain tensors."""
    recipe = opened.bench.recipe
    tree = {name: x for name, x in best.items() if not name.startswith(("patch.", "answers."))}
    patch = {name: x for name, x in best.items() if name.startswith("patch.")}
    save_tree(folder.path / "state" / "final.safetensors", {**tree, **patch})
    if recipe.model.scratch is not None:  # its tokenizer was learned from rows that may be gone tomorrow
        for file in sorted(Path(base_name_of(opened.foundation)).iterdir()):
            write_atomic(folder.path / SCRATCH / file.name, file.read_bytes())
    if opened.foundation is not None and recipe.model.adapter.kind != "full" and recipe.optimizer.name != "cma":
        spec = spec_of(recipe, opened.foundation)
        try:
            save_adapter(
                folder.path / "adapter",
                tree,
                spec=spec,
                base_name=described_base(recipe, opened.foundation),
                task="CAUSAL_LM" if recipe.task == "chat" else "SEQ_CLS",
                patch=patch,
            )
            opened.tokenizer.save_pretrained(folder.path / "adapter")
            if opened.classes:
                folder.write_json("adapter/classes.json", list(opened.classes), shared=True)
            return
        except LichenError:
            if not patch and has_peft_format(spec):
                raise  # only a patch of too high a rank may stay out of the adapter: `export --merge` takes it in
    student = recipe.model.student
    save_tree(folder.path / "model" / "model.safetensors", {**tree, **patch}, shared=True)
    reads_text = opened.tokenizer is not None and opened.foundation is None
    about = {
        "classes": list(opened.classes),
        "student": student.model_dump() if student else None,
        "tokenizer": STUDENT_TOKENIZER if reads_text else None,
        "vocabulary": list(opened.vocabulary.words) if opened.vocabulary else None,
    }
    folder.write_json("model/config.json", about, shared=True)
