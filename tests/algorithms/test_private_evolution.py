"""Evolving texts that nobody who wrote them has seen: the loop, its promises, and real reviews."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lichen.algorithms.private_evolution import Population, PrivateEvolution, QueryCounts
from lichen.clients.statistics.nearest_vote import NearestNeighborHistogram
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, size
from lichen.core.rounds import run
from lichen.core.seeds import derive, numpy_generator
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.engines.local import LocalEngine
from lichen.server.sampling import Everyone, Poisson

counted = pytest.mark.skipif(importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting is not installed")


def features(batch: Batch) -> Tensor:
    return batch["x_CBF"]


def embed(texts: Sequence[str]) -> Tensor:
    """A text is two numbers: where it lies."""
    return torch.tensor([[float(v) for v in text.split()] for text in texts])


def fresh(label: int, count: int, seed: int) -> list[str]:
    g = numpy_generator(seed, "fresh")
    return [f"{x:.3f} {y:.3f}" for x, y in g.uniform(-1, 1, (count, 2))]


def vary(texts: Sequence[str], labels: Sequence[int], seed: int) -> list[str]:
    g = numpy_generator(seed, "vary")
    return [f"{x:.3f} {y:.3f}" for x, y in embed(texts).numpy() + g.normal(0, 0.15, (len(texts), 2))]


HOME = {0: (0.6, 0.6), 1: (-0.6, -0.2)}
"""Around which the rows of each label lie."""


def owners(clients: int = 5, rows: int = 12) -> list[ArrayShard]:
    g = np.random.default_rng(0)
    shards = []
    for _ in range(clients):
        labels = g.integers(0, 2, rows)
        x = np.array([HOME[int(k)] for k in labels]) + g.normal(0, 0.05, (rows, 2))
        shards.append(ArrayShard(x.astype(np.float32), labels=labels))
    return shards


def engine_of(shards: Sequence[ArrayShard], folder: Path, *, block: int = 8, **more: Any) -> LocalEngine:
    client_task = ClientTask(
        work=NearestNeighborHistogram(features, **{"report": True, **more}),
        source=EvalSource(list(shards), batch_size=8),
    )
    return LocalEngine({"vote": client_task}, ClientStore(folder), block_size=block)


def evolution(clients: int = 5, **more: Any) -> PrivateEvolution:
    plain: dict[str, Any] = {
        "fresh": fresh,
        "vary": vary,
        "embed": embed,
        "counts": {0: 6, 1: 6},
        "weight_N": torch.ones(clients),
        "rounds": 6,
        "sigma": 0.0,
        "delta": 1e-3,
        "variations": 3,
    }
    return PrivateEvolution(**{**plain, **more})


def begun(made: PrivateEvolution) -> ServerState:
    """A first state, also where noise cannot be accounted for."""
    return replace(made, sigma=0.0).init(Shared()) if made.sigma else made.init(Shared())


def go(made: PrivateEvolution, engine: LocalEngine, *, seed: int = 3) -> tuple[ServerState, list[Report]]:
    state, reports = begun(made), []
    for r in range(made.rounds):
        state, report = made.round(state, engine, derive(seed, "round", r))
        reports.append(report)
    return state, reports


def apart(population: Population) -> float:
    """Mean distance of the kept texts from home."""
    home = torch.tensor([HOME[int(k)] for k in population.label_S.tolist()])
    return float((embed(population.texts) - home).norm(dim=1).mean())


@pytest.mark.parametrize(
    "more", [{}, {"choice": "sample", "parents": False, "variations": 1, "counts": {0: 20, 1: 20}}, {"lookahead": 2}]
)
def test_texts_move_to_where_the_private_rows_of_their_label_are(tmp_path: Path, more: dict[str, Any]) -> None:
    made = evolution(**more)
    state, reports = go(made, engine_of(owners(), tmp_path))
    last = Population.of(state.shared.trainable)
    assert [r.metrics["rows"] for r in reports] == [60] * 6
    assert [r.round for r in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1].metrics["distance"] < 0.6 * reports[0].metrics["distance"]
    random = Population(tuple(fresh(0, 500, 1) + fresh(1, 500, 2)), torch.arange(1000) // 500, torch.zeros(1000))
    assert apart(last) < 0.4 * apart(random)
    assert last.label_S.bincount().tolist() == list(made.counts.values())


def test_the_sum_of_votes_is_the_number_of_private_rows(tmp_path: Path) -> None:
    made = evolution(counts={0: 24, 1: 24}, variations=1, parents=False)  # all candidates stay
    state, reports = go(made, engine_of(owners(), tmp_path))
    assert float(Population.of(state.shared.trainable).vote_S.sum()) == 60
    assert all(r.metrics["concentration"] == r.metrics["true_concentration"] for r in reports)


def test_noise_alone_decides_where_it_drowns_the_votes(tmp_path: Path) -> None:
    made = evolution(sigma=1e5)
    got = [
        apart(Population.of(go(made, engine_of(owners(), tmp_path / str(seed)), seed=seed)[0].shared.trainable))
        for seed in range(4)
    ]
    clear = apart(Population.of(go(evolution(), engine_of(owners(), tmp_path / "clear"))[0].shared.trainable))
    random = Population(tuple(fresh(0, 500, 1) + fresh(1, 500, 2)), torch.arange(1000) // 500, torch.zeros(1000))
    assert clear < 0.5 * min(got)
    assert float(np.mean(got)) < 1.3 * apart(random)


def test_a_killed_run_goes_on_to_the_same_texts(tmp_path: Path) -> None:
    made, kept = evolution(rounds=4), tmp_path / "state.safetensors"
    whole = run(made, engine_of(owners(), tmp_path / "a"), Shared, rounds=4, seed=9)
    run(made, engine_of(owners(), tmp_path / "b"), Shared, rounds=2, seed=9, checkpoint=kept)
    again = run(made, engine_of(owners(), tmp_path / "c", block=2), Shared, rounds=4, seed=9, checkpoint=kept)
    assert digest(again.shared.flat()) == digest(whole.shared.flat())
    done = made.finish(again)
    assert done.texts == Population.of(whole.shared.trainable).texts
    assert done.labels == (0,) * 6 + (1,) * 6
    other = run(made, engine_of(owners(), tmp_path / "d"), Shared, rounds=4, seed=8)
    assert digest(other.shared.flat()) != digest(whole.shared.flat())


def test_counts_what_crosses_and_what_was_asked(tmp_path: Path) -> None:
    engine = engine_of(owners(), tmp_path, report=False)
    made = evolution(rounds=3, lookahead=2)
    state, reports = go(made, engine)
    M = 12 * 4
    shared = {"candidates": torch.zeros(M, 2).half(), "labels": torch.zeros(M, dtype=torch.int16)}
    assert reports[0].bytes_down == 5 * size(
        Job(work="vote", shared=Shared.of_flat(shared), version=0, clients=(0,), seed=1)
    )
    one = torch.zeros(1, dtype=torch.int64)
    votes = {"votes": torch.zeros(1, M, dtype=torch.int32)}
    up = Message(group=f"votes/{M}/0", client_C=one, version_C=one, tensors=votes, weight_C=one.double())
    assert reports[0].bytes_up == 5 * size(up)
    assert "distance" not in reports[0].metrics
    assert "true_concentration" not in reports[0].metrics
    assert sum(r.bytes_down for r in reports) == engine.bytes_down
    asked = Population.of(state.shared.trainable).queries
    assert asked == QueryCounts(fresh=M, varied=3 * 2 * M + 2 * 12 * 3, embedded=3 * 2 * M)
    assert sum(r.metrics["asked_varied"] for r in reports) == asked.varied


def test_without_labels_every_row_votes_for_all(tmp_path: Path) -> None:
    assert evolution(counts={-1: 1}).rounds == 6  # one is enough
    made = evolution(counts={-1: 8})
    state, _ = go(made, engine_of(owners(), tmp_path))
    assert set(made.finish(state).labels) == {-1}
    homes = torch.tensor(list(HOME.values()))
    assert float(torch.cdist(embed(Population.of(state.shared.trainable).texts), homes).amin(1).mean()) < 0.2


def test_shares_of_noise_are_filled_up_for_those_who_stay_away(tmp_path: Path) -> None:
    sigma, n = 40.0, 16
    work = {"report": False, "bits": 10, "noise": sigma / 4}
    empty = [ArrayShard(np.zeros((0, 2), np.float32), labels=np.zeros(0, np.int64))] * n

    class Half(LocalEngine):
        def run(self, job: Job) -> Any:
            return super().run(replace(job, clients=job.clients[:8]))

    client_tasks = engine_of(empty, tmp_path, **work).client_tasks
    made = evolution(
        n, sigma=sigma, share=True, bits=10, counts={-1: 1500}, variations=1, parents=False, choice="rank", rounds=1
    )
    for engine in (LocalEngine(client_tasks, ClientStore(tmp_path)), Half(client_tasks, ClientStore(tmp_path))):
        state, _ = go(made, engine)
        assert float(Population.of(state.shared.trainable).vote_S.std()) == pytest.approx(sigma, rel=0.06)


def test_a_round_nobody_comes_to_is_decided_by_noise(tmp_path: Path) -> None:
    made = evolution(sampler=Poisson(1e-12), sigma=2.0, rounds=2)
    state, reports = go(made, engine_of(owners(), tmp_path))
    assert [r.clients for r in reports] == [(), ()]
    assert [r.bytes_up for r in reports] == [0, 0]
    assert len(Population.of(state.shared.trainable).texts) == 12
    assert float(Population.of(state.shared.trainable).vote_S.abs().min()) > 0


def test_without_noise_there_is_no_privacy_and_it_says_so(tmp_path: Path) -> None:
    done = evolution(rounds=1).finish(go(evolution(rounds=1), engine_of(owners(), tmp_path))[0])
    assert math.isinf(done.privacy.epsilon)
    assert "no differential privacy" in str(done.privacy)


def test_every_round_draws_noise_of_its_own(tmp_path: Path) -> None:
    """Were it the same in two rounds, their difference would be the exact votes'."""
    empty = [ArrayShard(np.zeros((0, 2), np.float32), labels=np.zeros(0, np.int64))] * 3
    made = evolution(3, sigma=5.0, counts={0: 40, 1: 40}, variations=1, parents=False, rounds=3)
    engine, state, noise = engine_of(empty, tmp_path, report=False), begun(made), list[Tensor]()
    for r in range(made.rounds):
        state, _ = made.round(state, engine, derive(3, "round", r))
        noise.append(Population.of(state.shared.trainable).vote_S)  # of all candidates, as all stay
    drawn = torch.cat(noise).tolist()
    assert len(set(drawn)) == len(drawn) == 240


