"""The ``exchange`` section: clients of different architectures share predictions.

References:
    FedMD: arXiv:1910.03581; DS-FL: arXiv:2008.06180; FedDF: arXiv:2006.07242.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lichen.recipes.schema.federation import FederationConfig, OptimizerConfig
from lichen.recipes.schema.help import PublicConfig
from lichen.recipes.schema.model import ModelConfig, Positive, Section
from lichen.tasks.task import Task

__all__ = ["ExchangeConfig", "refuse_heterogeneous"]

Chance = Annotated[float, Field(ge=0.0, le=1.0)]


class ExchangeConfig(Section):
    """What students of unlike architectures make of the public rows, and what they learn from it."""

    kind: Literal["fedmd", "dsfl", "feddf"] = Field(
        default="dsfl",
        description="`fedmd`: clients learn from the mean of all answers; `dsfl`: from that mean sharpened; `feddf`: "
        "weights are averaged within an architecture, and the server teaches each average by the answers of all",
    )
    first_steps: Positive | None = Field(
        default=None,
        description="fedmd, dsfl: local steps before a client speaks for the first time; none: ten rounds' worth",
    )
    distill_steps: Positive | None = Field(
        default=None,
        description="steps on answered public rows in a round, for feddf the server's; none: four times the local ones",
    )
    public_batch_size: Positive = Field(default=32, description="public rows a step")
    mean: Literal["prob", "logits"] | None = Field(
        default=None, description="what is averaged; none: logits for feddf, else probabilities"
    )
    sharpen: float | None = Field(
        default=None,
        gt=0,
        description="temperature that sharpens the mean, 1 for none; none: the paper's 0.1 for dsfl, else 1",
    )
    weighting: Literal["uniform", "examples", "confidence", "classes"] = Field(
        default="uniform",
        description="who is listened to: all alike, by rows, by how sure a client is of each row, or class by class by "
        "rows of that class, which tells the server their number",
    )
    min_confidence: Chance = Field(default=0.0, description="answers whose likeliest class has less do not teach")
    server_lr: float | None = Field(
        default=None, gt=0, description="feddf: the server's learning rate; none: the clients'"
    )

    @property
    def means(self) -> Literal["prob", "logits"]:
        """What is averaged, by the recipe or by the kind."""
        return self.mean or ("logits" if self.kind == "feddf" else "prob")

    @property
    def sharpened(self) -> float | None:
        """The temperature of the mean, by the recipe or by the kind; None where it stays as it is."""
        chosen = self.sharpen or (0.1 if self.kind == "dsfl" else 1.0)
        return None if chosen == 1 else chosen

    def first(self, steps: int) -> int:
        """Local steps of a client's first round, where every other one takes ``steps``."""
        return self.first_steps or 10 * steps

    def digest(self, steps: int) -> int:
        """Steps on public rows in a round of ``steps`` local ones."""
        return self.distill_steps or 4 * steps


def refuse_heterogeneous(
    exchange: ExchangeConfig | None,
    *,
    task: Task,
    model: ModelConfig,
    public: PublicConfig | None,
    optimizer: OptimizerConfig,
    federation: FederationConfig,
) -> None:
    """Refuse an exchange that has nobody or nothing to talk about, or that does not go with another key.

    Args:
        exchange: The section.
        task: The recipe's.
        model: Its model.
        public: Its public rows.
        optimizer: How clients train.
        federation: The rounds.

    Raises:
        ValueError: naming the key and the fix.
    """
    if exchange is None:
        if model.students:
            raise ValueError("exchange: unequal students have no common weights, only answers; add the section")
        return
    if not model.students:
        raise ValueError("model.students: an exchange is among students of the clients; list one or several of them")
    if "exchange" not in task.help:
        raise ValueError("exchange: goes with task classify; remove it, or set task: classify")
    plain = ModelConfig()
    for key in type(model).model_fields:
        if key not in ("students", "device") and getattr(model, key) != getattr(plain, key):
            raise ValueError(f"model.{key}: students stand for themselves; remove it, or remove model.students")
    if public is None:
        raise ValueError("data.public: students talk about public rows, and there are none; add the section")
    if not public.unlabelled:
        raise ValueError("data.public.unlabelled: leaves the students nothing to talk about; raise it")
    _refuse_rounds(exchange, optimizer, federation, model.device)


def _refuse_rounds(
    exchange: ExchangeConfig, optimizer: OptimizerConfig, federation: FederationConfig, device: str
) -> None:
    usual = FederationConfig()
    if exchange.kind == "feddf":
        if exchange.first_steps is not None:
            raise ValueError("exchange.first_steps: every round of feddf is like the first; remove it")
        if exchange.weighting == "classes":
            raise ValueError("exchange.weighting: clients of feddf do not tell their classes; use another word")
        if device != "cpu":
            raise ValueError("model.device: feddf's server works on the processor; set it to cpu")
        return
    if exchange.server_lr is not None:
        raise ValueError(f"exchange.server_lr: the server of {exchange.kind} trains nothing; remove it")
    if optimizer.prox:
        raise ValueError("optimizer.prox: there is no shared model to be pulled to; remove it, or use kind: feddf")
    if federation.server != usual.server:
        raise ValueError("federation.server: there is no shared model to step; remove it, or use kind: feddf")
