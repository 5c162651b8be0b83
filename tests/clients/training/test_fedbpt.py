"""Search by losses alone: the strategy through tensors, federations that arrive, bytes, kills.

Legend: C clients, B rows, D numbers searched, L positions, V candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen.algorithms.average import Average
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.fedbpt import BlackBox, Search, generation
from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.fold import serve
from lichen.core.message import Job, pack_job, pack_message, size, take_client
from lichen.core.rounds import run
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import EvalSource, TextShard, TrainSource
from lichen.engines.local import LocalEngine
from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM
from lichen.fm.local import LocalFM
from lichen.fm.soft_prompt import SoftPrompt
from lichen.models.loading.load import load_causal
from lichen.models.objectives import NextToken
from lichen.research.prompts.prompt_search import TokenSearch
from lichen.research.prompts.word_prompt import WordPrompt, encode_bytes
from lichen.server.evolution import Evolution
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone
from support.openai_server import answering
from support.tiny_llama import WORDS, save_model


@dataclass(frozen=True)
class Bowl:
    """A quadratic whose lowest point differs a little between clients: ``x_CBF`` holds it."""

    name: str = "bowl"
    base: str = ""
    group: str = "bowl"
    classes: int | None = None
    objective = NextToken()
    reference: bool = True

    def init(self, seed: int) -> dict[str, torch.Tensor]:
        return {"mean": torch.zeros(12), "std": torch.full((12,), 0.5, dtype=torch.float16)}

    def loss(self, trainable_C: Any, fixed: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert not torch.is_grad_enabled()
        steep_D = torch.logspace(0, 1, 12)
        loss_C = (steep_D * (trainable_C["mean"] - batch["x_CBF"][:, 0]).square()).sum(1)
        return loss_C, torch.ones(loss_C.shape[0], dtype=torch.int64)


@dataclass(frozen=True)
class Bottoms:
    """Each client's lowest point, so many steps."""

    steps: int = 6

    def shape(self, client: int) -> int:
        return 0

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[dict[str, torch.Tensor]]:
        x_CBF = torch.stack([3 + 0.3 * torch.randn(1, 12, generator=torch.Generator().manual_seed(c)) for c in clients])
        for _ in range(self.steps):
            yield {"active_C": torch.ones(len(clients), dtype=torch.bool), "x_CBF": x_CBF}


def federation(model: Any, work: Any, source: Any, folder: Path, *, rounds: int, **more: Any) -> tuple[Average, Any]:
    client_tasks = {
        "train": ClientTask(work=work, source=source),
        "valid": ClientTask(work=Evaluate(model), source=source),
    }
    clients = more.pop("clients", 4)
    algorithm = Average(
        aggregator=more.pop("aggregator", Evolution()),
        optimizer=ServerSGD(),
        sampler=Everyone(),
        weight_N=torch.ones(clients, dtype=torch.float64),
        rounds=rounds,
        **more,
    )
    return algorithm, LocalEngine(client_tasks, ClientStore(folder), block_size=3)


def test_a_search_made_anew_from_tensors_is_an_uninterrupted_run_of_the_package() -> None:
    from cma import CMAEvolutionStrategy
    from cma.sigma_adaptation import CMAAdaptSigmaCSA

    steep = np.linspace(1, 30, 20)
    draws: list[np.random.Generator] = []
    options = {
        "CMA_diagonal": True,
        "AdaptSigma": CMAAdaptSigmaCSA,
        "popsize": 6,
        "randn": lambda *shape: draws[-1].standard_normal(shape),
        "seed": np.nan,
        "verbose": -9,
    }
    whole = CMAEvolutionStrategy(np.zeros(20), 0.5, options)
    search = Search.at(torch.zeros(20), torch.full((20,), 0.5))
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    for g in range(15):
        draws.append(numpy_generator(3, g))
        whole.pop_injection_directions = []  # the package would put one candidate of its own among the drawn
        candidates = whole.ask()
        whole.tell(candidates, [float((steep * (x - 1) ** 2).sum()) for x in candidates])
        search, losses = generation(
            search,
            lambda z: float((steep * (z.numpy() - 1) ** 2).sum()),
            population=6,
            generator=numpy_generator(3, g),
        )
        assert len(losses) == 6
    assert np.array_equal(search.mean_D.numpy(), whole.mean)
    assert search.sigma == whole.sigma
    assert np.array_equal(search.scale_D.numpy(), whole.sigma_vec.scaling)
    assert search.count == 15
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]
    assert (steep * (search.mean_D.numpy() - 1) ** 2).sum() < steep.sum() / 4


