"""FedMKT and FedCoLLM on tiny models with tokenizers of their own: who learns, what crosses, killed and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.algorithms.average import Average
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import EvalSource, TrainSource
from lichen.engines.local import LocalEngine
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.full import FullCausal
from lichen.models.tokens.token_targets import DistilledLM
from lichen.research.mutual.alignment import Bridge
from lichen.research.mutual.cotune import CoTune, CoTunedModel, large_of
from lichen.research.mutual.mutual import Group, Mutual
from lichen.research.mutual.select import Select
from lichen.research.mutual.token_distill import DistillLogits
from lichen.research.mutual.token_logits import ReportLogits, labelled_tokens, public_shard, starts
from lichen.research.mutual.train_then_report import TrainThenReport, TrainThenReportSource
from lichen.research.mutual.vocabulary import Translation, Vocabulary
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone
from support.two_tokenizers import TEXTS, model, say, tokenizer

LARGE, SMALL, OTHER = 330, 300, 310
PUBLIC = {v: public_shard(TEXTS, tokenizer(v)) for v in (LARGE, SMALL, OTHER)}
VOCABULARY = {v: Vocabulary.of(tokenizer(v)) for v in PUBLIC}
FIELDS = (("train_then_report", "visit"), ("distill", "listen"), ("valid", "valid"))
ADAM = ClientOptimizer("adamw", lr=0.01)


def bridge(source: Any, target: Any) -> Any:
    translation = Translation(VOCABULARY[source], VOCABULARY[target])
    return Bridge.between(translation, labelled_tokens(PUBLIC[source]), labelled_tokens(PUBLIC[target]))


def lora(vocabulary: Any, seed: int = 0) -> Any:
    adapter = Lora(targets=("q_proj", "v_proj", "down_proj"), rank=4, alpha=8.0)
    return CausalCohort(model(vocabulary, seed), adapter=adapter, name=f"lora-{vocabulary}")


def report(cohort: Any, vocabulary: Any, clients: int, *, personal: Any) -> Any:
    work = ReportLogits(
        cohort, public=PUBLIC[vocabulary], vocabulary=VOCABULARY[vocabulary], top_k=4, personal=personal
    )
    return ClientTask(work=work, source=EvalSource(dict.fromkeys(clients, PUBLIC[vocabulary]), batch_size=4))


def distill(cohort: Any, vocabulary: Any, clients: int, *, personal: Any, lm: float = 1.0) -> Any:
    train = Train(DistilledLM(cohort, lm=lm), optimizer=ADAM, personal=personal)
    source = TrainSource(dict.fromkeys(clients, PUBLIC[vocabulary]), batch_size=4, steps=2)
    return ClientTask(work=DistillLogits(train, public=PUBLIC[vocabulary]), source=source)


def rows(vocabulary: Any, clients: int, seed: int) -> Any:
    return {c: public_shard([say(seed + 10 * c + i, 8) for i in range(4)], tokenizer(vocabulary)) for c in clients}


def federation(folder: Path, *, rounds: int = 2, transfer: bool = True) -> Any:
    """Three clients: two of one vocabulary with whole models, one of another with an adapter."""
    groups, client_tasks = [], {}
    for name, vocabulary, clients, cohort in (
        ("a", SMALL, (0, 2), FullCausal(model(SMALL), name="small")),
        ("b", OTHER, (1,), lora(OTHER)),
    ):
        train = TrainSource(rows(vocabulary, clients, 1000), batch_size=2, steps=2)
        reporting = report(cohort, vocabulary, clients, personal=True)
        train_then_report = TrainThenReport(Train(cohort, optimizer=ADAM, personal=True), report=reporting.work)
        client_tasks[f"visit-{name}"] = ClientTask(
            work=train_then_report, source=TrainThenReportSource(train, public=reporting.source)
        )
        client_tasks[f"listen-{name}"] = distill(cohort, vocabulary, clients, personal=True)
        valid = EvalSource(rows(vocabulary, clients, 2000), batch_size=4)
        client_tasks[f"valid-{name}"] = ClientTask(work=Evaluate(cohort, personal=True), source=valid)
        group = Group(
            clients=clients,
            start=Shared(cohort.init(0)),
            up=bridge(vocabulary, LARGE),
            down=bridge(LARGE, vocabulary),
            **{field: f"{work}-{name}" for field, work in FIELDS},
            base=cohort.base,
        )
        groups.append(group)
    large = lora(LARGE)
    algorithm = Mutual(
        groups=tuple(groups),
        report=report(large, LARGE, (0,), personal=False),
        distill=distill(large, LARGE, (0,), personal=False),
        select=Select(tuple(starts(PUBLIC[LARGE]).tolist())),
        rounds=rounds,
        transfer=transfer,
    )
    return algorithm, LocalEngine(client_tasks, ClientStore(folder)), lambda: Shared(large.init(0))


def newest(folder: Path) -> Any:
    return {str(f.parent.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


def go(folder: Path, rounds: int, **more: Any) -> Any:
    algorithm, engine, start = federation(folder, rounds=rounds, **more)
    reports = []
    state = run(algorithm, engine, start, rounds=rounds, seed=3, observers=(reports.append,))
    return state, reports


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("three")
    return *go(folder, 3), folder


def test_everybody_learns_and_parameters_never_cross(three: Any) -> None:
    state, reports, _ = three
    last = reports[-1].metrics
    assert reports[0].clients == (0, 1, 2)
    assert last["valid"] < reports[0].metrics["valid"]
    assert last["server_public"] < reports[0].metrics["server_public"]
    assert all(0 < r.metrics["server_believed"] <= 1 or 0 < r.metrics["client_believed"] <= 1 for r in reports)
    # What everybody begins with goes down once; then answers alone.
    assert reports[1].bytes_down < reports[0].bytes_down / 2
    assert reports[1].bytes_down == reports[2].bytes_down
    assert reports[0].bytes_up == reports[1].bytes_up
    assert digest(state.shared.flat()) != digest(lora(LARGE).init(0))


def test_stopped_and_gone_on_is_the_same_run(three: Any, tmp_path: Path) -> None:
    state, reports, folder = three
    algorithm, engine, start = federation(tmp_path / "own", rounds=3)
    file = tmp_path / "state.safetensors"
    run(algorithm, engine, start, rounds=1, seed=3, checkpoint=file)
    # A round that dies after its clients have told and listened leaves files that are written again.
    broken = replace(algorithm, distill=ClientTask(work=algorithm.distill.work, source=EvalSource([], batch_size=1)))
    with pytest.raises(LichenError, match="no data"):
        run(broken, engine, start, rounds=3, seed=3, checkpoint=file)
    again, engine, start = federation(tmp_path / "own", rounds=3)
    taught = []
    ended = run(again, engine, start, rounds=3, seed=3, checkpoint=file, observers=(taught.append,))
    assert digest(ended.shared.flat()) == digest(state.shared.flat())
    assert taught[-1].metrics == reports[-1].metrics
    assert newest(tmp_path / "own") == newest(folder)


def test_without_answers_nobody_is_believed_and_something_else_is_learned(three: Any, tmp_path: Path) -> None:
    _, reports = go(tmp_path, 1, transfer=False)
    assert reports[0].metrics["server_believed"] == reports[0].metrics["client_believed"] == 0
    assert reports[0].metrics["loss"] == three[1][0].metrics["loss"]
    assert reports[0].metrics["valid"] != three[1][0].metrics["valid"]


def test_a_client_has_one_group(tmp_path: Path) -> None:
    algorithm, _, _ = federation(tmp_path)
    with pytest.raises(LichenError, match="two groups"):
        replace(algorithm, groups=(*algorithm.groups, algorithm.groups[0]))


def cotuning(folder: Path, *, rounds: int = 2, vocabulary: Any = SMALL) -> Any:
    small, large = lora(vocabulary), lora(LARGE, seed=5)
    clients = (0, 1, 2)
    train = TrainSource(rows(vocabulary, clients, 1000), batch_size=2, steps=2)
    valid = EvalSource(rows(vocabulary, clients, 2000), batch_size=4)
    client_tasks = {
        "train": ClientTask(work=Train(small, optimizer=ADAM), source=train),
        "valid": ClientTask(work=Evaluate(small), source=valid),
    }
    average = Average(
        aggregator=Mean(),
        optimizer=ServerSGD(1.0, momentum=0.5),
        sampler=Everyone(),
        weight_N=torch.ones(3),
        rounds=rounds,
        valid=None,
    )
    pupils = [
        CoTunedModel(
            report=report(cohort, mine, (0,), personal=False),
            distill=distill(cohort, mine, (0,), personal=False),
            bridge=bridge(other, mine),
        )
        for cohort, mine, other in ((small, vocabulary, LARGE), (large, LARGE, vocabulary))
    ]
    algorithm = CoTune(average=average, small=pupils[0], large=pupils[1], start=large.init(0))
    return algorithm, LocalEngine(client_tasks, ClientStore(folder)), lambda: Shared(small.init(0))


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
def test_cotuning_teaches_both_and_resumes(tmp_path: Path, vocabulary: Any) -> None:
    algorithm, engine, start = cotuning(tmp_path / "a", rounds=3, vocabulary=vocabulary)
    reports = []
    state = run(algorithm, engine, start, rounds=3, seed=1, observers=(reports.append,))
    first, last = reports[0].metrics, reports[-1].metrics
    assert last["valid"] < first["valid"]
    assert last["large_public"] < first["large_public"]
    assert last["small_public"] < first["small_public"]
    assert state.best_value == min(r.metrics["valid"] for r in reports)
    assert not any(name.startswith("large/") for name in state.shared.trainable)
    # Average's clients are sent the small model and nothing of the large one.
    plain = replace(algorithm.average, rounds=3)
    alone = LocalEngine(engine.client_tasks, ClientStore(tmp_path / "c"))
    _, report = plain.round(plain.init(start()), alone, 7)
    valid_down = reports[1].bytes_down - report.bytes_down
    assert 0 < valid_down <= report.bytes_down
    file = tmp_path / "state.safetensors"
    algorithm, engine, start = cotuning(tmp_path / "b", rounds=3, vocabulary=vocabulary)
    run(algorithm, engine, start, rounds=1, seed=1, checkpoint=file)
    ended = run(algorithm, engine, start, rounds=3, seed=1, checkpoint=file)
    assert digest(ended.shared.flat()) == digest(state.shared.flat())
    assert digest(large_of(ended)) == digest(large_of(state))
    assert digest(large_of(state)) != digest(algorithm.start)


def test_cotuning_wants_an_average_that_does_not_judge(tmp_path: Path) -> None:
    algorithm, _, _ = cotuning(tmp_path)
    with pytest.raises(LichenError, match="yet to listen"):
        replace(algorithm, average=replace(algorithm.average, valid="valid"))


def test_cotuning_without_answers_owes_the_other_nothing(tmp_path: Path) -> None:
    def small_after(place: str, *, transfer: bool, other: bool) -> str:
        algorithm, engine, start = cotuning(tmp_path / place)
        more = {name: x + 0.5 for name, x in algorithm.start.items()} if other else algorithm.start
        algorithm = replace(algorithm, transfer=transfer, start=more)
        return digest(run(algorithm, engine, start, rounds=1, seed=1).shared.flat())

    apart = small_after("a", transfer=False, other=False)
    assert small_after("b", transfer=False, other=True) == apart
    taught = small_after("c", transfer=True, other=False)
    assert taught != apart
    assert small_after("d", transfer=True, other=True) != taught
