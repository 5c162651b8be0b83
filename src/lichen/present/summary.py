"""The summary of a run: the numbers that tables and pages quote, in one fixed shape.

A mean over clients hides those a federation leaves behind, so each column carries the mean of its
worst tenth of clients too (the tail measure of fair federated learning), and the summary says how
many clients gain over training alone: over the stronger column of it, where there are two.

References:
    Li, Sanjabi, Beirami, Smith. "Fair Resource Allocation in Federated Learning". International
    Conference on Learning Representations, 2020. https://arxiv.org/abs/1905.10497
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lichen.core.errors import LichenError
from lichen.core.files.manifest import MANIFEST, check
from lichen.present.gains import Gain
from lichen.present.reading import CardLeft, CardShown, Masks, Privacy, Read
from lichen.tasks.registry import BUILT_IN, task_names

if TYPE_CHECKING:
    from lichen.core.contracts.algorithm import Report

__all__ = [
    "COLUMNS",
    "Columns",
    "Score",
    "Training",
    "attendance_of",
    "check_summary",
    "read_summary",
    "share_gaining",
    "stronger_alone",
    "traffic_of",
    "worst_decile",
]

COLUMNS = ("base", "alone", "federated", "pooled")

ALONE = ("alone", "alone_best")
"""The columns of clients by themselves."""

LARGEST = 16 << 20
"""Bytes of a summary at most: it may come from a stranger."""

_Count = Annotated[int, Field(ge=0, lt=2**63)]


def _known(task: str) -> str:
    if task not in BUILT_IN and task not in task_names():
        raise ValueError("no task of this name")
    return task


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Score(_Part):
    """One column's score over the clients."""

    mean: float
    worst_decile: float | None
    """Null where one model is scored on one test set that all clients share: everybody has the mean; and under masks,
    where clients are fewer than ten."""


class Columns(_Part):
    """The ways of learning that are compared; null where one was not run."""

    base: Score | None
    alone: Score | None
    federated: Score | None
    pooled: Score | None


class Training(_Part):
    """What a column was trained on, at the learning rate that was chosen."""

    rounds: _Count
    """Rounds that were run."""
    of: _Count
    """Rounds there were to be; fewer were run where patience ended them."""
    kept: _Count | None
    """The round whose tensors were scored; null where every client keeps its own best."""
    rows: Annotated[float, Field(ge=0)]
    """Rows trained on, in all rounds, each as often as it was."""
    rows_there: _Count
    """Training rows of all clients."""
    passes: Annotated[float, Field(ge=0)]
    """``rows / rows_there``."""
    share_seen: Annotated[float, Field(ge=0, le=1)]
    """Share of the training rows that are trained on at least once, on average over draws."""


class Traffic(_Part):
    """What training the federated column cost in bytes, at the learning rate that was chosen.

    Validation stands apart: how often one looks is no part of a method. Traces of older versions hold the two
    together; where every round was validated they cannot be told apart, and ``validation`` says that it is
    counted in.
    """

    rounds: _Count
    trainings: _Count
    """Times a client trained, over all rounds."""
    client_up: Annotated[float, Field(ge=0)]
    """Bytes from a client for one training, on average."""
    client_down: Annotated[float, Field(ge=0)]
    """Bytes to it."""
    up: Annotated[float, Field(ge=0)]
    """Bytes from all clients in all rounds, and what they sent besides rounds."""
    down: Annotated[float, Field(ge=0)]
    validation: bool
    valid_up: Annotated[float, Field(ge=0)] | None = None
    """Bytes from all clients for validation, in all rounds; null where it is not known."""
    valid_down: Annotated[float, Field(ge=0)] | None = None
    validators: _Count | None = None
    """Clients that validated in the rounds."""


class Attended(_Part):
    """Who came to the rounds of the federated column, and to their validations."""

    invited: _Count
    """Times a client was asked."""
    arrived: _Count
    """Times a client's message counted."""
    refused: dict[str, _Count]
    """Messages that were not counted, by reason."""
    missing: _Count
    """Times nothing came in time."""
    skipped: _Count
    """Rounds with too few answers, which changed nothing."""
    causes: dict[str, _Count] = Field(default_factory=dict)
    """Times a client that was asked did not count, by cause."""


class Attacked(_Part):
    """Who lied on purpose in the federated column; their rows, and so their scores, are honest."""

    kind: str
    """The recipe's ``attack.kind``."""
    liars: _Count
    names: list[str]
    """The liars', in roster order."""


class Compute(_Part):
    """Floating-point operations of training, estimated from the tokens that were trained on."""

    training_flops: dict[str, Annotated[float, Field(ge=0)]]
    """By trained column, all its learning rates together."""
    base_flops: Annotated[float, Field(gt=0)] | None
    """Of the base's own training; null where nobody has published what they follow from."""
    base_source: str
    """Who has, and how they follow."""


