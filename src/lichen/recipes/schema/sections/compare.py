"""The ``compare`` section: what a run is held against, and by which number."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lichen.recipes.schema.model import Positive, Section
from lichen.recipes.schema.names import MetricName

__all__ = ["CompareConfig"]


class CompareConfig(Section):
    """What the federation is held against."""

    baselines: tuple[Literal["base", "alone", "alone_best", "pooled", "no_help"], ...] = Field(
        default=("base", "alone", "pooled"),
        description="columns beside federated; `alone` with its share of the federation's rounds, `alone_best` for as "
        "long as it gains; `no_help`: the same federation with no help from a foundation model",
    )
    alone_epochs: Positive = Field(
        default=20,
        description="alone_best: passes over its rows after which a client stops in any case, unless its share of the "
        "federation's rounds is more",
    )
    alone_patience: Positive = Field(
        default=5, description="alone_best: validations without a gain after which a client stops"
    )
    metric: MetricName | None = Field(
        default=None, description="what is compared; none: perplexity for chat, preference for prefer, else macro_f1"
    )
    forms: tuple[Literal["plain", "transcript", "chat"], ...] = Field(
        default=(),
        description="forms the bare model is tried in; its score is in the one that is best on validation rows",
    )
    pooled_batch_size: Positive | None = Field(
        default=None, description="rows a step of the pooled column; steps keep the budget"
    )
    retention_text: str | None = Field(
        default=None, description="catalog text whose perplexity is taken before and after", examples=["sotu"]
    )
    retention_rows: Positive = Field(default=64, description="rows of it")
    requests: str | None = Field(
        default=None,
        description="chat: requests that should be refused, by catalog name, hub id or file, on which refusals are "
        "counted and which nobody trains on; none: harmbench where there is federation.repair or an attack of kind "
        "unsafe, else none are",
        examples=["harmbench"],
    )
    requests_rows: Positive = Field(default=64, description="how many of them, drawn by the seed")
    target: float | None = Field(
        default=None,
        description="what validation is to reach: summary and comparison tell after how many rounds, bytes and seconds "
        "it did",
    )
    target_metric: Literal["loss", "accuracy"] = Field(
        default="loss", description="what the target is: clients' mean loss, or the share of all rows that are right"
    )
    proxy: str | None = Field(
        default=None,
        description="chat: a larger model with the same tokenizer, by catalog name, folder or hub id, scored by itself "
        "(column `big`) and with what the federation taught the small one added to its logits (column `proxy`)",
        examples=["models/large"],
    )
    partitions: Positive = Field(default=10, description="oneshot: random partitions to compare with pooled")
