"""Private Evolution: a foundation model varies texts, and noisy votes of clients select among them.

Each round holds some texts of each label. The model writes ``variations`` of each; all candidates are
embedded and go down as vectors, never as text; every client votes for those nearest to its own rows
(:class:`lichen.clients.statistics.nearest_vote.NearestNeighborHistogram`); the sum of votes gets noise once
(:class:`lichen.server.knowledge.votes.Votes`); and the best, or a draw in proportion to votes, are the next round's
texts. The model is only asked for text, never sees a private row, and no gradient is taken anywhere. The noisy counts
are all that depends on private data, so :meth:`PrivateEvolution.statement` says what the texts reveal, before anything
is asked.

==================================================  =========================================================
``choice="sample", parents=False, variations=1``    PE: draw in proportion, go on with the variations alone
``choice="most_voted", parents=True, variations=L - 1``   Aug-PE: the most voted stay, beside L - 1 variations each
==================================================  =========================================================

With ``lookahead`` a candidate is embedded as the mean of that many variations of it, so that votes are
for where it leads. What is kept was always voted on, where PE's last step would vary it once more.

The labels' ``counts`` and the number of rounds are told to everybody: counts taken from private rows
would have to be accounted for too. ``distance``, ``rows`` and ``true_concentration`` are only in a
report where the clients' work has ``report`` set; they are NOT private, and for tests and benchmarks.
On several ranks every rank asks the model itself: give it a cache.

References:
    Zinan Lin, Sivakanth Gopi, Janardhan Kulkarni, Harsha Nori and Sergey Yekhanin. "Differentially Private
    Synthetic Data via Foundation Model APIs 1: Images." ICLR 2024. https://arxiv.org/abs/2305.15560
    Chulin Xie, Zinan Lin, Arturs Backurs, Sivakanth Gopi, Da Yu, Huseyin A. Inan, Harsha Nori, Haotian
    Jiang, Huishuai Zhang, Yin Tat Lee, Bo Li and Sergey Yekhanin. "Differentially Private Synthetic Data
    via Foundation Model APIs 2: Text." ICML 2024. https://arxiv.org/abs/2403.01749
    Charlie Hou, Akshat Shrivastava, Hongyuan Zhan, Rylan Conway, Trang Le, Adithya Sagar, Giulia Fanti
    and Daniel Lazar. "PrE-Text: Training Language Models on Private Federated Data in the Age of LLMs."
    ICML 2024. https://arxiv.org/abs/2406.02958

Legend: S texts kept, M candidates, H features, C clients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch
from torch import Tensor

from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Sampler
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.knowledge.votes import Votes, concentration, most_voted, resample, vote_probabilities
from lichen.server.sampling import Everyone, Poisson
from lichen.server.sums import fixed_point
from lichen.transforms.privacy import Accountant, Adjacency, Event, Gaussian, Sampled, Statement, Unit, account

__all__ = ["Population", "PrivateEvolution", "QueryCounts"]

Fresh = Callable[[int, int, int], Sequence[str]]
Vary = Callable[[Sequence[str], Sequence[int], int], Sequence[str]]
Embed = Callable[[Sequence[str]], Tensor]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class QueryCounts:
    """Texts that were asked for so far: written anew, varied, embedded."""

    fresh: int = 0
    varied: int = 0
    embedded: int = 0

    def __add__(self, other: QueryCounts) -> QueryCounts:
        return QueryCounts(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


@final
@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """What the server remembers between rounds.

    Attributes:
        texts: S texts; none before the first round.
        label_S: int64, -1 where there are no labels.
        vote_S: Noisy votes that each got in the last round, float64.
        queries: Of the model so far.

    >>> Population.of(Population(("a", "é"), torch.tensor([0, 1]), torch.zeros(2), QueryCounts(fresh=2)).tree()).texts
    ('a', 'é')
    """

    texts: tuple[str, ...] = ()
    label_S: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    vote_S: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    queries: QueryCounts = field(default_factory=QueryCounts)

    def tree(self) -> Tree:
        """As tensors, for a checkpoint: the texts are UTF-8 bytes and where each ends."""
        parts = [text.encode("utf-8", "surrogatepass") for text in self.texts]
        return {
            "texts": torch.tensor(list(b"".join(parts)), dtype=torch.uint8),
            "ends": torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0),
            "labels": self.label_S,
            "votes": self.vote_S,
            "asked": torch.tensor([self.queries.fresh, self.queries.varied, self.queries.embedded]),
        }

    @classmethod
    def of(cls, tree: Tree) -> Population:
        """Undo :meth:`tree`.

        Raises:
            LichenError: if these tensors are no population.
        """
        try:
            data, ends = bytes(tree["texts"].tolist()), tree["ends"].tolist()
            fresh, varied, embedded = tree["asked"].tolist()
            starts = [0, *ends[:-1]] if ends else []
            texts = tuple(data[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True))
            label_S, vote_S = tree["labels"], tree["votes"]
        except (KeyError, TypeError, ValueError) as error:
            raise LichenError(f"is no population: {error!r}", where="checkpoint", fix="start the run anew") from None
        if not len(texts) == len(label_S) == len(vote_S):
            raise LichenError("texts, labels and votes differ in number", where="checkpoint", fix="start the run anew")
        return cls(texts, label_S, vote_S, QueryCounts(fresh=fresh, varied=varied, embedded=embedded))


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SyntheticTexts:
    """What a run ends with: texts with label and noisy votes, what they reveal, and what they cost."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    votes: tuple[float, ...]
    privacy: Statement
    queries: QueryCounts


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrivateEvolution:
    """The server's side, an Algorithm: ``core.rounds.run(evolution, engine, dict, rounds=..., seed=...)``.

    Attributes:
        fresh: ``(label, count, seed)`` to so many new texts; seed and label alone decide what they are.
        vary: ``(texts, labels, seed)`` to one variation of each text.
        embed: Texts to embeddings (M, H), by the encoder the clients use.
        counts: Texts kept of each label. ``{-1: n}`` where there are no labels: all rows vote for all.
        sampler: Invites from the roster. :class:`lichen.server.sampling.Poisson` amplifies privacy.
        weight_N: Examples of every client, for the sampler.
        rounds: How many are planned.
        sigma: Standard deviation of the noise on each count, in votes; 0 for none, and no privacy.
        sensitivity: ``vote.sensitivity(unit, adjacency)``.
        delta: δ of the statement.
        unit: What is protected, a row or a client.
        adjacency: How neighbours differ.
        accountant: Who vouches.
        share: The noise is the clients': each of the n invited adds N(0, σ²/n), as
            ``NearestNeighborHistogram(noise=σ/√n)``. The server adds only what those who did not come would have.
        bits: Those of the clients' votes.
        threshold: Votes below which a count is as good as none; for ``"sample"``.
        choice: ``"most_voted"`` keeps the most voted, ``"sample"`` draws with replacement in proportion.
        variations: New variations of each text, a round.
        parents: The texts themselves are candidates beside their variations.
        lookahead: Variations whose mean embedding stands for a candidate; 0: its own.
        work: The clients' work.
        admission: What counts of what clients send.

    Raises:
        LichenError: if a setting makes no sense, or settings contradict each other.
    """

    fresh: Fresh
    vary: Vary
    embed: Embed
    counts: Mapping[int, int]
    weight_N: Tensor
    rounds: int
    sigma: float
    delta: float
    sensitivity: float = 1.0
    sampler: Sampler = field(default_factory=Everyone)
    unit: Unit = "client"
    adjacency: Adjacency = "add-or-remove"
    accountant: Accountant = "pld"
    share: bool = False
    bits: int = 0
    threshold: float = 0.0
    choice: Literal["rank", "sample"] = "rank"
    variations: int = 1
    parents: bool = True
    lookahead: int = 0
    work: str = "vote"
    admission: Admission = OPEN

    def __post_init__(self) -> None:
        labels = set(self.counts)
        if not labels or min(labels) < -1 or (-1 in labels and len(labels) > 1) or min(self.counts.values()) < 1:
            raise LichenError(
                f"counts {dict(self.counts)}",
                where="evolution.counts",
                fix="keep 1 or more texts of each label from 0, or {-1: n} without labels",
            )
        if self.variations < 1 or self.lookahead < 0:
            raise LichenError(
                f"{self.variations} variations, lookahead {self.lookahead}",
                where="evolution.variations",
                fix="use 1 variation or more, and a lookahead from 0",
            )
        if self.choice not in ("rank", "sample"):
            raise LichenError(f"unknown choice {self.choice!r}", where="evolution.choice", fix="use rank or sample")
        if self.share and isinstance(self.sampler, Poisson):
            raise LichenError(
                "clients cannot share out noise without knowing how many they are",
                where="evolution.share",
                fix="let the server add it, or invite everyone",
            )
        Votes(self.sigma, bits=self.bits)
        Gaussian(self.sigma, sensitivity=self.sensitivity)

    def statement(self, rounds: int | None = None) -> Statement:
        """What so many rounds reveal (all those planned, unless told); known before the first.

        Raises:
            LichenError: as :func:`lichen.transforms.privacy.epsilon`.
        """
        steps = self.rounds if rounds is None else rounds
        plain = Gaussian(self.sigma, sensitivity=self.sensitivity, steps=steps)
        event: Event = plain
        # Under replacement no sampling is claimed, though it would do no harm.
        if isinstance(self.sampler, Poisson) and self.adjacency == "add-or-remove":
            event = Sampled(plain, rate=self.sampler.rate)
        return account([event], self.delta, unit=self.unit, adjacency=self.adjacency, accountant=self.accountant)

    def init(self, shared: Shared) -> ServerState:
        """Nothing written yet. That the noise can be accounted for is seen now, before the model is paid.

        Raises:
            LichenError: as :meth:`statement`.
        """
        self.statement()
        return ServerState(round=0, shared=shared | Shared(Population().tree()))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """Write, ask for votes, choose. A round nobody comes to is decided by its noise.

        Raises:
            LichenError: if the model gives another number of texts, or no embeddings.
        """
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        before = Population.of(state.shared.trainable)
        texts, label_M, queries = self._candidates(before, derive(seed, "write"))
        embedding_MH, also = self._embedded(texts, label_M, derive(seed, "lookahead"))
        candidates: Tree = {"candidates": embedding_MH}
        if -1 not in self.counts:
            candidates["labels"] = label_M.to(torch.int16 if max(self.counts) < 2**15 else torch.int32)
        clients = self.sampler.invite(self.weight_N, derive(seed, "invite"))
        job = Job(
            work=self.work,
            shared=Shared(candidates),
            version=state.round,
            clients=clients,
            seed=derive(seed, "job"),
        )
        votes = Votes(self.sigma, seed=derive(seed, "noise"), bits=self.bits)
        came = collect(engine, [job], votes, admission=self.admission)
        total, seen = came.total, came.metrics
        if self.share:
            votes = replace(votes, sigma=self.sigma * math.sqrt(1 - total.count / len(clients)) if clients else 0.0)
        true_M = fixed_point.read_sums(total)["votes"] * 2.0**-self.bits if total.count else torch.zeros(len(texts))
        noisy_M = votes.noisy(true_M)
        place_S = self._chosen(noisy_M, label_M, derive(seed, "choose"))
        after = Population(
            tuple(texts[i] for i in place_S.tolist()),
            label_M[place_S],
            noisy_M[place_S],
            before.queries + queries + also,
        )
        metrics = {"clients": float(total.count), "concentration": concentration(noisy_M)}
        metrics |= {f"asked_{name}": float(getattr(queries + also, name)) for name in QueryCounts.__slots__}
        if "distance_sum" in seen:
            rows = math.fsum(seen["count"].tolist())
            metrics |= {"rows": rows, "true_concentration": concentration(true_M)}
            metrics |= {"distance": math.fsum(seen["distance_sum"].tolist()) / rows} if rows else {}
        report = Report(
            round=state.round + 1,
            clients=clients,
            metrics=metrics,
            tokens=0,
            bytes_up=engine.bytes_up - up,
            bytes_down=engine.bytes_down - down,
            seconds=time.perf_counter() - start,
            attendance=came.attendance,
        )
        return replace(state, round=state.round + 1, shared=state.shared | Shared(after.tree())), report

    def finish(self, state: ServerState) -> SyntheticTexts:
        """The texts of the last finished round, and what all rounds so far have revealed and cost."""
        last = Population.of(state.shared.trainable)
        return SyntheticTexts(
            texts=last.texts,
            labels=tuple(last.label_S.tolist()),
            votes=tuple(last.vote_S.tolist()),
            privacy=self.statement(state.round),
            queries=last.queries,
        )

    def _candidates(self, before: Population, seed: int) -> tuple[list[str], Tensor, QueryCounts]:
        """``(M texts, label_M, what was queries)``: M is the same in every round."""
        times = self.variations + self.parents
        if not before.texts:
            texts, labels = list[str](), list[int]()
            for label, count in sorted(self.counts.items()):
                texts += _texts(self.fresh(label, count * times, derive(seed, "fresh", label)), count * times, "fresh")
                labels += [label] * (count * times)
            return texts, torch.tensor(labels), QueryCounts(fresh=len(texts))
        old, olds = list(before.texts), before.label_S.tolist()
        texts = list(old) if self.parents else []
        for attempt in range(self.variations):
            texts += _texts(self.vary(old, olds, derive(seed, "vary", attempt)), len(old), "vary")
        return texts, before.label_S.repeat(times), QueryCounts(varied=len(old) * self.variations)

    def _embedded(self, texts: Sequence[str], label_M: Tensor, seed: int) -> tuple[Tensor, QueryCounts]:
        """``((M, H) float16, what was queries)``."""
        ways: list[Sequence[str]] = [
            _texts(self.vary(texts, label_M.tolist(), derive(seed, attempt)), len(texts), "vary")
            for attempt in range(self.lookahead)
        ]
        total_MH = torch.zeros(())
        for way in ways or [texts]:
            one_MH = self.embed(way)
            if one_MH.dim() != 2 or one_MH.shape[0] != len(texts):
                raise LichenError(
                    f"{len(texts)} texts are embedded as {tuple(one_MH.shape)}",
                    where="evolution.embed",
                    fix="return one row a text",
                )
            total_MH = total_MH + one_MH.detach().cpu().double()
        queries = QueryCounts(varied=len(texts) * len(ways), embedded=len(texts) * max(len(ways), 1))
        return (total_MH / max(len(ways), 1)).half(), queries

    def _chosen(self, noisy_M: Tensor, label_M: Tensor, seed: int) -> Tensor:
        if self.choice == "rank":
            return most_voted(noisy_M, label_M, self.counts)
        return resample(vote_probabilities(noisy_M, label_M, threshold=self.threshold), label_M, self.counts, seed)


def _texts(given: Sequence[str], count: int, where: str) -> list[str]:
    if len(given) != count:
        raise LichenError(
            f"{count} texts were asked for and {len(given)} came", where=f"evolution.{where}", fix="return one for each"
        )
    return list(given)
