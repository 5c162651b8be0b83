"""How the ways of forgetting that come near do it, each with its published defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from lichen.core.errors import LichenError

__all__ = ["APPROXIMATE", "How", "NearOptions"]

How = Literal["subtract", "replay", "eraser", "negate", "npo"]
"""The ways of forgetting a client."""

APPROXIMATE = ("eraser", "negate", "npo")
"""Ways whose model is near one that never met the client, and not that one."""

_READ = {"eraser": ("every", "local"), "negate": ("rate", "repair"), "npo": ("beta", "alpha", "gamma", "rounds")}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NearOptions:
    """What a way of forgetting can be told; each way reads its own.

    Attributes:
        every: eraser: rounds from one that is used to the next.
        local: eraser: a calibration's local steps or passes, as a share of the run's.
        rate: negate: α, how much of the client's shares is taken off.
        repair: negate: rounds of the others after that.
        beta: npo: β; the smaller, the more it is gradient ascent.
        alpha: npo: α, the factor on the learning rate of the others' rounds.
        gamma: npo: γ, that of the client's rounds.
        rounds: npo: rounds in all, the client's and the others' in turns.

    Raises:
        LichenError: if a number is out of range.
    """

    every: int = 2
    local: float = 0.5
    rate: float = 1.0
    repair: int = 2
    beta: float = 0.1
    alpha: float = 1.0
    gamma: float = 1.0
    rounds: int = 4

    def __post_init__(self) -> None:
        for name, value, least in (("every", self.every, 1), ("repair", self.repair, 0), ("rounds", self.rounds, 1)):
            if value < least:
                raise LichenError(f"{value} is too few", where=f"--{name}", fix=f"use {least} or more")
        for name, number in (("rate", self.rate), ("beta", self.beta), ("alpha", self.alpha), ("gamma", self.gamma)):
            if not 0 < number < float("inf"):
                raise LichenError(f"{number} is not above 0", where=f"--{name}", fix="use a number above 0")
        if not 0 < self.local <= 1:
            raise LichenError(f"{self.local} is no share", where="--local", fix="use a number above 0, at most 1")

    @classmethod
    def given(cls, how: str, **numbers: float | None) -> NearOptions:
        """The defaults, and the numbers that are given.

        Args:
            how: The way.
            numbers: By name; None: not given.

        Raises:
            LichenError: if a number is out of range, or the way reads no such one.
        """
        known = {name: number for name, number in numbers.items() if number is not None}
        for name in known:
            if name not in _READ.get(how, ()):
                reads = ", ".join(f"--{one}" for one in _READ.get(how, ()))
                fix = f"leave it out; {how} reads {reads}" if reads else "leave it out"
                raise LichenError(f"{how} does not read it", where=f"--{name}", fix=fix)
        return cls(**known)  # type: ignore[arg-type]

    def of(self, how: str) -> dict[str, float]:
        """Those that one way reads.

        >>> NearOptions().of("negate")
        {'rate': 1.0, 'repair': 2}
        """
        return {name: getattr(self, name) for name in _READ.get(how, ())}
