"""Schedules: rounds that wait for those invited, and FedBuff, which steps after so many answers, whoever gives them.

FedBuff keeps M clients at work and steps after every K answers. An answer made for tensors that are s steps old
weighs (1 + s)^-a of a fresh one, with a = 1/2 in the paper; what the sum is then divided by is the aggregator's
choice (:mod:`lichen.server.mean`: the paper's is ``Mean("uniform", divisor="plain")``). Who answers is replaced when
the step is made, so that one job goes out for each version; with K = M and nobody late every round is a synchronous
one.

FedAsync steps after each answer, and mixes models instead of adding a change: with α_τ = α s(τ) for an answer that is τ
steps old,

    w ← (1 - α_τ) w + α_τ w_k,   w_k = w_v + Δ_k,   so that the change is  α_τ (Δ_k + w_v - w)

s is (1 + τ)^-a, or the hinge of the same paper: 1 up to b steps, and 1 / (a (τ - b) + 1) beyond.

References:
    John Nguyen, Kshitiz Malik, Hongyuan Zhan, Ashkan Yousefpour, Mike Rabbat, Mani Malek and Dzmitry Huba.
    "Federated Learning with Buffered Asynchronous Aggregation." AISTATS 2022. https://arxiv.org/abs/2106.06639
    Cong Xie, Sanmi Koyejo and Indranil Gupta. "Asynchronous Federated Optimization." OPT 2020.
    https://arxiv.org/abs/1903.03934 (FedAsync, the polynomial discount, the hinge)
    Keith Bonawitz et al. "Towards Federated Learning at Scale: System Design." MLSys 2019.
    https://arxiv.org/abs/1902.01046 (a round's deadline, and the least that must come)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from lichen.core.errors import LichenError
from lichen.core.seeds import derive, numpy_generator

__all__ = ["SYNCHRONOUS", "Buffered", "Synchronous"]

DRAWS = 64
"""Times a sampler is asked for clients that are free; it may know of no others."""


def _check(deadline: float, least: int) -> None:
    if not deadline > 0:
        raise LichenError(
            f"{deadline} seconds are no time", where="federation.schedule.deadline", fix="use more than 0"
        )
    if least < 1:
        raise LichenError(f"{least} clients make no step", where="federation.schedule.least", fix="use 1 or more")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Synchronous:
    """A round waits for all it has invited, or until its deadline.

    Attributes:
        deadline: Seconds a round waits at most.
        least: Clients that must count for a step.

    Raises:
        LichenError: if one of them is not positive.
    """

    deadline: float = math.inf
    least: int = 1

    def __post_init__(self) -> None:
        _check(self.deadline, self.least)

    @property
    def loses_answers(self) -> bool:
        """With a deadline, or where more than one must count."""
        return self.deadline < math.inf or self.least > 1

    @property
    def takes_old(self) -> bool:
        """Never."""
        return False

    def invite(self, draw: Callable[[int], tuple[int, ...]], busy: frozenset[int], seed: int) -> tuple[int, ...]:
        """Whom the sampler draws; nobody is busy between such rounds."""
        return tuple(client for client in draw(seed) if client not in busy)

    def enough(self, arrived: int) -> bool:
        """Never before all have answered."""
        return False

    @property
    def mixing(self) -> float | None:
        """None: changes are added."""
        return None

    def discount(self, age: int) -> float:
        """No answer is old."""
        return 1.0


SYNCHRONOUS = Synchronous()
"""Rounds that wait for everybody."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Buffered:
    """FedBuff: so many clients in flight, a server step after every so many answers.

    Attributes:
        arrivals: Answers of a step, K.
        concurrency: Clients at work after each step, M. The sampler draws as many.
        exponent: How fast an answer loses weight with age, a.
        hinge: Up to this age an answer loses nothing, b; None: the discount is a power of the age.
        mixing: Share of a fresh client's model in a step, α of FedAsync; None: changes are added.
        max_age: The oldest answer that counts, in server steps; None: any.
        deadline: Seconds after which a client that has not answered is given up.
        least: Answers that a step needs where nobody is left who could give more.

    Raises:
        LichenError: if a number is out of its range, more answers are awaited than clients are at work, or models are
            mixed of several answers.

    >>> two = Buffered(arrivals=2, concurrency=4, max_age=3)
    >>> [round(two.discount(age), 3) for age in range(5)]
    [1.0, 0.707, 0.577, 0.5, 0.0]
    """

    arrivals: int
    concurrency: int
    exponent: float = 0.5
    hinge: int | None = None
    mixing: float | None = None
    max_age: int | None = None
    deadline: float = math.inf
    least: int = 1

    def __post_init__(self) -> None:
        _check(self.deadline, self.least)
        if not 1 <= self.arrivals <= self.concurrency:
            raise LichenError(
                f"{self.arrivals} answers of {self.concurrency} clients at work",
                where="federation.schedule.arrivals",
                fix="use 1 <= arrivals <= concurrency",
            )
        if self.exponent < 0 or not math.isfinite(self.exponent) or (self.max_age is not None and self.max_age < 0):
            raise LichenError(
                f"exponent {self.exponent} and max_age {self.max_age} are out of range",
                where="federation.schedule",
                fix="use 0 or more",
            )
        if self.hinge is not None and self.hinge < 0:
            raise LichenError(
                f"an age of {self.hinge}", where="federation.schedule.hinge", fix="use 0 or more, or none"
            )
        if self.mixing is not None and (self.arrivals != 1 or not 0 < self.mixing <= 1):
            raise LichenError(
                f"a share {self.mixing} of the models of {self.arrivals} answers",
                where="federation.schedule.mixing",
                fix="use more than 0 and at most 1, and arrivals: 1",
            )

    @property
    def loses_answers(self) -> bool:
        """The same, and with a greatest age."""
        return self.deadline < math.inf or self.least > 1 or self.max_age is not None

    @property
    def takes_old(self) -> bool:
        """Unless none may be a step old."""
        return self.max_age != 0

    def invite(self, draw: Callable[[int], tuple[int, ...]], busy: frozenset[int], seed: int) -> tuple[int, ...]:
        """As many free clients as are missing at work; fewer where the sampler finds no more."""
        vacant, found = self.concurrency - len(busy), set[int]()
        for again in range(DRAWS if vacant > 0 else 0):
            candidates = [c for c in draw(derive(seed, "again", again) if again else seed) if c not in busy | found]
            if len(candidates) > vacant - len(found):
                candidates = (
                    numpy_generator(seed, "some", again).permutation(candidates)[: vacant - len(found)].tolist()
                )
            found.update(candidates)
            if len(found) == vacant:
                break
        return tuple(sorted(found))

    def enough(self, arrived: int) -> bool:
        """After K answers."""
        return arrived >= self.arrivals

    def discount(self, age: int) -> float:
        """``(1 + age) ** -exponent`` or the hinge, and 0 beyond ``max_age``."""
        if self.max_age is not None and age > self.max_age:
            return 0.0
        if self.hinge is not None:
            return 1.0 / (self.exponent * max(age - self.hinge, 0) + 1.0)
        return float((1 + age) ** -self.exponent)
