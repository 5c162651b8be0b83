"""Generates synthetic rows for a recipe, by label or by Private Evolution.

What is written passes the recipe's filters, with a reason for every text that does not, and becomes a pool
that only grows. Who trains on it is decided in :mod:`lichen.recipes.help.steps`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import torch

from lichen.algorithms.private_evolution import PrivateEvolution
from lichen.clients.distillation.teacher_labels import NoBatches
from lichen.clients.statistics.leakage import Leakage, flags
from lichen.clients.statistics.nearest_vote import NearestNeighborHistogram
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.seeds import derive, numpy_generator
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.data.sources.records import Record
from lichen.data.synthetic.filters import Filter, Rule, Sifted, duplicates, flagged, junk, length, repetition, scored
from lichen.data.synthetic.pool import Pool, SyntheticRow, mix, save_pool
from lichen.engines.local import LocalEngine
from lichen.fm.disclosure import Origin
from lichen.fm.generation.balance import texts_to_write
from lichen.fm.generation.judge import Judge, agreement_N
from lichen.fm.generation.synthesis import Writer
from lichen.fm.zero_shot import Teacher
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.help.foundation_models import FMRegistry
from lichen.recipes.rows.prepare import ClientData
from lichen.recipes.schema.help import SyntheticConfig
from lichen.server.mean import Mean
from lichen.transforms.privacy import delta_for, sigma_for

__all__ = ["deal_out", "write_pool", "write_synthetic", "writer_of"]

Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticResult:
    """A pool, and what it took.

    Attributes:
        pool: The texts that passed.
        extra: Numbers to tell.
        bytes_up: Bytes of votes and of flags.
        bytes_down: Bytes of candidates.
    """

    pool: Pool
    extra: dict[str, float | str | None] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


def write_synthetic(
    loaded: LoadedExperiment,
    foundation_models: FMRegistry,
    folder: RunFolder,
    say: Say,
    teacher: Callable[[], Teacher] | None = None,
) -> SyntheticResult:
    """Write, sift, keep: ``pool.jsonl`` in the run's folder holds every text that passed.

    Args:
        loaded: The recipe with its rows.
        foundation_models: Its foundation models.
        folder: The run's folder.
        say: Called with lines of progress.
        teacher: Who says whether a text has its label, for the filter ``agreement``.

    Raises:
        LichenError: if nothing that was written can be used.
    """
    recipe = loaded.experiment.recipe
    section = recipe.synthetic
    assert section is not None
    writer = writer_of(loaded, foundation_models, section)
    made = (
        _evolved(loaded, foundation_models, writer, folder, say)
        if section.kind == "evolution"
        else _prompted(loaded, writer, say)
    )
    if not made.pool.rows:
        raise LichenError(
            f"{writer.fm.name} wrote nothing usable", where="synthetic", fix="ask another way, or another model"
        )
    rules, up, down = _rules(loaded, foundation_models, section, made.pool, folder, teacher)
    sifted = Filter(rules)([row.text for row in made.pool.rows])
    say(f"of what was written: {sifted}")
    passed = Pool(tuple(made.pool.rows[i] for i in sifted.passed))
    if not passed.rows:
        raise LichenError(
            "nothing that was written passed the filters", where="synthetic", fix=f"{sifted}; ask another way"
        )
    write_pool(folder, passed, sifted)
    extra: dict[str, float | str | None] = {
        "synthetic.written": float(len(made.pool.rows)),
        "synthetic.kept": float(len(passed.rows)),
    }
    extra |= {f"synthetic.dropped.{name}": float(count) for name, count in sifted.counts.items()}
    return replace(
        made, pool=passed, extra={**made.extra, **extra}, bytes_up=made.bytes_up + up, bytes_down=made.bytes_down + down
    )


def write_pool(folder: RunFolder, pool: Pool, sifted: Sifted) -> None:
    """``pool.jsonl`` with what passed, and ``dropped.json`` with why the rest did not."""
    if folder.ranks.first:
        save_pool(folder.path / "pool.jsonl", pool)
        dropped = {str(i): {"rule": rule, "why": why} for i, (rule, why) in sifted.dropped.items()}
        folder.write_json("dropped.json", dropped)


def writer_of(loaded: LoadedExperiment, foundation_models: FMRegistry, section: SyntheticConfig) -> Writer:
    """The writer of a recipe, who is shown public labelled rows and no others."""
    policy = foundation_models.writer(section.name, section.endpoint, ("public", "synthetic"), chat=not section.plain)
    known = loaded.public_split.labelled
    order = numpy_generator(loaded.experiment.recipe.seed, "examples").permutation(len(known))
    short = [known[i] for i in order if len(known[i].text.split()) <= section.max_new_tokens]
    each: Counter[str] = Counter()
    shown: list[tuple[str | int, str]] = []
    for record in short:
        label = str(record.label)
        if each[label] < 4 * section.examples:
            each[label] += 1
            shown.append((label, record.text))
    return Writer(
        policy.of("public"),
        about=section.about or f"a {section.item_name}",
        labels={c: section.labels.get(c, c) for c in loaded.classes},
        kind=section.item_name,
        attributes=section.attributes,
        examples=shown,
        shots=section.examples,
        style=section.style,
        plain=section.plain,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
    )


def _prompted(loaded: LoadedExperiment, writer: Writer, say: Say) -> SyntheticResult:
    section, seed = loaded.experiment.recipe.synthetic, derive(loaded.experiment.recipe.seed, "synthetic")
    assert section is not None
    rows: list[SyntheticRow] = []
    for label in loaded.classes:
        say(f"writing {section.per_class} of {label}")
        found = writer.write(label, section.per_class, seed=seed)
        rows += [
            SyntheticRow(w.text, label=label, model=writer.fm.name, prompt=w.prompt, seed=w.seed, tokens=w.tokens)
            for w in found
        ]
    return SyntheticResult(pool=Pool().grow(rows, generation=0))


def _evolved(
    loaded: LoadedExperiment, foundation_models: FMRegistry, writer: Writer, folder: RunFolder, say: Say
) -> SyntheticResult:
    recipe, classes = loaded.experiment.recipe, loaded.classes
    section = recipe.synthetic
    assert section is not None
    embed = foundation_models.encoder(section.embedder).embed
    say(f"features of {sum(len(o.train) for o in loaded.clients_data):,} private rows, where they are")
    index = {c: i for i, c in enumerate(classes)}

    def shard(client_data: ClientData) -> ArrayShard:
        x = embed([r.text for r in client_data.train]).numpy()
        return ArrayShard(x=x, labels=np.asarray([index[str(r.label)] for r in client_data.train], dtype=np.int64))

    shards = [shard(client_data) for client_data in loaded.clients_data]
    rows = sum(s.size for s in shards)
    vote = NearestNeighborHistogram(lambda batch: batch["x_CBF"])
    engine = LocalEngine(
        {"vote": ClientTask(work=vote, source=EvalSource(shards, batch_size=64))},
        ClientStore(folder.path / "state" / "none"),
        block_size=16,
    )
    delta = section.delta or delta_for(rows)
    sensitivity = vote.sensitivity("row", "add-or-remove")
    sigma = 0.0
    if section.epsilon is not None:
        sigma = sigma_for(section.epsilon, delta, section.iterations, sensitivity=sensitivity)
    evolution = PrivateEvolution(
        fresh=lambda label, count, seed: _enough(writer, classes[label], count, seed),
        vary=lambda texts, labels, seed: writer.vary(texts, [classes[k] for k in labels], seed),
        embed=embed,
        counts=dict.fromkeys(range(len(classes)), section.per_class),
        weight_N=torch.tensor([s.size for s in shards], dtype=torch.float64),
        rounds=section.iterations,
        sigma=sigma,
        delta=delta,
        sensitivity=sensitivity,
        unit="row",
        variations=section.variations,
        admission=Admission(works={"vote": vote}),
    )
    state = run(
        evolution,
        engine,
        Shared,
        rounds=section.iterations,
        seed=derive(recipe.seed, "evolution"),
        checkpoint=folder.checkpoint("evolution", "votes"),
        save=folder.save,
        observers=[lambda report: say(f"votes, round {report.round} of {section.iterations}")],
    )
    evolved = evolution.finish(state)
    promise = str(evolved.privacy)
    pool = Pool().grow(
        [
            SyntheticRow(text, label=classes[k], model=writer.fm.name, seed=recipe.seed, privacy=promise)
            for text, k in zip(evolved.texts, evolved.labels, strict=True)
        ],
        generation=0,
    )
    extra: dict[str, float | str | None] = {
        "synthetic.privacy": promise,
        "synthetic.sigma": sigma,
        "synthetic.delta": delta,
        "synthetic.epsilon": None if section.epsilon is None else evolved.privacy.epsilon,
    }
    return SyntheticResult(pool=pool, extra=extra, bytes_up=engine.bytes_up, bytes_down=engine.bytes_down)


def _enough(writer: Writer, label: str, count: int, seed: int) -> list[str]:
    """So many texts, asked for again where some were of no use; at last some stand there twice."""
    found: list[str] = []
    for turn in range(3):
        found += writer.fresh(label, count - len(found), derive(seed, turn))
        if len(found) >= count:
            return found[:count]
    if not found:
        raise LichenError(
            f"{writer.fm.name} writes nothing usable of {label}",
            where="synthetic",
            fix="ask another way, or another model",
        )
    return [found[i % len(found)] for i in range(count)]


def _rules(
    loaded: LoadedExperiment,
    foundation_models: FMRegistry,
    section: SyntheticConfig,
    pool: Pool,
    folder: RunFolder,
    teacher: Callable[[], Teacher] | None,
) -> tuple[dict[str, Rule], int, int]:
    """``(rules by name, bytes up, bytes down)``; clients are asked for copies of their rows where that is wanted."""
    texts = [row.text for row in pool.rows]
    rules: dict[str, Rule] = {}
    up = down = 0
    for name in section.sieve:
        if name == "length":
            rules |= {"length": length(least=3), "repetition": repetition(), "junk": junk()}
        elif name == "duplicates":
            rules["duplicates"] = duplicates(against=[r.text for r in loaded.public_split.labelled])
        elif name == "agreement":
            assert teacher is not None
            agree_N = agreement_N(teacher(), texts, [str(row.label) for row in pool.rows])
            rules["agreement"] = scored(agree_N.tolist(), least=0.5)
        elif name in ("fluency", "harm"):
            rules[name] = _judged(loaded, foundation_models, section, texts, name)
        else:
            bits, up, down = _leaks(loaded, texts, folder)
            rules["leakage"] = flagged(bits)
    return rules, up, down


def _judged(
    loaded: LoadedExperiment, foundation_models: FMRegistry, section: SyntheticConfig, texts: Sequence[str], name: str
) -> Rule:
    """The writer's model on fluency or harm, the line drawn where it leaves out one of a hundred public rows."""
    public_split = loaded.public_split
    real = [record.text for record in (*public_split.labelled, *public_split.unlabelled)][:REAL]
    policy = foundation_models.writer(section.name, section.endpoint, ("public", "synthetic"), chat=False)

    def score_N(some: Sequence[str], origin: Origin) -> torch.Tensor:
        judge = Judge(policy.of(origin), about=section.about or f"a {section.item_name}", kind=section.item_name)
        return judge.fluency(some) if name == "fluency" else judge.harm(some)

    found, known = score_N(texts, "synthetic").tolist(), score_N(real, "public")
    if name == "fluency":
        return scored(found, least=float(known.quantile(0.01)))
    return scored(found, most=float(known.quantile(0.99)))


