"""FedMD and DS-FL: clients of different architectures share predictions on public rows.

Nobody's weights leave. In a round every invited client says what its own model makes of the public rows
(``predict/<arch>``), the server makes one opinion of all (:class:`lichen.server.knowledge.ensemble.Ensemble`), and
that opinion goes down to be digested before the clients go back to their own rows (``learn/<arch>``). In
the first round, while nobody knows anything, clients train on their own rows alone (``train/<arch>``).

FedMD takes the mean as it is; DS-FL sharpens it, and is the same cycle counted from another point. Up and
down go N rows of K numbers, whatever the models' sizes.

A *kind* is an architecture with its clients; each has its own client tasks, which
:func:`lichen.clients.distillation.private_models.private_client_tasks` makes. All that must be remembered is the
clients' private state and the last answers, so a resumed run goes on as if it had never stopped.

References:
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581
    Sohei Itahara, Takayuki Nishio, Yusuke Koda, Masahiro Morikura and Koji Yamamoto. "Distillation-Based
    Semi-Supervised Federated Learning for Communication-Efficient Collaborative Training with Non-IID
    Private Data." IEEE Transactions on Mobile Computing 22(1), 2023. https://arxiv.org/abs/2008.06180

Legend: N clients of the roster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.algorithms.scores import SUMMED, Center, center, is_validated, score, summed, with_best
from lichen.core import tree as trees
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import Collected, collect
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator, Sampler
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import Attendance
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["Architectures", "PredictionExchange", "by_architecture", "check_architectures", "score_architectures"]

Architectures = Mapping[str, tuple[int, ...]]
"""The clients of each architecture, by its name."""


def check_architectures(architectures: Architectures, clients: int) -> None:
    """Every client of the roster in one kind.

    Raises:
        LichenError: if one is in none or in several, or there is no such client.
    """
    every = sorted(client for some in architectures.values() for client in some)
    if every != list(range(clients)):
        raise LichenError(
            f"{len(architectures)} architectures name {len(every)} clients of a roster of {clients}, or not each once",
            where="architectures",
            fix="give every client one architecture",
        )


def by_architecture(architectures: Architectures, clients: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """``(arch, those of these clients that are of it)`` in the kinds' order; kinds that have none are left out.

    >>> list(by_architecture({"a": (0, 2), "b": (1,), "c": (3,)}, (1, 2)))
    [('a', (2,)), ('b', (1,))]
    """
    for arch, some in architectures.items():
        here = tuple(client for client in clients if client in set(some))
        if here:
            yield arch, here


def score_architectures(
    engine: Engine,
    job: Job,
    architectures: Architectures,
    shared: Callable[[str], Shared],
    *,
    admission: Admission = OPEN,
) -> tuple[Tensor, Tree]:
    """Run ``<job.work>/<arch>`` for every kind: ``(client_N, metrics)``, sorted by client.

    Metrics that only some kinds' works tell are left out.
    """
    scored = [
        score(engine, replace(job, work=f"{job.work}/{arch}", shared=shared(arch), clients=some), admission)
        for arch, some in by_architecture(architectures, job.clients)
    ]
    if not scored:
        return torch.empty(0, dtype=torch.int64), {}
    common = set.intersection(*(set(metrics) for _, metrics in scored))
    client_N = torch.cat([client_N for client_N, _ in scored])
    metrics = trees.concatenate([{name: x for name, x in metrics.items() if name in common} for _, metrics in scored])
    order = client_N.argsort()
    return client_N[order], {name: x[order] for name, x in metrics.items()}


def means(
    architectures: Architectures, client_N: Tensor, metrics: Mapping[str, Tensor], kind: Center
) -> dict[str, float]:
    """``valid``, the mean over clients of each one's mean loss, and ``valid/<arch>``; only of clients with labels."""
    seen_N = metrics["count"] > 0
    loss_N = metrics["loss_sum"] / metrics["count"].clamp(min=1)
    out = {"valid": center(loss_N[seen_N], kind)}
    for arch, some in architectures.items():
        here_N = seen_N & torch.isin(client_N, torch.tensor(some, dtype=torch.int64))
        if bool(here_N.any()):
            out[f"valid/{arch}"] = center(loss_N[here_N], kind)
    return out


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionExchange:
    """Predict, agree, digest, revisit.

    Attributes:
        architectures: The clients of each architecture.
        ensemble: Makes one opinion of the clients'; its change is the shared answers.
        sampler: Invites from the roster.
        weight_N: Examples of every client, for the sampler.
        rounds: Rounds in all, the first one of training alone among them; the last is always validated.
        valid: The validating work's name before ``/<arch>``; None for none.
        valid_every: Rounds between validations.
        validators: Clients that validate; None: all of them.
        valid_average: How their losses become one.
        admission: What counts of what clients send.
        lr_scale: Factor on the clients' learning rate in round r (from 0).

    Raises:
        LichenError: if a client has no architecture, or two.
    """

    architectures: Architectures
    ensemble: Aggregator
    sampler: Sampler
    weight_N: Tensor
    rounds: int
    valid: str | None = "valid"
    valid_every: int = 1
    validators: tuple[int, ...] | None = None
    valid_average: Center = "mean"
    admission: Admission = OPEN
    lr_scale: Callable[[int], float] = lambda _: 1.0

    def __post_init__(self) -> None:
        check_architectures(self.architectures, self.weight_N.shape[0])

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round; ``shared`` may hold a teacher's answers to begin with, or nothing."""
        return ServerState(round=0, shared=shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round. While nobody has anything to say, clients train on their own rows.

        ``best_round`` and ``best_value`` tell the best validation; the models behind them are the clients'.
        """
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        clients = self.sampler.invite(self.weight_N, derive(seed, "invite"))
        # Private state is written twice a round: by training, and perhaps by validating works that keep the best.
        job = Job(
            work="train",
            shared=Shared(),
            version=2 * state.round,
            clients=clients,
            seed=seed,
            settings={"lr_scale": self.lr_scale(state.round)},
        )
        answers, metrics, attendance = self._agree(state, engine, job)
        if answers:
            state = replace(state, shared=state.shared | answers)
            job = replace(job, work="learn")
        elif state.round == 0 and state.shared:
            answers, job = state.shared, replace(job, work="learn")
        trained = self._train(engine, job, answers)
        seen, attendance = trained.metrics, attendance + trained.attendance
        sums, learned = summed(seen)
        metrics.update(learned)
        state = replace(state, round=state.round + 1)
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if self.valid and is_validated(state.round, self.valid_every, self.rounds):
            judges = tuple(range(self.weight_N.shape[0])) if self.validators is None else self.validators
            judging = replace(job, work=self.valid, version=2 * state.round - 1, clients=judges, seed=0, settings={})
            metrics.update(
                means(
                    self.architectures,
                    *score_architectures(
                        engine, judging, self.architectures, lambda _: Shared(), admission=self.admission
                    ),
                    self.valid_average,
                )
            )
            state = with_best(state, metrics["valid"], Shared())
        return state, Report(
            round=state.round,
            clients=clients,
            metrics=metrics,
            tokens=int(sums["tokens"]),
            bytes_up=engine.bytes_up - up,
            bytes_down=engine.bytes_down - down,
            seconds=time.perf_counter() - start,
            valid_up=engine.bytes_up - trained_up,
            valid_down=engine.bytes_down - trained_down,
            attendance=attendance,
        )

    def _by_architecture(self, job: Job, work: str, shared: Shared) -> list[Job]:
        """The job ``<work>/<arch>`` of every kind that has one of its clients."""
        return [
            replace(job, work=f"{work}/{arch}", shared=shared, clients=some)
            for arch, some in by_architecture(self.architectures, job.clients)
        ]

    def _train(self, engine: Engine, job: Job, answers: Shared) -> Collected:
        """What comes of everybody's training, from the answers where there are some."""
        jobs = self._by_architecture(job, job.work, answers)
        return collect(engine, jobs, admission=self.admission, keep=SUMMED)

    def _agree(self, state: ServerState, engine: Engine, job: Job) -> tuple[Shared, dict[str, float], Attendance]:
        """``(answers, metrics, who came)`` of those invited; nothing where none of them has trained yet."""
        if state.round == 0:
            return Shared(), {}, Attendance()
        jobs = self._by_architecture(job, "predict", Shared())
        came = collect(engine, jobs, self.ensemble, admission=self.admission, keep=())
        if not bool((came.weight_N > 0).any()):
            return Shared(), {}, came.attendance
        return *self.ensemble.close(came.total, state.shared), came.attendance
