"""The ``pipeline`` section: hosts that hold a piece of the model each.

References: those of :mod:`lichen.clients.pipeline.schedule`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lichen.core.errors import LichenError
from lichen.recipes.schema.model import Positive, Section
from lichen.transforms.codec_words import CHANGE, token_fault

__all__ = ["PipelineConfig", "misfits_of_hosts", "unread_by_hosts"]


class PipelineConfig(Section):
    """One model over hosts none of which could hold it; task chat, LoRA."""

    hosts: Annotated[int, Field(ge=2, le=256)] = Field(
        description="hosts; each loads consecutive blocks, the first the embeddings too, the last the head",
        examples=[3],
    )
    micro: Annotated[int, Field(ge=1, le=256)] = Field(
        default=4, description="micro-batches that a step's rows are cut into; more of them leave hosts waiting less"
    )
    schedule: Literal["gpipe", "1f1b"] = Field(
        default="1f1b",
        description="`gpipe`: all micro-batches forward, then all back; `1f1b`: back as soon as one can, so that a "
        "host holds as many at once as there are hosts; both end with the same bytes",
    )
    parts: tuple[Positive, ...] | None = Field(
        default=None,
        description="blocks of each host; none: so that no host has more of the bytes or of the work than need be",
        examples=[[8, 15, 7]],
    )

    code: tuple[str, ...] = Field(
        default=(),
        description="codecs of hidden states and gradients between hosts, token by token, in training and in scoring: "
        "`bf16`, `int8`, `int4`, `topk:64/256` …; none: as they are",
    )

    @model_validator(mode="after")
    def _known_words(self) -> PipelineConfig:
        if CHANGE in self.code:
            raise ValueError("pipeline.code: hosts remember no rows between rounds, and send no change; remove it")
        if fault := token_fault(self.code):
            raise ValueError(f"pipeline.code: {fault}")
        return self

    @model_validator(mode="after")
    def _one_each(self) -> PipelineConfig:
        if self.parts is not None and len(self.parts) != self.hosts:
            raise ValueError(f"pipeline.parts: names {len(self.parts)} hosts of {self.hosts}; name each one's blocks")
        return self


_READ = (
    *("name", "question", "task", "seed", "pipeline"),
    *("model.name", "model.dtype", "model.adapter.target_modules", "model.adapter.rank", "model.adapter.alpha"),
    *("model.adapter.rslora", "model.adapter.last", "model.adapter.modules_to_save"),
    *("data.name", "data.columns", "data.form", "data.system", "data.template", "data.thinking", "data.max_length"),
    *("data.partition", "data.max_clients", "data.min_rows", "data.max_rows", "data.test_rows", "data.split_by"),
    *("data.valid", "data.test", "data.on_too_few_rows", "data.copies", "data.require", "data.cards"),
    *("optimizer.name", "optimizer.lr", "optimizer.momentum", "optimizer.weight_decay", "optimizer.clip"),
    *("optimizer.schedule", "optimizer.warmup"),
    *("federation.rounds", "federation.clients_per_round", "federation.sampling", "federation.local_steps"),
    *("federation.batch_size", "federation.valid_every", "federation.patience"),
    *("compare.baselines", "compare.metric", "compare.target"),
    *("engine.name", "engine.gradient_checkpointing", "engine.history"),
)
"""Keys and sections."""


def misfits_of_hosts(recipe: Any) -> Iterator[str]:
    """Why a section ``pipeline`` does not go with other keys, as the schema's checker wants it."""
    if recipe.task != "chat":
        yield "pipeline: hosts hold pieces of a language model; use task: chat, or remove it"
    if recipe.model.name is None:
        yield "model.name: hosts load pieces of a saved model; name one, or remove pipeline"
    if recipe.model.adapter.kind != "lora":
        yield f"model.adapter.kind: {recipe.model.adapter.kind} is not trained in pieces; use lora, or remove pipeline"
    if recipe.optimizer.name not in ("adamw", "sgd"):
        yield f"optimizer.name: hosts do not train by {recipe.optimizer.name}; use adamw or sgd, or remove pipeline"
    if recipe.optimizer.prox:
        yield "optimizer.prox: there is one model, and none to be pulled to; remove it, or pipeline"
    if len(recipe.optimizer.lr) > 1:
        yield "optimizer.lr: hosts train at one learning rate; name one, or remove pipeline"
    if recipe.engine.name not in ("local", "spawned"):
        yield "engine.name: hosts are in this process or in processes of their own; use local or spawned"
    if other := [name for name in recipe.compare.baselines if name != "base"]:
        yield (
            f"compare.baselines: {other[0]} trains a whole model, which no host holds; "
            "set it to [base] or to none, or remove pipeline"
        )


def unread_by_hosts(key: str) -> LichenError | None:
    """What the writer of a recipe with hosts is to be told of a key that nobody reads there; None if somebody does."""
    if any(f"{key}.".startswith(f"{read}.") for read in _READ):
        return None
    what = "a pipeline does not read it, for its hosts train one model together"
    return LichenError(what, where=key, fix="remove it, or pipeline")