@counted
def test_says_what_it_will_reveal_before_and_what_it_has_after(tmp_path: Path) -> None:
    work = NearestNeighborHistogram(features, most=4)
    sensitivity = work.sensitivity("client", "add-or-remove")
    made = evolution(sigma=8.0, sensitivity=sensitivity, rounds=3)
    planned = made.statement()
    state = run(made, engine_of(owners(), tmp_path, most=4), Shared, rounds=2, seed=1)
    spent = made.finish(state).privacy
    assert 0 < spent.epsilon < planned.epsilon < math.inf
    assert (spent.unit, spent.adjacency) == ("client", "add-or-remove")
    assert "one client" in str(planned)
    assert replace(made, sampler=Poisson(0.2)).statement().epsilon < planned.epsilon
    swapped = replace(made, adjacency="replace", sensitivity=work.sensitivity("client", "replace"))
    assert replace(swapped, sampler=Poisson(0.2)).statement() == swapped.statement()
    assert swapped.statement().epsilon > planned.epsilon


def test_noise_that_cannot_be_accounted_for_is_refused_before_the_model_is_paid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(LichenError, match=r"lichen\[privacy\]"):
        evolution(sigma=1.0).init(Shared())


def test_refuses_settings_and_answers_that_make_no_sense(tmp_path: Path) -> None:
    for bad in (
        {"counts": {}},
        {"counts": {-1: 2, 0: 2}},
        {"counts": {0: 0}},
        {"variations": 0},
        {"lookahead": -1},
        {"choice": "best"},
        {"sigma": -1.0},
        {"sensitivity": 0.0},
        {"share": True, "sampler": Poisson(0.5)},
    ):
        with pytest.raises(LichenError):
            evolution(**bad)
    engine = engine_of(owners(), tmp_path)
    short = evolution(fresh=lambda label, count, seed: ["0 0"])
    with pytest.raises(LichenError, match=r"24 texts were asked for and 1 came"):
        short.round(begun(short), engine, 0)
    flat = evolution(embed=lambda texts: torch.zeros(2, 2))
    with pytest.raises(LichenError, match="one row a text"):
        flat.round(begun(flat), engine, 0)
    with pytest.raises(LichenError, match="no population"):
        Population.of({"texts": torch.zeros(1)})