def test_a_federation_rolls_down_a_bowl(tmp_path: Path) -> None:
    model = Bowl()
    algorithm, engine = federation(model, BlackBox(model), Bottoms(), tmp_path, rounds=24, clients=3)
    losses: list[float] = []
    state = run(
        algorithm,
        engine,
        lambda: Shared(model.init(0)),
        rounds=24,
        seed=1,
        observers=[lambda report: losses.append(report.metrics["valid"])],
    )
    lowest = float(
        np.mean([(torch.logspace(0, 1, 12) * (b["x_CBF"][0, 0] - bottom()).square()).sum() for b in each_client()])
    )
    assert losses[-1] < 0.01 * losses[0] + 1.5 * lowest
    assert float(state.shared.trainable["std"].max()) < 0.5


def each_client() -> list[dict[str, torch.Tensor]]:
    return [next(Bottoms().batches([c], 0)) for c in range(3)]


def bottom() -> torch.Tensor:
    return torch.stack([b["x_CBF"][0, 0] for b in each_client()]).mean(0)


def test_alone_and_together_are_bit_equal(tmp_path: Path) -> None:
    model = Bowl()
    client_tasks = {"train": ClientTask(work=BlackBox(model), source=Bottoms())}
    job = Job(work="train", shared=Shared(model.init(0)), version=0, clients=(0, 1, 2), seed=5)
    (together,) = serve(job, client_tasks, ClientStore(tmp_path / "a"), block_size=3)
    alone = list(serve(job, client_tasks, ClientStore(tmp_path / "b"), block_size=1))
    assert [pack_message(take_client(together, c)) for c in range(3)] == [pack_message(m) for m in alone]
    assert len({digest(m.tensors) for m in alone}) == 3


