"""Private Evolution's client: a histogram of which synthetic candidate is nearest to each private row.

The job carries the embeddings of M candidates, written by a foundation model that has seen no private
row, and perhaps their labels. A client embeds its own rows, and each gives one vote to each of the
``top`` nearest candidates of its own label; of equally near ones the first. Up come M whole numbers.

Distances are compared exactly: embeddings are rounded to multiples of 2^-16 first, so that products and
their sums are exact in float64 in any order. Who stands beside a client, how many threads run and on what
device the features were made then cannot turn a vote, and a candidate listed twice ties with itself.

What one neighbour may change (:meth:`NearestNeighborHistogram.sensitivity`) is what noise is measured by:

* a row: √top votes; √(2 top) where ``most`` is set, since a row more then pushes another row out;
* a client: ``most``·√top votes, or ``clip`` where its histogram is scaled down to that L2 norm.

A histogram is not private by itself. Either the server that sums and adds the noise is trusted, or sums
are all it sees (secure aggregation) and each of n clients adds its ``noise``, N(0, σ²/n), here. Then the
noise is rounded to the histogram's unit, so ``bits`` should be fine; and it must come from a source the
server cannot repeat: give each node a ``secret`` from the operating system's generator. Without one it
follows from the job's seed, which is for simulations.

Each row must come once and in an order that does not hang on how many there are: take
:class:`lichen.data.batches.shards.EvalSource`.

References:
    Zinan Lin, Sivakanth Gopi, Janardhan Kulkarni, Harsha Nori and Sergey Yekhanin. "Differentially Private
    Synthetic Data via Foundation Model APIs 1: Images." ICLR 2024. https://arxiv.org/abs/2305.15560
    Chulin Xie, Zinan Lin, Arturs Backurs, Sivakanth Gopi, Da Yu, Huseyin A. Inan, Harsha Nori, Haotian
    Jiang, Huishuai Zhang, Yin Tat Lee, Bo Li and Sergey Yekhanin. "Differentially Private Synthetic Data
    via Foundation Model APIs 2: Text." ICML 2024. https://arxiv.org/abs/2403.01749
    Charlie Hou, Akshat Shrivastava, Hongyuan Zhan, Rylan Conway, Trang Le, Adithya Sagar, Giulia Fanti
    and Daniel Lazar. "PrE-Text: Training Language Models on Private Federated Data in the Age of LLMs."
    ICML 2024. https://arxiv.org/abs/2406.02958 (clients vote)

Legend: C clients, B rows, M candidates, H features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree

__all__ = ["NearestNeighborHistogram", "NearestNeighborState"]

_UNIT = 2.0**-16
_MOST_SQUARED = 2.0**20  # of a squared length: squares and twice a product of such rows are exact in float64


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NearestNeighborState:
    """A block of clients part way through their rows.

    Attributes:
        job: What was asked.
        clients: Who votes.
        candidate_MH: Rounded embeddings, float64.
        label_M: Their labels, None where all rows may vote for all.
        votes_CM: So far, int64.
        voted_C: Rows that voted, int64.
        distance_C: Sum over them of the L2 distance to the nearest candidate.
        seen: Numbers of the rows that came, one set a client.
    """

    job: Job
    clients: tuple[int, ...]
    candidate_MH: Tensor
    label_M: Tensor | None
    votes_CM: Tensor
    voted_C: Tensor
    distance_C: Tensor
    seen: tuple[frozenset[int], ...]


@final
@dataclass(frozen=True, slots=True)
class NearestNeighborHistogram:
    """Votes as a client work: the job's ``candidates`` (M, H) and ``labels`` (M,) in, ``votes`` (C, M) out.

    Args:
        features: Embeddings ``(C, B, H)`` of a batch, of the same encoder as the candidates'.
        most: Rows of a client that vote, the first ones; None: all.
        top: Candidates a row votes for.
        clip: L2 norm that a client's histogram is scaled down to; None: left as it is.
        bits: Votes are sent in units of ``2^-bits``; the server must use the same. 0 for whole votes.
        noise: Standard deviation, in votes, of what each client adds to each count.
        secret: Seed of that noise, this node's own; None: it follows from the job's seed.
        report: Also tell how many rows voted and their distance to the nearest candidate. That is NOT
            private, and for tests and benchmarks only.

    Raises:
        LichenError: if a number is out of range, or whole votes are to be clipped or noised.
    """

    features: Callable[[Batch], Tensor]
    _: KW_ONLY
    most: int | None = None
    top: int = 1
    clip: float | None = None
    bits: int = 0
    noise: float = 0.0
    secret: int | None = None
    report: bool = False

    def __post_init__(self) -> None:
        if self.top < 1 or (self.most is not None and self.most < 1):
            raise LichenError(f"top {self.top}, most {self.most}", where="vote", fix="use 1 or more of each")
        if not 0 <= self.bits <= 16:
            raise LichenError(f"{self.bits} is out of range", where="vote.bits", fix="use 0 to 16")
        if self.clip is not None and not 2.0**-self.bits <= self.clip < 2.0**24:
            raise LichenError(f"{self.clip} is out of range", where="vote.clip", fix="use 2^-bits up to 2^24 votes")
        if not 0 <= self.noise < 2.0**24:
            raise LichenError(f"noise of {self.noise}", where="vote.noise", fix="use a number from 0 to 2^24")
        if self.bits < 6 and (self.clip is not None or self.noise):
            raise LichenError(
                "clipped or noisy votes are fractions, and would be rounded away", where="vote.bits", fix="use 10"
            )

    def sensitivity(self, unit: Literal["row", "client"], adjacency: Literal["add-or-remove", "replace"]) -> float:
        """L2 distance in votes by which the sums of two neighbours may differ.

        Raises:
            LichenError: if nothing bounds it, or a word is unknown.

        >>> whole = NearestNeighborHistogram(lambda batch: batch["x_CBF"], most=16)
        >>> whole.sensitivity("client", "add-or-remove"), round(whole.sensitivity("row", "add-or-remove"), 3)
        (16.0, 1.414)
        """
        if unit not in ("row", "client") or adjacency not in ("add-or-remove", "replace"):
            raise LichenError(
                f"unknown neighbours: {adjacency} one {unit}",
                where="privacy",
                fix="use a row or client, add-or-remove or replace",
            )
        if unit == "client":
            bounds = [] if self.clip is None else [self.clip]
            bounds += [] if self.most is None else [self.most * math.sqrt(self.top)]
            if not bounds:
                raise LichenError("a client's votes are not bounded", where="vote.most", fix="set most or clip")
            # Histograms have no negative count, so two of them are no farther apart than at right angles.
            return min(bounds) * (math.sqrt(2) if adjacency == "replace" else 1.0)
        if self.clip is not None:
            raise LichenError(
                "clipped histograms are accounted for by client only",
                where="privacy.unit",
                fix="use client, or no clip",
            )
        swapped = adjacency == "replace" or self.most is not None
        return math.sqrt(self.top * (2 if swapped else 1))

    def expected(self, job: Job) -> Expected:
        """A count for each candidate."""
        given_MH = job.shared.trainable.get("candidates")
        M = 0 if given_MH is None else len(given_MH)
        return Expected(
            group=f"votes/{M}/{self.bits}",
            tensors={"votes": TensorSpec((M,), torch.int32)},
            metrics={"count": COUNT, "distance_sum": COUNT} if self.report else {},
            weight=(1.0, 1.0),
        )

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> NearestNeighborState:
        """No votes yet.

        Raises:
            LichenError: if the job carries no candidates, or labels of another number.
        """
        given_MH, label_M = job.shared.trainable.get("candidates"), job.shared.trainable.get("labels")
        if given_MH is None or given_MH.dim() != 2 or 0 in given_MH.shape:
            raise LichenError("the job carries no candidates (M, H)", where="job", fix="run it with PrivateEvolution")
        M = given_MH.shape[0]
        if label_M is not None and label_M.shape != (M,):
            raise LichenError(f"{M} candidates but labels {tuple(label_M.shape)}", where="job")
        C = len(clients)
        return NearestNeighborState(
            job=job,
            clients=tuple(clients),
            candidate_MH=_rounded(given_MH, "candidates"),
            label_M=None if label_M is None else label_M.cpu().long(),
            votes_CM=torch.zeros(C, M, dtype=torch.int64),
            voted_C=torch.zeros(C, dtype=torch.int64),
            distance_C=torch.zeros(C, dtype=torch.float64),
            seen=(frozenset(),) * C,
        )

    def step(self, state: NearestNeighborState, batch: Batch) -> NearestNeighborState:
        """The votes with those of one more batch.

        Rows that are padding, come after ``most`` others, or have a label no candidate has, do not vote.

        Raises:
            LichenError: if a row comes twice, an embedding is not finite or too long, or its width is another.
        """
        with torch.no_grad():
            x_CBH = self.features(batch).detach().cpu()
        if x_CBH.shape[-1] != state.candidate_MH.shape[1]:
            raise LichenError(
                f"rows have {x_CBH.shape[-1]} features, candidates {state.candidate_MH.shape[1]}",
                where="vote.features",
                fix="embed both with one encoder",
            )
        votes_CM, voted_C, distance_C = state.votes_CM.clone(), state.voted_C.clone(), state.distance_C.clone()
        seen = list(state.seen)
        # Client by client: a row's bits must not see the company.
        for c, x_BH in enumerate(x_CBH):
            own_rows = self._own_rows(state, batch, c)
            if "index_CB" in batch:
                numbers = batch["index_CB"][c][own_rows].tolist()
                if len(set(numbers)) < len(numbers) or not seen[c].isdisjoint(numbers):
                    raise LichenError(
                        f"client {state.clients[c]} has a row vote twice, which no noise accounts for",
                        where="vote",
                        fix="serve every row once, with EvalSource",
                    )
                seen[c] |= frozenset(numbers)
            if self.most is not None:
                own_rows = own_rows[: self.most - int(voted_C[c])]
            rows_BH = _rounded(x_BH[own_rows], f"rows of client {state.clients[c]}")
            groups = [(None, rows_BH)]
            if state.label_M is not None:
                label_B = batch["labels_CB"][c].cpu()[own_rows]
                groups = [(k, rows_BH[label_B == k]) for k in sorted(set(label_B.tolist()))]
            for k, some_BH in groups:
                index_m = torch.arange(len(state.candidate_MH)) if k is None else (state.label_M == k).nonzero()[:, 0]
                if len(some_BH) == 0:
                    continue
                square_Bt, near_Bt = _nearest(some_BH, state.candidate_MH[index_m], self.top)
                votes_CM[c] += index_m[near_Bt].flatten().bincount(minlength=votes_CM.shape[1])
                voted_C[c] += len(some_BH)
                distance_C[c] += square_Bt[:, 0].clamp(min=0).sqrt().sum()
        return replace(state, votes_CM=votes_CM, voted_C=voted_C, distance_C=distance_C, seen=tuple(seen))

    @staticmethod
    def _own_rows(state: NearestNeighborState, batch: Batch, c: int) -> Tensor:
        """Places of the rows of client c that may vote, in order."""
        rows = next(x.shape[1] for name, x in batch.items() if name != "active_C")
        real_B = torch.full((rows,), bool(batch["active_C"][c]))
        if "index_CB" in batch:
            real_B = real_B & (batch["index_CB"][c].cpu() >= 0)
        if state.label_M is not None:
            real_B = real_B & torch.isin(batch["labels_CB"][c].cpu(), state.label_M[state.label_M >= 0])
        return real_B.nonzero()[:, 0]

    def final(self, state: NearestNeighborState) -> tuple[Message, Tree | None]:
        """``votes`` (C, M) int32 in units of ``2^-bits``; every client weighs 1, even one without rows.

        Raises:
            LichenError: if a count leaves 32 bits.
        """
        units_CM = state.votes_CM << self.bits
        if self.clip is not None:
            most = math.floor(self.clip * 2**self.bits)
            units_CM = torch.stack([_clipped(units_M, most) for units_M in units_CM])
        if self.noise:
            noises = [self._noise_M(state.job.seed, client, units_CM.shape[1]) for client in state.clients]
            units_CM = units_CM + torch.stack(noises)
        if bool((units_CM.abs() >= 2**31).any()):
            raise LichenError("a count leaves 32 bits", where="vote.bits", fix="use fewer bits, or set most")
        C = len(state.clients)
        metrics = {"count": state.voted_C.double(), "distance_sum": state.distance_C}
        message = Message(
            group=f"votes/{units_CM.shape[1]}/{self.bits}",
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((C,), state.job.version, dtype=torch.int64),
            tensors={"votes": units_CM.int()},
            # Not the number of rows, which nothing would hide.
            weight_C=torch.ones(C, dtype=torch.float64),
            metrics=metrics if self.report else {},
        )
        return message, None

    def _noise_M(self, seed: int, client: int, M: int) -> Tensor:
        """One client's noise, in units."""
        source = (seed,) if self.secret is None else (self.secret, seed)
        g = torch_generator(source[0], *source[1:], client, "vote noise")
        noise_M: Tensor = torch.randn(M, generator=g, dtype=torch.float64) * (self.noise * 2**self.bits)
        return noise_M.round().long()