def test_any_text_survives_a_checkpoint() -> None:
    texts = ("", "naïve — “quoted”", "\n\t", "😀", "a" * 300, "\ud800")
    some = Population(
        texts, torch.arange(6), torch.rand(6, dtype=torch.float64), QueryCounts(fresh=1, varied=2, embedded=3)
    )
    back = Population.of(some.tree())
    assert (back.texts, back.queries) == (texts, some.queries)
    assert torch.equal(back.vote_S, some.vote_S)


@pytest.fixture(scope="module")
def reviews() -> Any:
    """Embedded by MiniLM: private reviews of 1 and 5 stars, and a pool of other reviews and of small talk."""
    from lichen.data.sources.catalog import fetch_entry
    from lichen.data.sources.records import load_records
    from lichen.models.loading.load import load_encoder

    try:
        folder, stars, talk = fetch_entry("minilm-l6"), load_records("clothing-reviews"), load_records("chitchat")
    except LichenError as error:
        pytest.skip(f"cannot be fetched here: {error}")
    by_label = [[r.text for r in stars if str(r.label) == star][:80] for star in ("1", "5")]
    chat = [r.text for r in talk if len(r.text) > 30][:50]
    private = [(t, k) for k in range(2) for t in by_label[k][:30]]
    pool = [(t, k) for k in range(2) for t in by_label[k][30:]] + [(t, 2) for t in chat]
    model, tokenizer = load_encoder(folder)

    def embedded(rows: list[tuple[str, int]]) -> np.ndarray:
        parts = []
        for at in range(0, len(rows), 50):
            words = [t for t, _ in rows[at : at + 50]]
            inputs = tokenizer(words, truncation=True, max_length=20, padding=True, return_tensors="pt")
            with torch.no_grad():
                hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].float()
            parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(parts).numpy()

    return private, embedded(private), pool, embedded(pool)