class Summary(_Part):
    """What ``summary.json`` holds: these keys, all of them, and no others.

    ``gaining_over``, ``gains``, ``energy_joules``, ``compute``, ``traffic``, ``attendance``, ``training``,
    ``failures``, ``privacy``, ``masks``, ``attack``, ``read``, ``licences``, ``cards`` and ``cards_left`` alone may be
    missing, as in summaries of older runs; null says that it was not measured, or that there is nothing to say.
    """

    name: str
    question: str
    task: Annotated[str, AfterValidator(_known)]
    metric: str
    higher_is_better: bool
    columns: Columns
    extra_columns: dict[str, Score]
    share_gaining: Annotated[float, Field(ge=0, le=1)] | None
    """Share of the clients with a better score in the federation than in ``gaining_over``."""
    gaining_over: str | None = None
    """The column of training alone that clients' gains are held against; null: ``alone``, where it was run."""
    gains: dict[str, dict[str, Gain]] = Field(default_factory=dict)
    """By column and by what clients could have had without the others: who gains and who is harmed."""
    clients: _Count
    bytes_up: _Count
    bytes_down: _Count
    traffic: Traffic | None = None
    attendance: Attended | None = None
    """Null where everybody came to every round and nothing was refused."""
    training: dict[str, Training] = Field(default_factory=dict)
    """By trained column; empty for tasks without rounds."""
    failures: list[str] = Field(default_factory=list)
    """Trained columns that learned nothing, a sentence each: they show the model as it was at the start."""
    attack: Attacked | None = None
    """Null where nobody lied on purpose."""
    privacy: Privacy | None = None
    """Null where no noise hides anybody."""
    masks: Masks | None = None
    """Null where the server sees each message."""
    seconds: Annotated[float, Field(ge=0)]
    peak_memory_bytes: _Count
    energy_joules: Annotated[float, Field(ge=0)] | None = None
    compute: Compute | None = None
    """Null for students, which have no base, and for tasks without rounds."""
    read: Read | None = None
    """What was read of the data, and what was left out or cut."""
    licences: dict[str, _Count] = Field(default_factory=dict)
    """How many of the clients have rows of each licence; those whose owners say nothing are in none."""
    cards: list[CardShown] = Field(default_factory=list)
    cards_left: list[CardLeft] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    versions: dict[str, str]
    recipe_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    extra: dict[str, float | str | None]


def check_summary(summary: Mapping[str, Any], *, where: str = "summary") -> dict[str, Any]:
    """Check a summary's shape.

    Args:
        summary: What was or will be written as JSON.
        where: What an error names as its place.

    Returns:
        The same content as plain dicts.

    Raises:
        LichenError: naming the first key that is missing, unknown or of the wrong type.
    """
    try:
        return Summary.model_validate(dict(summary)).model_dump(mode="json")
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(step) for step in fault["loc"])
        words = {"missing": "is missing", "extra_forbidden": "is no key of a summary"}
        what = words.get(fault["type"], f"has a value that does not fit: {str(fault.get('input'))[:40]!r}")
        raise LichenError(f"{key} {what}", where=where, fix="run again with this version of lichen") from None


def read_summary(folder: Path) -> dict[str, Any]:
    """The checked summary of a finished run.

    Args:
        folder: The run's folder, or its ``summary.json``.

    Raises:
        LichenError: if there is none, or it is damaged.
    """
    folder = Path(folder)
    path = folder if folder.is_file() else folder / "summary.json"
    again = f"run again: lichen run --resume {folder}"
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise LichenError("is no plain file", where=str(path), fix="name a folder `lichen run` made")
        if about.st_size > LARGEST:
            what = f"is larger than {LARGEST >> 20} MiB, which no summary is"
            raise LichenError(what, where=str(path), fix="name a folder `lichen run` made")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if (folder / "recipe.yaml").is_file():
            raise LichenError(
                "the run is not finished", where=str(folder), fix=f"go on with: lichen run --resume {folder}"
            ) from None
        raise LichenError("is not a run's folder", where=str(folder), fix="name a folder `lichen run` made") from None
    except (OSError, ValueError, RecursionError):
        raise LichenError("is damaged", where=str(path), fix=again) from None
    check(path.parent, MANIFEST, (path.name,), fix=again)
    if not isinstance(content, dict):
        raise LichenError("is not a summary", where=str(path), fix=again)
    return check_summary(content, where=str(path))


