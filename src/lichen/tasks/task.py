"""What a task is: the labels it learns, the numbers it is scored by, the models and help it goes with.

A recipe names its task; everything that depends on the task asks the object declared here, and nothing compares its
name. The built-in ones are :mod:`lichen.tasks.chat`, :mod:`lichen.tasks.classify` and :mod:`lichen.tasks.oneshot`;
:mod:`lichen.tasks.registry` finds them by name, and those of other packages.

Nothing heavy is imported here: reading a recipe needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

from lichen.core.conventions.bins import Bins
from lichen.declared import Need

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lichen.models.objectives import RowObjective

__all__ = ["ROUNDS", "STATISTICS", "Labels", "Metric", "Task"]

Given = str | int | None
"""A label as the data have it; None where a row has none."""

Help = Literal["teacher", "synthetic", "semi", "exchange"]
"""Sections of a recipe by which a foundation model, unlabelled rows or other students help."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number by which clients are compared.

    Attributes:
        name: Its word in ``compare.metric``.
        higher_is_better: Which way is up.
        values: From sums ``(N, ...)`` over each client's test rows to its value, float64 ``(N,)``.
        bins: That values of clients are counted in under masks; None: then their mean alone is known.
        of_all: Every client with a test row has a value. Else not-a-number says that a client's test rows do not bear
            one, and it counts in no mean; a model that has diverged must not give it.
    """

    name: str
    higher_is_better: bool
    values: Callable[[Mapping[str, Tensor]], Tensor]
    bins: Bins | None = None
    of_all: bool = True


class Describe(Protocol):
    """A row's outputs in words."""

    def __call__(self, outputs_K: Tensor, names: Sequence[str]) -> str: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What a task with labels learns of a row.

    Attributes:
        names: From the labels of all rows to the names of the model's outputs, in their order. It refuses, by a
            ``LichenError``, labels that cannot be learned.
        encode: From ``(labels, names)`` to an array ``(N, ...)``: int64 with -100, or float32 with not-a-number, where
            a row has none.
        objective: From the names to what the outputs are held against, see :mod:`lichen.models.objectives`.
        constant: From ``(encoded labels, names)`` to the outputs ``(K,)`` that serve all rows best: a baseline.
        baseline: The name of that baseline's column.
        describe: A row's outputs ``(K,)`` in words, from ``(outputs, names)``.
        classes: A label names the one class of its row: each part of a split gets some of each.
    """

    names: Callable[[Sequence[Given]], tuple[str, ...]]
    encode: Callable[[Sequence[Given], Sequence[str]], np.ndarray]
    objective: Callable[[Sequence[str]], RowObjective]
    constant: Callable[[np.ndarray, Sequence[str]], np.ndarray]
    describe: Describe
    baseline: str = "constant"
    classes: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Procedure:
    """How tasks are run, planned and tried, as ``module:function``; loaded when it is asked for.

    Attributes:
        run: ``(recipe, folder, watch, say) -> TaskResult``, see :func:`lichen.recipes.tasks.adapt.run_adapt`.
        plan: ``(recipe, folder, gauge, say, seconds) -> Estimate``, see
            :func:`lichen.recipes.plan.adapt.estimate_adapt`.
        talk: ``(recipe, tensors, folder, sampling) -> Talker``, see :mod:`lichen.recipes.artifacts.use.talk`.
        rounds: Clients train in rounds, from a model that can be opened; else they answer once.
        needs: What the rest of the recipe must allow.
        reads: Keys and sections of a recipe that say something to it; None: all that there are.
    """

    run: str
    plan: str
    talk: str
    rounds: bool = True
    needs: tuple[Need, ...] = ()
    reads: tuple[str, ...] | None = None

    def load(self, what: Literal["run", "plan", "talk"]) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = {"run": self.run, "plan": self.plan, "talk": self.talk}[what].partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


ROUNDS = Procedure(
    run="lichen.recipes.tasks.adapt:run_adapt",
    plan="lichen.recipes.plan.adapt:estimate_adapt",
    talk="lichen.recipes.artifacts.use.talk:talk_rounds",
)
"""Clients train in rounds; what they learn is held against the bare model, training alone and pooled rows."""

STATISTICS = Procedure(
    run="lichen.recipes.tasks.oneshot:run_oneshot",
    plan="lichen.recipes.plan.features:estimate_oneshot",
    talk="lichen.recipes.artifacts.use.talk:talk_oneshot",
    rounds=False,
    reads=(
        *("name", "question", "task", "seed", "data", "ridge", "privacy", "personal"),
        *("model.name", "model.device", "model.head"),
        *("compare.baselines", "compare.metric", "compare.partitions"),
        *("engine.name", "engine.nodes", "engine.clients_per_block", "federation.absent"),
    ),
)
"""Each client sends statistics of frozen features once, and the server solves for the head."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task, as a recipe's key ``task`` names it.

    Attributes:
        name: The word.
        summary: What is learned, in a sentence.
        metrics: What clients can be compared by.
        metric: The one of them that is used where the recipe names none.
        labels: What is learned of a row. None: a language model learns to write the rows themselves, texts in a form.
        students: A small model may be trained in place of a foundation model.
        prefers: The language model learns which answers are better, by the recipe's section ``prefer``.
        help: Sections that go with it.
        procedure: How it is run, planned and tried.
        peft: What PEFT calls an adapter of it.
        pipeline: What the Hugging Face hub calls a model of it.
    """

    name: str
    summary: str
    metrics: tuple[Metric, ...]
    metric: str
    labels: Labels | None
    students: bool = True
    prefers: bool = False
    help: frozenset[Help] = frozenset()
    procedure: Procedure = ROUNDS
    peft: Literal["CAUSAL_LM", "SEQ_CLS"] = "SEQ_CLS"
    pipeline: str = "text-classification"

    @property
    def writes(self) -> bool:
        """A language model is trained: rows are texts in a form, and have no label."""
        return self.labels is None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The words of ``compare.metric``."""
        return tuple(metric.name for metric in self.metrics)

    def metric_of(self, name: str | None) -> Metric:
        """The metric of that name; the task's own for None."""
        word = name or self.metric
        return next(metric for metric in self.metrics if metric.name == word)
