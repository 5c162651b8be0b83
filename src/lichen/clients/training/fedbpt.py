"""FedBPT's client: searches a low-dimensional prompt by CMA-ES, with losses and no gradient.

A client starts where the server stands, a normal distribution with ``mean`` and ``std`` by coordinate, and
runs one generation of CMA-ES on each batch: it draws ``population`` candidates, asks the model for the
loss of each on its own rows, and lets the strategy move. The covariance is diagonal, so that 500
numbers fit into 3 KB instead of a megabyte. What leaves is how far the mean went (float32) and the new
spread (float16); :class:`lichen.server.evolution.Evolution` makes the clients' into one.

Between two generations a strategy is five arrays and a counter (:class:`Search`), and the ``cma`` package's
object is made anew from them, so that nothing but tensors lives in a fold. Every draw comes from the job's
seed, the client and the generation. The paths over which CMA-ES remembers its way begin anew each round;
the paper's distortion of rows against overfitting is left out.

References:
    Jingwei Sun, Ziyue Xu, Hongxu Yin, Dong Yang, Daguang Xu, Yudong Liu, Zhixu Du, Yiran Chen and Holger
    R. Roth. "FedBPT: Efficient Federated Black-box Prompt Tuning for Large Language Models." ICML 2024.
    https://arxiv.org/abs/2310.01467
    Raymond Ros and Nikolaus Hansen. "A Simple Modification in CMA-ES Achieving Linear Time and Space
    Complexity." PPSN X, 2008. https://doi.org/10.1007/978-3-540-87700-4_30 (diagonal covariance)
    Nikolaus Hansen, Youhei Akimoto and Petr Baudis. "CMA-ES/pycma on GitHub."
    https://doi.org/10.5281/zenodo.2559634

Legend: C clients, D numbers searched, L candidates of a generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lichen.clients.training.training_sums import tokens_seen_C, training_expected, training_metrics
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.seeds import numpy_generator
from lichen.core.tree import Tree

__all__ = ["BlackBox", "Search", "generation"]

_LEAST, _MOST = 1e-4, 1e4  # what float16 holds in full


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Search:
    """A diagonal CMA-ES between two generations; all float64.

    Attributes:
        mean_D: Where it stands.
        scale_D: Relative spread of each coordinate.
        sigma: Step size; the spread is ``sigma * scale_D``.
        path_D: Way of the mean, for the covariance.
        step_path_D: Way of the mean in units of the spread, for the step size.
        count: Generations so far.
    """

    mean_D: Tensor
    scale_D: Tensor
    sigma: float
    path_D: Tensor
    step_path_D: Tensor
    count: int = 0

    @classmethod
    def at(cls, mean_D: Tensor, std_D: Tensor) -> Search:
        """A search that begins here, its paths empty."""
        std_D = std_D.double().clamp(_LEAST, _MOST)
        sigma = float(std_D.square().mean().sqrt())
        nothing_D = torch.zeros(std_D.shape[0], dtype=torch.float64)
        return cls(mean_D=mean_D.double(), scale_D=std_D / sigma, sigma=sigma, path_D=nothing_D, step_path_D=nothing_D)

    @property
    def std_D(self) -> Tensor:
        """Spread of each coordinate."""
        return self.scale_D * self.sigma


def generation(
    search: Search, ask: Callable[[Tensor], float], *, population: int, generator: np.random.Generator
) -> tuple[Search, list[float]]:
    """One generation: draw, ask for each candidate's loss, move.

    Args:
        search: The strategy before it; stays as it is.
        ask: Loss of a candidate ``(D,)`` float64.
        population: L.
        generator: Of the draws.

    Returns:
        The strategy after it and the losses; the strategy as it was where a loss is not finite.

    >>> start = Search.at(torch.ones(3), torch.ones(3))
    >>> found, losses = generation(
    ...     start, lambda z: float(z.square().sum()), population=5, generator=numpy_generator(0)
    ... )
    >>> found.count, len(losses), start.count
    (1, 5, 0)
    """
    strategy = _strategy(search, population, generator)
    candidates = strategy.ask()
    losses = [ask(torch.from_numpy(np.array(x))) for x in candidates]
    if not np.isfinite(losses).all():
        return search, losses
    # The package takes the counter for the sign of a first call until candidates are drawn.
    strategy.countiter, strategy.mean_old = search.count, strategy.mean
    strategy.tell(candidates, losses)
    moved = Search(
        mean_D=_tensor(strategy.mean),
        scale_D=_tensor(strategy.sigma_vec.scaling),
        sigma=float(strategy.sigma),
        path_D=_tensor(strategy.pc),
        step_path_D=_tensor(strategy.adapt_sigma.ps),
        count=search.count + 1,
    )
    return moved, losses


def _strategy(search: Search, population: int, generator: np.random.Generator) -> Any:
    from cma import CMAEvolutionStrategy  # type: ignore[import-untyped]
    from cma.sigma_adaptation import CMAAdaptSigmaCSA  # type: ignore[import-untyped]

    options = {
        "CMA_diagonal": True,
        "CMA_stds": search.scale_D.numpy(),
        "AdaptSigma": CMAAdaptSigmaCSA,
        "popsize": population,
        "randn": lambda *shape: generator.standard_normal(shape),
        "seed": np.nan,  # leaves NumPy's global generator alone
        "verbose": -9,
    }
    strategy = CMAEvolutionStrategy(search.mean_D.numpy().copy(), search.sigma, options)
    strategy.pc = search.path_D.numpy().copy()
    strategy.adapt_sigma.initialize(strategy)
    strategy.adapt_sigma.ps = search.step_path_D.numpy().copy()
    return strategy


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BlackBoxState:
    """A block of clients in the middle of their search; ``sums`` are ``(C,)`` float64."""

    job: Job
    clients: tuple[int, ...]
    searches: tuple[Search, ...]
    fixed: Tree
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class BlackBox:
    """FedBPT's local search as a client work; a batch is a generation, so the source's steps are its iterations.

    Args:
        model: Any cohort model whose trainable tensors are ``mean`` and ``std``, both ``(D,)``, such as
            :class:`lichen.fm.soft_prompt.SoftPrompt`.
        population: L, candidates of a generation.

    Raises:
        LichenError: if the population is too small to be ranked.
    """

    model: CohortModel
    _: KW_ONLY
    population: int = 5

    def __post_init__(self) -> None:
        if self.population < 4:
            raise LichenError(f"{self.population} candidates are too few", where="black_box.population", fix="use 4+")

    def expected(self, job: Job) -> Expected:
        """How far the mean went in float32, and the spread in float16."""
        trainable = job.shared.trainable
        wide = {name: tuple(trainable[name].shape) for name in ("mean", "std") if name in trainable}
        halves = {"mean": torch.float32, "std": torch.float16}
        expected = training_expected(self.model, {name: TensorSpec(wide[name], halves[name]) for name in wide})
        return replace(expected, metrics={name: x for name, x in expected.metrics.items() if name != "steps"})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> BlackBoxState:
        """Clients at the server's distribution.

        Raises:
            LichenError: if the shared tensors are no distribution.
        """
        del own_C
        trainable, fixed = job.shared.trainable, job.shared.fixed
        if trainable.keys() != {"mean", "std"} or trainable["mean"].shape != trainable["std"].shape:
            raise LichenError(
                f"expected mean and std, got {sorted(trainable)}", where="job.shared", fix="search a soft prompt"
            )
        start = Search.at(trainable["mean"].cpu(), trainable["std"].cpu())
        names = ("loss_sum", "count", "tokens", "failed")
        return BlackBoxState(
            job=job,
            clients=tuple(clients),
            searches=(start,) * len(clients),
            fixed=fixed,
            sums={name: torch.zeros(len(clients), dtype=torch.float64) for name in names},
        )

    def step(self, state: BlackBoxState, batch: Batch) -> BlackBoxState:
        """One generation of every active client on its rows of this batch."""
        tokens_C = tokens_seen_C(batch)
        searches = list(state.searches)
        sums = {name: x.clone() for name, x in state.sums.items()}
        for c in (c for c, active in enumerate(batch["active_C"].tolist()) if active):
            alone = {name: x[c : c + 1] for name, x in batch.items()}
            counts: list[int] = []

            def ask(z_D: Tensor, alone: Batch = alone, counts: list[int] = counts) -> float:
                with torch.no_grad():
                    candidate = {"mean": z_D[None].float(), "std": torch.zeros(1, z_D.shape[0])}
                    loss_C, count_C = self.model.loss(candidate, state.fixed, alone)
                counts.append(int(count_C[0]))
                return float(loss_C[0]) / max(counts[-1], 1)

            draws = numpy_generator(state.job.seed, state.clients[c], "generation", searches[c].count)
            searches[c], losses = generation(searches[c], ask, population=self.population, generator=draws)
            finite = bool(np.isfinite(losses).all())
            if finite:
                sums["loss_sum"][c] += sum(losses) / len(losses) * counts[0]
                sums["count"][c] += counts[0]
                sums["tokens"][c] += int(tokens_C[c]) * self.population
            sums["failed"][c] = max(float(sums["failed"][c]), float(not finite))
        return replace(state, searches=tuple(searches), sums=sums)

    def final(self, state: BlackBoxState) -> tuple[Message, Tree | None]:
        """How far the mean went, and the new spread; a client that met a loss that is no number weighs nothing."""
        shared = state.job.shared.trainable
        failed_C = state.sums["failed"] > 0
        shift_CD = torch.stack([s.mean_D for s in state.searches]) - shared["mean"].cpu().double()
        std_CD = torch.stack([s.std_D for s in state.searches]).clamp(_LEAST, _MOST)
        failed_C = failed_C | ~(shift_CD.isfinite().all(1) & std_CD.isfinite().all(1))
        sums = {name: torch.where(failed_C, 0.0, x) for name, x in state.sums.items()}
        sums["failed"] = failed_C.double()
        message = Message(
            group=self.model.group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={
                "mean": torch.where(failed_C[:, None], 0.0, shift_CD).float(),
                "std": torch.where(failed_C[:, None], 1.0, std_CD).half(),
            },
            weight_C=sums["count"],
            metrics=training_metrics(self.model, sums),
        )
        return message, None