def traffic_of(
    reports: Sequence[Report], *, up: int = 0, down: int = 0, validators: int | None = None
) -> dict[str, Any] | None:
    """The bytes of training and of validation, as a summary holds them; None where nobody trained.

    Args:
        reports: The rounds.
        up: Bytes that clients sent besides rounds.
        down: Bytes that they were sent besides rounds.
        validators: Clients that validated in the rounds.
    """
    trained = [report for report in reports if report.clients]
    judged = [report for report in reports if "valid" in report.metrics]
    apart = all(report.valid_up + report.valid_down for report in judged)
    quiet = [report for report in trained if apart or "valid" not in report.metrics]
    trainings = sum(len(report.clients) for report in trained)
    if not trainings:
        return None
    counted = quiet or trained
    clients = sum(len(report.clients) for report in counted)
    client_up = sum(report.bytes_up - report.valid_up for report in counted) / clients
    client_down = sum(report.bytes_down - report.valid_down for report in counted) / clients
    return {
        "rounds": len(reports),
        "trainings": trainings,
        "client_up": client_up,
        "client_down": client_down,
        "up": client_up * trainings + up,
        "down": client_down * trainings + down,
        "validation": not quiet,
        "valid_up": float(sum(report.valid_up for report in reports)) if apart else None,
        "valid_down": float(sum(report.valid_down for report in reports)) if apart else None,
        "validators": validators if judged else None,
    }


def attendance_of(reports: Sequence[Report]) -> dict[str, Any] | None:
    """Who came to these rounds, as a summary holds it; None where everybody did and nothing was refused."""
    seen = [report.attendance for report in reports]
    if not any(attendance.summary() for attendance in seen):
        return None
    refused, causes = Counter[str](), Counter[str]()
    for attendance in seen:
        refused.update(attendance.refused)
        causes.update({cause: len(clients) for cause, clients in attendance.causes.items()})
    return {
        "invited": sum(attendance.invited for attendance in seen),
        "arrived": sum(attendance.arrived for attendance in seen),
        "refused": dict(sorted(refused.items())),
        "missing": sum(len(attendance.missing) for attendance in seen),
        "skipped": sum("skipped" in report.metrics for report in reports),
        "causes": dict(causes),
    }


def worst_decile(values: Sequence[float], higher_is_better: bool) -> float:
    """Mean of the worst tenth of clients, at least one of them.

    Args:
        values: One score a client.
        higher_is_better: Which end is the worst.

    Raises:
        LichenError: without clients, or with a score that is not finite.

    >>> worst_decile([3.0, 1.0, 2.0], True), worst_decile([3.0, 1.0, 2.0], False)
    (1.0, 3.0)
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise LichenError("needs a finite score of every client", where="worst_decile", fix="leave the others out")
    worst = sorted(values, reverse=not higher_is_better)[: max(1, len(values) // 10)]
    return math.fsum(worst) / len(worst)


def stronger_alone(scores: Mapping[str, Sequence[float]], higher_is_better: bool) -> str | None:
    """The column of training alone that the federation is held against: of two, the one with the better mean.

    Args:
        scores: By column, one score a client, those that are reported; who has none in either column has
            no say.
        higher_is_better: What better means.

    Returns:
        Its name; None where there is none.

    >>> stronger_alone({"alone": [0.5, 0.7], "alone_best": [0.9, 0.4], "federated": [1.0, 1.0]}, True)
    'alone_best'
    """
    sign = 1.0 if higher_is_better else -1.0
    columns = {name: scores[name] for name in ALONE if scores.get(name)}
    scored = [at for at, some in enumerate(zip(*columns.values(), strict=True)) if not all(map(math.isnan, some))]
    # A column that learned nothing worth a number is not the stronger one.
    mean = {name: sign * math.fsum(some[at] for at in scored) / max(len(scored), 1) for name, some in columns.items()}
    return max(mean, key=lambda name: -math.inf if math.isnan(mean[name]) else mean[name], default=None)


def share_gaining(alone: Sequence[float], federated: Sequence[float], higher_is_better: bool) -> float:
    """Share of clients strictly better off in the federation than alone, from 0 to 1.

    Args:
        alone: One score a client, trained alone.
        federated: The same clients' scores in the federation, in the same order.
        higher_is_better: What better means.

    Raises:
        LichenError: if the two are of unequal length, or empty.

    >>> share_gaining([0.5, 0.5], [0.6, 0.5], True)
    0.5
    """
    if len(alone) != len(federated) or not alone:
        raise LichenError(
            f"{len(alone)} clients alone and {len(federated)} federated do not pair",
            where="share_gaining",
            fix="give one score a client on both sides",
        )
    sign = 1.0 if higher_is_better else -1.0
    return sum(sign * f > sign * a for a, f in zip(alone, federated, strict=True)) / len(alone)