def test_a_loss_that_is_no_number_weighs_nothing(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Broken(Bowl):
        def loss(self, trainable_C: Any, fixed: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            loss_C, count_C = Bowl.loss(self, trainable_C, fixed, batch)
            return torch.where(
                batch["x_CBF"][:, 0, 0] == each_client()[1]["x_CBF"][:, 0, 0], torch.nan, loss_C
            ), count_C

    client_tasks = {"train": ClientTask(work=BlackBox(Broken()), source=Bottoms())}
    job = Job(work="train", shared=Shared(Bowl().init(0)), version=0, clients=(0, 1), seed=5)
    (message,) = serve(job, client_tasks, ClientStore(tmp_path))
    assert message.metrics["failed"].tolist() == [0.0, 1.0]
    assert message.weight_C.tolist() == [6.0, 0.0]
    assert float(message.tensors["mean"][1].abs().max()) == 0.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_causal(save_model(tmp_path_factory.mktemp("tiny")))


def said(clients: int, tokens: Any, *, rows: int = 4) -> list[TextShard]:
    """Rows of random words; the class is which half of the vocabulary the last word is of."""
    shards = []
    for c in range(clients):
        rng = np.random.default_rng(c)
        texts = [rng.integers(0, 40, 3) for _ in range(rows)]
        shards.append(
            TextShard.of([(tokens(" ".join(WORDS[i] for i in t)), int(t[-1] >= 20)) for t in texts], kind="classify")
        )
    return shards


def soft_parts(tiny: tuple[Any, Any], *, size_: int) -> tuple[SoftPrompt, list[TextShard]]:
    fm = LocalFM(*tiny, positions=3, start="w20")
    model = SoftPrompt(fm, seed=1, size=size_, words=(" w10", " w11"), scale=2.0)
    return model, said(3, lambda text: np.array(fm.tokens(text), np.int32))


def test_a_message_and_a_job_of_500_numbers_fit_into_4096_bytes(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, shards = soft_parts(tiny, size_=500)
    source = TrainSource(shards, batch_size=4, steps=2)
    job = Job(
        work="train lr=0.001",
        shared=Shared(model.init(0)),
        version=10,
        clients=(0, 1, 2),
        seed=2**62,
        base=model.base,
        settings={"lr_scale": 1.0},
    )
    (message,) = serve(job, {job.work: ClientTask(work=BlackBox(model), source=source)}, ClientStore(tmp_path))
    assert message.tensors["mean"].shape == (3, 500)
    assert size(job) == len(pack_job(Job(**{**vars_of(job), "clients": (0,)}))) <= 4096
    assert size(message) == len(pack_message(take_client(message, 0))) <= 4096


def vars_of(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__slots__}


def test_a_soft_prompt_is_found_killed_and_resumed(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, shards = soft_parts(tiny, size_=10)
    source = TrainSource(shards, batch_size=4, steps=3)

    def go(rounds: int, folder: str, seen: list[float]) -> ServerState:
        algorithm, engine = federation(model, BlackBox(model), source, tmp_path / folder, rounds=6, clients=3)
        return run(
            algorithm,
            engine,
            lambda: Shared(model.init(0)),
            rounds=rounds,
            seed=4,
            checkpoint=tmp_path / folder / "state",
            observers=[lambda report: seen.append(report.metrics["valid"])],
        )

    losses: list[float] = []
    whole = go(6, "a", losses)
    assert whole.best_value < 0.95 * losses[0]
    parts: list[float] = []
    go(3, "b", parts)
    assert digest(go(6, "b", parts).shared.flat()) == digest(whole.shared.flat())
    assert parts == losses


@pytest.mark.parametrize("remote", [False, True])
def test_words_are_found_through_either_face(tiny: tuple[Any, Any], tmp_path: Path, remote: bool) -> None:
    shards = said(3, encode_bytes, rows=3)
    candidates = ("", "w20", "w21", "w22", "w23")

    def search(fm: Any) -> tuple[WordPrompt, ServerState, list[float]]:
        model = WordPrompt(fm, candidates=candidates, length=2, words=(" w10", " w11"), template="{prompt} {text} w30")
        source = TrainSource(shards, batch_size=3, steps=1)
        algorithm, engine = federation(
            model,
            TokenSearch(model, samples=6, rate=0.5),
            source,
            tmp_path / fm.name,
            rounds=6,
            clients=3,
            aggregator=Mean(),
        )
        losses: list[float] = []
        state = run(
            algorithm,
            engine,
            lambda: Shared(model.init(0)),
            rounds=6,
            seed=4,
            observers=[lambda report: losses.append(report.metrics["valid"])],
        )
        return model, state, losses

    local = LocalFM(*tiny, name="local")
    model, state, losses = search(local)
    torch.testing.assert_close(state.shared.trainable["choice"].sum(1), torch.ones(2))
    every = []
    for a in range(5):
        for b in range(5):
            hot_LV = torch.eye(5)[[a, b]]
            batches = list(EvalSource(shards, batch_size=4).batches((0, 1, 2), 0))
            loss_C = sum(model.loss({"choice": hot_LV.expand(3, -1, -1)}, {}, batch)[0] for batch in batches)
            every.append(float(loss_C.mean()) / 3)
    assert losses[-1] <= sorted(every)[6]  # among the best quarter of all prompts there are
    assert losses[-1] < np.median(every)
    if remote:
        with answering(*tiny, fail=0.1) as (url, _):
            _, same, _ = search(HttpFM(Endpoint(url=url, model="tiny", top=46, pause=0.001, cache=tmp_path / "kept")))
        assert digest(same.shared.flat()) == digest(state.shared.flat())
