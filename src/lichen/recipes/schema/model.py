"""The ``model`` section: a foundation model and its adapter, or a student.

References:
    LoRA: arXiv:2106.09685; rsLoRA: arXiv:2312.03732; IA3: arXiv:2205.05638; soft prompts: arXiv:2104.08691;
    prefixes: arXiv:2101.00190; bottleneck adapters: arXiv:1902.00751; BitFit: arXiv:2106.10199.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from lichen.models.adapters.table import BUILT_IN, Facts, added, facts_of, words_with
from lichen.recipes.schema.explain import explain
from lichen.recipes.schema.names import AdapterName, described_kinds

__all__ = ["AdapterConfig", "ModelConfig", "Positive", "Section", "Share", "StudentConfig"]

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]


class Section(BaseModel):
    """A part of a recipe: every key known, nothing converted, nothing changed once it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class AdapterConfig(Section):
    """What is trained on a frozen model."""

    kind: AdapterName = Field(default=next(iter(BUILT_IN)), description=described_kinds())
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default=("q_proj", "v_proj"),
        description=f"{words_with('target_modules')}: linear layers to adapt, by the end of their names",
    )
    feedforward_modules: tuple[str, ...] = Field(
        default=(),
        description=f"{words_with('feedforward_modules')}: linear layers that are scaled where they read; "
        "target_modules are where they write",
    )
    rank: Positive = Field(default=8, description=f"{words_with('rank')}: rank of B A")
    alpha: float = Field(default=16.0, gt=0, description=f"{words_with('alpha')}: scaling numerator, s = alpha / rank")
    rslora: bool = Field(default=False, description=f"{words_with('rslora')}: s = alpha / sqrt(rank)")
    num_virtual_tokens: Positive = Field(default=16, description=f"{words_with('num_virtual_tokens')}: virtual tokens")
    start: str = Field(
        default="", description=f"{words_with('start')} with cma: text it starts from; none: the end token"
    )
    width: Positive = Field(default=16, description=f"{words_with('width')}: its width")
    last: Positive | None = Field(
        default=None,
        description="adapt only so many of the last layers, and compute those below once a row; none: all",
    )
    exclude: tuple[str, ...] = Field(
        default=(), description=f"{words_with('exclude')}: weights left as they are, by the end of their names"
    )
    modules_to_save: tuple[str, ...] = Field(default=(), description="modules trained in full, such as a new head")
    init_from: str | None = Field(
        default=None, description="folder of a PEFT adapter to start from: see below", examples=["runs/mine-1/adapter"]
    )

    @property
    def facts(self) -> Facts:
        """What is known of its kind without its code."""
        return facts_of(self.kind)

    @model_validator(mode="after")
    def _means_something(self) -> AdapterConfig:
        if self.facts.whole and self.modules_to_save:
            raise ValueError(f"model.adapter.modules_to_save: {self.kind} trains every module; remove it")
        return self


class StudentConfig(Section):
    """A small model trained from scratch."""

    kind: Literal["text-cnn", "transformer", "image-mlp", "image-cnn"] = Field(description="its architecture")
    width: Positive = Field(default=64, description="hidden width")


class ScratchConfig(Section):
    """A language model that nobody has trained: a Llama of this size, with a tokenizer of its own."""

    text: str | None = Field(
        default=None,
        description="public text its tokenizer is learned from, by catalog name or file; none: the data's own",
        examples=["sotu"],
    )
    vocabulary: Annotated[int, Field(ge=258)] = Field(default=2048, description="tokens at most; bytes take 256")
    width: Positive = Field(default=128, description="size of a token's vector")
    layers: Positive = Field(default=4, description="blocks")
    heads: Positive = Field(default=4, description="attention heads")


def _of_its_kind(value: Any, built_in: ValidatorFunctionWrapHandler, info: ValidationInfo) -> AdapterConfig:
    """The section of a kind that brings keys of its own, else the house's."""
    word = value.get("kind") if isinstance(value, dict) else None
    section = AdapterConfig
    if isinstance(word, str) and word in added():
        section = facts_of(word).section or AdapterConfig
    if section is AdapterConfig and info.mode != "json":
        return built_in(value)  # type: ignore[no-any-return]
    if not isinstance(value, dict):
        return built_in(value)  # type: ignore[no-any-return]
    try:
        # Strict JSON has lists where Python has tuples, and the checker has made Python of it.
        return section.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        if section is AdapterConfig:
            raise
        fault = explain(error, section)
        raise ValueError(f"model.adapter.{fault.where}: {fault.what}; {fault.fix}") from None


if TYPE_CHECKING:
    AnyAdapter = AdapterConfig
else:
    AnyAdapter = Annotated[SerializeAsAny[AdapterConfig], WrapValidator(_of_its_kind)]


class ModelConfig(Section):
    """The frozen foundation model, or what is trained instead of one."""

    name: str | None = Field(
        default=None,
        description="catalog name, local folder, GGUF file or hub id; none for a student",
        examples=["smollm2-135m"],
    )
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        default="float32", description="precision of frozen weights"
    )
    quantize: Literal["int8", "nf4"] | None = Field(
        default=None, description="frozen linear layers in 8 or 4 bits; needs the extra `quantized`; none: as they are"
    )
    device: str = Field(default="cpu", description="torch device")
    layers: Positive | None = Field(default=None, description="only its first blocks, so many; none: all")
    random: bool = Field(
        default=False,
        description="weights drawn by the seed in place of its own: the same model, without what it knows",
    )
    head: Literal["base", "random", "ridge", "lda"] = Field(
        default="base",
        description="classify: where the head begins; `base`: the model's own, where it names its classes, else "
        "drawn; `random`: drawn by the seed; `ridge`, `lda`: in closed form, from the clients' statistics",
    )
    adapter: AnyAdapter = Field(default=AdapterConfig(), description="what is trained on the frozen model")
    student: StudentConfig | None = Field(default=None, description="train this small model from scratch instead")
    students: tuple[StudentConfig, ...] = Field(
        default=(),
        description="with exchange: small models of unlike clients, dealt out in turns, or by federation.memory",
    )
    scratch: ScratchConfig | None = Field(default=None, description="pre-train this language model instead")