REAL = 200
"""Public texts beside which the written ones are judged, at most."""


def _leaks(loaded: LoadedExperiment, texts: Sequence[str], folder: RunFolder) -> tuple[tuple[bool, ...], int, int]:
    clients_data = loaded.public_split.clients_data
    work = Leakage(lambda client: [r.text for r in clients_data[client].train])
    engine = LocalEngine(
        {"leakage": ClientTask(work=work, source=NoBatches())}, ClientStore(folder.path / "state" / "none")
    )
    mean = Mean("uniform")
    job = Job(
        work="leakage", shared=Shared(), version=0, clients=tuple(range(len(clients_data))), seed=0, texts=tuple(texts)
    )
    total = collect(engine, [job], mean, admission=Admission(works={"leakage": work})).total
    return flags(mean.close(total, Shared())[0].trainable), engine.bytes_up, engine.bytes_down


def deal_out(loaded: LoadedExperiment, pool: Pool) -> tuple[tuple[tuple[Record, ...], ...], int]:
    """``(each client's real rows with its synthetic ones behind, bytes down)``."""
    recipe = loaded.experiment.recipe
    section = recipe.synthetic
    assert section is not None
    out: list[tuple[Record, ...]] = []
    sent = 0
    for client_data in loaded.clients_data:
        seed = derive(recipe.seed, "given", client_data.name)
        part = _lacking(client_data, pool, loaded.classes, seed) if section.missing else pool
        sent += sum(len(row.text.encode()) for row in part.rows)
        out.append(tuple(mix(client_data.train, part, share=section.share, seed=seed, client=client_data.name)))
    return tuple(out), sent


def _lacking(client_data: ClientData, pool: Pool, classes: Sequence[str], seed: int) -> Pool:
    """Of a pool, what evens out a client's classes; it asks for it itself, by label and number."""
    have = Counter(str(r.label) for r in client_data.train)
    need: Mapping[str | int, int] = texts_to_write({c: have[c] for c in classes}, most=len(pool.rows))
    left, accepted = dict(need), []
    for i in numpy_generator(seed, "lacking").permutation(len(pool.rows)).tolist():
        label = str(pool.rows[i].label)
        if left.get(label, 0) > 0:
            left[label] -= 1
            accepted.append(i)
    return Pool(tuple(pool.rows[i] for i in sorted(accepted)))