def test_on_real_reviews_the_synthetic_set_comes_nearer_and_its_labels_mean_something(
    reviews: Any, tmp_path: Path
) -> None:
    private, x, pool, z = reviews
    place = {text: i for i, (text, _) in enumerate(pool)}
    words, kinds = list(place), np.array([k for _, k in pool])
    near = np.argsort(-(z @ z.T), axis=1, kind="stable")[:, 1:9]

    def writes(label: int, count: int, seed: int) -> list[str]:
        return [words[i] for i in numpy_generator(seed, "w").integers(0, len(words), count)]  # knows nothing of labels

    def varies(texts: Sequence[str], labels: Sequence[int], seed: int) -> list[str]:
        g = numpy_generator(seed, "v")
        return [words[g.choice(near[place[t]])] for t in texts]

    labels = np.array([k for _, k in private])
    shards = [ArrayShard(x[c::5], labels=labels[c::5]) for c in range(5)]

    def result(sigma: float, seed: int) -> tuple[float, float]:
        made = evolution(
            fresh=writes,
            vary=varies,
            embed=lambda texts: torch.from_numpy(z[[place[t] for t in texts]]),
            counts={0: 10, 1: 10},
            rounds=5,
            sigma=sigma,
            sampler=Everyone(),
        )
        state, _ = go(made, engine_of(shards, tmp_path / f"{sigma} {seed}"), seed=seed)
        return judge(Population.of(state.shared.trainable))

    def judge(got: Population) -> tuple[float, float]:
        """(mean distance of private rows to the nearest of their label, share of texts whose true label it is)."""
        at, label = np.array([place[t] for t in got.texts]), got.label_S.numpy()
        far = [np.sqrt(2 - 2 * (x[labels == k] @ z[at[label == k]].T).max(1).clip(max=1)) for k in range(2)]
        return float(np.concatenate(far).mean()), float((kinds[at] == label).mean())

    def drawn(seed: int) -> tuple[float, float]:
        return judge(Population(tuple(writes(0, 20, seed)), torch.arange(20) // 10, torch.zeros(20)))

    clear, blind, random = (
        np.array([f(s) for s in range(3)]).mean(0)
        for f in (lambda s: result(0.0, s), lambda s: result(1e4, s), lambda s: drawn(s))
    )
    print("distance, right labels:", clear.round(3), blind.round(3), random.round(3))
    assert clear[0] < random[0] - 0.03
    assert clear[1] > random[1] + 0.15
    assert blind[0] < random[0] + 0.06