def _rounded(x_NH: Tensor, what: str) -> Tensor:
    """In multiples of 2^-16, float64.

    Raises:
        LichenError: if a number is not finite, or a row too long for exact sums.
    """
    x_NH = x_NH.detach().cpu().double()
    # Squares are compared before rounding, with room to spare: rounding moves them little.
    if not bool((x_NH.square().sum(-1) < _MOST_SQUARED / 2).all()):
        raise LichenError(
            "an embedding is not finite, or longer than 724", where=what, fix="scale embeddings to length one"
        )
    rounded_NH: Tensor = (x_NH / _UNIT).round() * _UNIT
    return rounded_NH


def _nearest(x_BH: Tensor, candidate_mH: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """``(squared distance, place)`` of the ``top`` nearest, ``(B, min(top, m))``; of equals the first."""
    square_Bm = x_BH.square().sum(-1, keepdim=True) - 2 * (x_BH @ candidate_mH.T) + candidate_mH.square().sum(-1)
    if top == 1:
        near_Bt = torch.from_numpy(np.argmin(square_Bm.numpy(), axis=1, keepdims=True))
    else:
        near_Bt = square_Bm.sort(dim=1, stable=True).indices[:, :top]
    return square_Bm.gather(1, near_Bt), near_Bt


def _clipped(units_M: Tensor, most: int) -> Tensor:
    """Scaled down to an L2 norm of at most ``most`` units, in whole numbers: no rounding can break the bound."""
    counts = {i: int(units_M[i]) for i in units_M.nonzero()[:, 0].tolist()}
    squares = sum(n * n for n in counts.values())
    if squares <= most * most:
        return units_M
    out_M = torch.zeros_like(units_M)
    for i, n in counts.items():
        out_M[i] = math.isqrt(n * n * most * most // squares)
    return out_M
