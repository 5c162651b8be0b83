"""A site's policy: what it lets recipes of others ask of it.

``policy.yaml`` lies in a site's kit and is read as strictly as a recipe. Nothing that tells of single rows is allowed
until its owner allows it: a policy without keys refuses every model, every text, every count of labels and every file.
Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.models.adapters.table import BUILT_IN as ADAPTERS
from lichen.recipes.init.write import every_key
from lichen.recipes.schema.model import Positive, Section
from lichen.recipes.schema.names import AdapterName, TaskName
from lichen.recipes.schema.strict import check, plain, read_mapping, text_of
from lichen.recipes.schema.yaml import load_yaml
from lichen.tasks.registry import BUILT_IN as TASKS

__all__ = ["POLICY", "Policy", "Work", "change_policy", "digest_of", "policy_text", "read_policy"]

Work = Literal["train", "valid", "test", "alone", "personal", "statistics", "exchange", "value"]
"""What a site can be asked to do, beside declaring itself: a policy's word for the works of jobs."""

POLICY = "policy.yaml"
"""The policy's file in a site's kit."""

_PINNED = "@sha256:"
"""Between a model's name and the digest of its weights."""


class Policy(Section):
    """What a site allows."""

    models: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="foundation models by their names in recipes; NAME@sha256:DIGEST allows the one whose frozen "
        "weights have this digest, and @sha256:DIGEST every model of the catalog whose weights have it; none: none",
        examples=[["smollm2-135m"]],
    )
    from_scratch: bool = Field(
        default=False,
        description="whether models without a foundation may be trained: model.student, students, scratch",
    )
    tasks: tuple[TaskName, ...] = Field(default=tuple(TASKS), description="tasks; of other packages where listed")
    adapters: tuple[AdapterName, ...] = Field(
        default=tuple(ADAPTERS), description="kinds of adapters on a foundation model; of other packages where listed"
    )
    works: tuple[Work, ...] = Field(
        default=get_args(Work),
        description="what is done here: training, validation, the final score, training alone to compare with, "
        "clients' own models, sums of features, answers of an exchange, gradients of validation rows for values",
    )
    metrics: bool = Field(
        default=True,
        description="whether losses and scores, summed over rows, go up, a classifier's as counts of rows by class and "
        "answer; every recipe has them",
    )
    sizes: bool = Field(
        default=True,
        description="whether numbers of rows go up; every recipe has them",
    )
    labels: bool = Field(
        default=False,
        description="whether names of classes and numbers of training rows by class go up; without, recipes list the "
        "classes",
    )
    texts: bool = Field(default=False, description="whether texts go up, or rows of clients become public")
    answers: bool = Field(
        default=False, description="whether answers of a model trained here, votes or flags of single rows go up"
    )
    files: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="files and folders of this site that recipes may name, as they name them"
    )
    endpoints: dict[str, str] = Field(
        default_factory=dict,
        description="addresses of foundation models that may be asked, each with the environment variable of its key, "
        'or ""',
        examples=[{"http://127.0.0.1:8000/v1": ""}],
    )
    most_rounds: Positive = Field(default=100, description="rounds of a recipe, those of all its learning rates")
    most_bytes_a_round: Positive = Field(
        default=10**9, description="bytes that may go up from this site in a round, and bytes of a job"
    )
    least_clients: Positive = Field(
        default=2, description="clients of a round, in all sites together, that must count; 2: nobody is averaged alone"
    )
    most_epsilon: float = Field(
        default=0.0,
        ge=0,
        description="ε that a recipe's rounds may spend on a client or a row; 0: any, and recipes without noise",
    )
    secure_aggregation: bool = Field(
        default=False, description="whether the coordinator may see nothing of a message but the sum of a round"
    )

    @field_validator("models")
    @classmethod
    def _digests(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        for model in models:
            digest = digest_of(model)
            if digest is not None and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
                raise ValueError(f"models: {model[:40]!r} has no digest of 64 small hex digits; mend or remove it")
        return models


def digest_of(model: str) -> str | None:
    """The digest that an entry of ``models`` asks for, None where it names the model alone.

    >>> digest_of("smollm2-135m"), digest_of("smollm2-135m@sha256:00")
    (None, '00')
    """
    _, sign, digest = model.partition(_PINNED)
    return digest if sign else None


def read_policy(file: Path) -> Policy:
    """Read a policy and check every key of it.

    Args:
        file: ``policy.yaml`` in the kit.

    Raises:
        LichenError: for the first fault, with the file, the key and the fix.
    """
    fix = f"write one: lichen federation policy {file}"
    if not file.is_file():
        raise LichenError("is no file, and without a policy this site allows nothing", where=str(file), fix=fix)
    values = read_mapping(text_of(file, kind="policy"), where=str(file), kind="policy", fix=fix)
    try:
        return check(Policy, plain(values, "policy"))
    except LichenError as error:
        raise LichenError(error.what, where=f"{file}: {error.where}", fix=error.fix) from None


def change_policy(file: Path, changes: Sequence[str]) -> None:
    """Write a policy with other values for some keys; where there is none, of the careful one.

    Comments of its own are lost; what each key means is written beside it.

    Args:
        file: ``policy.yaml`` in the kit.
        changes: ``key=value`` each, the value as YAML has it.

    Raises:
        LichenError: for the first fault, in the file or a change.
    """
    values = read_policy(file).model_dump(mode="json", exclude_defaults=True) if file.exists() else {}
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise LichenError(f"{change!r} gives no value", where="--set", fix="write key=value")
        values[key.strip()] = load_yaml(value, where=f"--set {key.strip()}")
    write_atomic(file, policy_text(**values).encode())


def policy_text(**given: Any) -> str:
    """A policy in YAML, with every key and its meaning.

    Args:
        given: Values that are not the default.

    Raises:
        LichenError: if one of them is not one.
    """
    values = plain(given, "policy")
    check(Policy, values)
    head = "# What this site lets recipes of others ask of it; keys left out take the value that stands here.\n\n"
    lines = every_key(Policy, values, lambda path, text: True)
    return head + "\n".join(lines).rstrip() + "\n"
