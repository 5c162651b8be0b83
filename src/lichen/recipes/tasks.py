"""What each task does from an opened recipe to its columns and its result on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lichen.algorithms.average import score
from lichen.clients.answer import LocalTeacher
from lichen.clients.evaluate import Evaluate
from lichen.clients.metrics import accuracy, macro_f1
from lichen.core.contracts import Station
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import ClientStore, save_tree
from lichen.core.tree import Tree
from lichen.data.catalog import resolve_model
from lichen.data.partition import by_client
from lichen.data.records import Record, load_records
from lichen.data.shards import ArrayShard, Shard, TextShard
from lichen.data.text import encode_classify, pad_id
from lichen.engines.local import LocalEngine
from lichen.models.features import EncoderFeatures
from lichen.models.load import load_encoder
from lichen.models.peft_format import save_adapter
from lichen.recipes.adapt import Column, Watch, adapt
from lichen.recipes.bench import Bench, values_N
from lichen.recipes.folder import RunFolder
from lichen.recipes.oneshot import oneshot
from lichen.recipes.open import Opened, fetch_named, lora_of, make_student, open_recipe, shards_of
from lichen.recipes.prepare import classes_of, draw_owners, encode, gather, owners_of
from lichen.recipes.schema import Recipe
from lichen.recipes.teach import ask, part_public, renumber, teach, vocabulary

__all__ = ["Done", "run_adapt", "run_oneshot", "run_teach"]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A finished task: its columns, its clients' names, and what else there is to tell."""

    columns: dict[str, Column]
    clients: tuple[str, ...]
    extra: dict[str, float | str | None] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


def run_adapt(recipe: Recipe, folder: RunFolder, watch: Watch, say: Say) -> Done:
    """Tasks ``chat`` and ``classify``."""
    opened = open_recipe(recipe, say=say)
    columns = adapt(opened.bench, folder, watch, say)
    best = columns["federated"].shared or {}
    extra: dict[str, float | str | None] = {}
    if recipe.task == "chat":
        if "base" in columns:
            columns["base"], extra["base.form"] = _best_form(opened, folder, columns["base"], say)
        if recipe.compare.forgotten:
            for name, shared in (("before", opened.bench.start), ("after", best)):
                say(f"perplexity on {recipe.compare.forgotten} {name} the federation")
                extra[f"forgotten.{name}"] = _forgotten(opened, folder, name, shared)
    else:
        columns["majority"] = _majority(recipe, opened.bench.train, opened.bench.test, len(opened.classes))
        extra |= _classified(columns)
    _save(opened, folder, best)
    return Done(columns=columns, clients=tuple(o.name for o in opened.owners), extra=extra)


def _score_on(bench: Bench, shards: Sequence[Shard], shared: Tree, folder: RunFolder) -> Tree:
    engine = LocalEngine(
        {"test": Station(work=Evaluate(bench.model), source=bench.evaluating(shards))},
        ClientStore(folder.path / "state" / "none"),
        base=bench.model.base,
        block_size=bench.recipe.engine.block,
    )
    everyone = tuple(range(len(shards)))
    return score(engine, Job(work="test", shared=shared, version=0, clients=everyone, seed=0, base=bench.model.base))[1]


def _best_form(opened: Opened, folder: RunFolder, own: Column, say: Say) -> tuple[Column, str]:
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
    return found[best], best


def _forgotten(opened: Opened, folder: RunFolder, name: str, shared: Tree) -> float:
    recipe, bench = opened.bench.recipe, opened.bench
    records = load_records(str(recipe.compare.forgotten), columns={})
    step = max(1, len(records) // recipe.compare.forgotten_rows)
    shard = encode(recipe, opened.tokenizer, (), form="plain")(records[::step][: recipe.compare.forgotten_rows])
    metrics = folder.tree(f"forgotten.{name}", lambda: _score_on(bench, [shard], shared, folder))
    return float(torch.exp(metrics["loss_sum"] / metrics["count"])[0])


def _labels(shard: Shard) -> np.ndarray:
    assert isinstance(shard.labels, np.ndarray)
    return shard.labels


def _majority(recipe: Recipe, train: Sequence[Shard], test: Sequence[Shard], classes: int) -> Column:
    """Always the class that is most frequent over all clients."""
    counts = np.bincount(np.concatenate([_labels(s) for s in train]), minlength=classes)
    confusion = torch.zeros(len(test), classes, classes, dtype=torch.float64)
    for i, shard in enumerate(test):
        confusion[i, :, int(counts.argmax())] = torch.from_numpy(np.bincount(_labels(shard), minlength=classes))
    metrics = {"confusion": confusion}
    return Column(value_N=values_N(recipe, metrics), metrics=metrics)


def _classified(columns: Mapping[str, Column]) -> dict[str, float | str | None]:
    """Accuracy and macro F1 over everybody's test rows together, for every column."""
    out: dict[str, float | str | None] = {}
    for name, column in columns.items():
        together = column.metrics["confusion"].sum(0)
        out[f"{name}.accuracy"] = float(accuracy(together))
        out[f"{name}.macro_f1"] = float(macro_f1(together))
    return out


def _save(opened: Opened, folder: RunFolder, best: Tree) -> None:
    """The result, as PEFT reads it where it is an adapter, else as plain tensors."""
    recipe, adapter = opened.bench.recipe, opened.bench.recipe.model.adapter
    tree = {name: x for name, x in best.items() if not name.startswith(("patch.", "answers."))}
    patch = {name: x for name, x in best.items() if name.startswith("patch.")}
    save_tree(folder.path / "state" / "final.safetensors", {**tree, **patch})
    if opened.foundation is not None:
        lora = lora_of(recipe, opened.foundation)
        try:
            save_adapter(
                folder.path / "adapter",
                tree,
                base_name=str(recipe.model.name),
                targets=lora.targets,
                rank=adapter.rank,
                alpha=adapter.alpha,
                task="CAUSAL_LM" if recipe.task == "chat" else "SEQ_CLS",
                modules_to_save=lora.heads,
                patch=patch,
            )
            opened.tokenizer.save_pretrained(folder.path / "adapter")
            return
        except LichenError:
            if not patch:
                raise  # only a patch of too high a rank may stay out of the adapter: `export --merge` takes it in
    student = recipe.model.student
    save_tree(folder.path / "model" / "model.safetensors", {**tree, **patch})
    about = {"classes": list(opened.classes), "student": student.model_dump() if student else None}
    folder.write_json("model/config.json", about)


def featured(
    recipe: Recipe, features: EncoderFeatures, tokenizer: Any, classes: Sequence[str]
) -> Callable[[Sequence[Record]], ArrayShard]:
    """How rows become frozen features."""

    def make(records: Sequence[Record]) -> ArrayShard:
        rows = encode_classify(records, tokenizer, max_length=recipe.data.max_length, classes=tuple(classes))
        x = [features.rows(torch.from_numpy(ids)[None].long(), torch.ones(1, len(ids)).long()) for ids, _ in rows]
        return ArrayShard(x=torch.cat(x).numpy(), labels=np.asarray([label for _, label in rows], dtype=np.int64))

    return make


def _encoder(recipe: Recipe, name: str) -> tuple[EncoderFeatures, Any]:
    model, tokenizer = load_encoder(resolve_model(name), device=recipe.model.device)
    return EncoderFeatures(model, normalize=True), tokenizer


def run_oneshot(recipe: Recipe, folder: RunFolder, watch: Watch, say: Say) -> Done:
    """Task ``oneshot``."""
    fetch_named(recipe, say)
    records = gather(recipe)
    classes = classes_of(recipe, records)
    owners = owners_of(recipe, records)
    features, tokenizer = _encoder(recipe, str(recipe.model.name))
    make = featured(recipe, features, tokenizer, classes)
    say(f"features of {sum(len(o.train) + len(o.test) for o in owners):,} rows of {len(owners)} clients")

    def kept(part: str) -> list[ArrayShard]:
        out = []
        for i, shard in enumerate(range(len(owners))):

            def fresh(i: int = i) -> Tree:
                made = make(getattr(owners[i], part))
                return {"x": torch.from_numpy(made.x), "labels": torch.from_numpy(made.labels)}

            tree = folder.tree(f"features/{part}-{shard}", fresh)
            out.append(ArrayShard(x=tree["x"].numpy(), labels=tree["labels"].numpy()))
        return out

    train, test = kept("train"), kept("test")
    done = oneshot(recipe, train, test, len(classes), folder, watch, say)
    columns = {**done.columns, "majority": _majority(recipe, train, test, len(classes))}
    save_tree(folder.path / "model" / "head.safetensors", done.head)
    save_tree(folder.path / "state" / "final.safetensors", done.head)
    about = {"encoder": recipe.model.name, "pooling": "mean", "normalize": True, "classes": list(classes)}
    folder.write_json("model/config.json", about)
    extra: dict[str, float | str | None] = {
        "partitions": float(done.partitions),
        "partitions.identical": float(done.identical),
        "partitions.largest_difference": done.largest_difference,
        **_classified(columns),
    }
    return Done(columns=columns, clients=tuple(o.name for o in owners), extra=extra)


def run_teach(recipe: Recipe, folder: RunFolder, watch: Watch, say: Say) -> Done:
    """Task ``teach``."""
    assert recipe.teacher is not None
    plan = recipe.teacher
    fetch_named(recipe, say)
    records = gather(recipe)
    classes = classes_of(recipe, records)
    rows = {name: [records[i] for i in index] for name, index in by_client(records).items()}
    labelled, unlabelled, private = part_public(recipe, rows)
    owners = tuple(
        replace(
            o, train=_few(o.train, plan.few, recipe.seed, o.name), valid=_few(o.valid, plan.few, recipe.seed, o.name)
        )
        for o in draw_owners(recipe, private)
    )
    say(f"{len(owners)} clients with {plan.few} labels each; {len(unlabelled):,} public texts")
    features, tokenizer = _encoder(recipe, plan.name)
    make = encode(recipe, tokenizer, classes)
    public = make([replace(r, label=None) for r in unlabelled])
    assert isinstance(public, TextShard)
    keep = sorted({int(t) for t in (pad_id(tokenizer), tokenizer.unk_token_id) if t is not None})
    words = vocabulary([public], size=4096, keep=keep)
    unknown = words[int(tokenizer.unk_token_id if tokenizer.unk_token_id is not None else keep[0])]

    def short(part: str) -> tuple[Shard, ...]:
        return tuple(renumber(s, words, unknown) for s in shards_of(owners, part, make) if isinstance(s, TextShard))

    train = short("train")
    model = make_student(recipe, train[0], len(classes), vocabulary=len(words))
    bench = Bench(
        recipe=recipe,
        model=model,
        start=model.init(derive(recipe.seed, "init")),
        train=train,
        valid=short("valid"),
        test=short("test"),
        pad=words[pad_id(tokenizer)],
    )
    featurise = featured(recipe, features, tokenizer, classes)
    teacher = _lazy_teacher(recipe, featurise, labelled, classes, say)
    texts = [r.text for r in unlabelled]

    def judged() -> torch.Tensor:
        index = {c: i for i, c in enumerate(classes)}
        out = torch.zeros(len(owners), len(classes), len(classes), dtype=torch.float64)
        for i, owner in enumerate(owners):
            for record, answer in zip(owner.test, teacher().answer([r.text for r in owner.test]), strict=True):
                out[i, index[str(record.label)], index[answer.label]] += 1
        return out

    lesson = teach(
        bench,
        renumber(public, words, unknown),
        lambda: ask(teacher(), texts, classes, plan.top_k, folder),
        judged,
        folder,
        watch,
        say,
    )
    # Every client is sent the public texts once; their answers ride along in every job.
    text_bytes = sum(len(t.encode()) for t in texts) * len(owners)
    columns = {**lesson.columns, "majority": _majority(recipe, bench.train, bench.test, len(classes))}
    best = columns["federated"].shared or {}
    tree = {name: x for name, x in best.items() if not name.startswith("answers.")}
    save_tree(folder.path / "state" / "final.safetensors", tree)
    save_tree(folder.path / "model" / "model.safetensors", tree)
    assert recipe.model.student is not None
    about = {"classes": list(classes), "student": recipe.model.student.model_dump(), "tokenizer": plan.name}
    folder.write_json("model/config.json", {**about, "vocabulary": list(words)})
    extra: dict[str, float | str | None] = {
        "answers": float(len(texts)),
        "answers.bytes_to_teacher": float(lesson.bytes_down),
        "answers.bytes_from_teacher": float(lesson.bytes_up),
        "public_texts.bytes": float(text_bytes),
        **_classified(columns),
    }
    return Done(
        columns=columns,
        clients=tuple(o.name for o in owners),
        extra=extra,
        bytes_up=lesson.bytes_up,
        bytes_down=lesson.bytes_down + text_bytes,
    )


def _few(rows: Sequence[Record], few: int, seed: int, name: str) -> tuple[Record, ...]:
    order = np.random.default_rng(derive(seed, "few", name)).permutation(len(rows))
    return tuple(rows[i] for i in sorted(order[:few]))


def _lazy_teacher(
    recipe: Recipe,
    featurise: Callable[[Sequence[Record]], ArrayShard],
    labelled: Sequence[Record],
    classes: Sequence[str],
    say: Say,
) -> Callable[[], LocalTeacher]:
    """A teacher made when first asked: a logistic head on frozen features of the public labelled rows."""
    made: list[LocalTeacher] = []

    def get() -> LocalTeacher:
        if not made:
            from sklearn.linear_model import LogisticRegression

            say(f"training the teacher's head on {len(labelled):,} public rows")
            known = featurise(labelled)
            head = LogisticRegression(max_iter=2000, C=10.0, class_weight="balanced").fit(known.x, known.labels)

            def classify(texts: Sequence[str]) -> torch.Tensor:
                x = featurise([Record(client="", text=text) for text in texts]).x
                logits = torch.full((len(texts), len(classes)), -torch.inf, dtype=torch.float64)
                logits[:, torch.from_numpy(head.classes_)] = torch.from_numpy(head.decision_function(x))
                return logits

            assert recipe.teacher is not None
            made.append(LocalTeacher(classify, classes=classes, top_k=recipe.teacher.top_k))
        return made[0]

    return get
