"""Every task is declared once: what is said of it holds, and what it names is there."""

from __future__ import annotations

import inspect

import pytest

from lichen.core.errors import LichenError
from lichen.recipes.schema.explain import choices
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.sections.compare import CompareConfig
from lichen.tasks.registry import BUILT_IN, task_names, task_of
from lichen.tasks.task import Task

RECIPE = {"task": "classify", "model": {"student": {"kind": "image-mlp"}}, "data": {"name": "digits"}}


@pytest.mark.parametrize("task", BUILT_IN.values(), ids=BUILT_IN)
def test_what_a_task_names_is_there(task: Task) -> None:
    assert task.metric_of(None).name == task.metric
    assert task.summary
    for what, count in (("run", 4), ("plan", 5), ("talk", 4)):
        found = task.procedure.load(what)  # type: ignore[arg-type]
        given = [one for one in inspect.signature(found).parameters.values() if one.default is one.empty]
        assert len(given) == count


def test_the_schema_names_the_built_in_tasks_and_their_metrics() -> None:
    assert choices(Recipe.model_fields["task"].annotation) == tuple(BUILT_IN) == task_names()
    named = choices(CompareConfig.model_fields["metric"].annotation)
    assert set(named) == {name for task in BUILT_IN.values() for name in task.metric_names}


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        LichenError, match=r"task: the text 'clasify' is not a choice here\n  fix: did you mean"
    ) as told:
        read_recipe({**RECIPE, "task": "clasify"})
    assert told.value.fix.endswith("use one of: chat, classify, oneshot, prefer")
    with pytest.raises(LichenError, match=r"there is no task 'dance'"):
        task_of("dance")


def test_a_metric_of_another_task_is_refused() -> None:
    with pytest.raises(LichenError, match=r"compare\.metric: does not fit task classify") as told:
        read_recipe({**RECIPE, "compare": {"metric": "perplexity"}})
    assert told.value.fix == "use accuracy or macro_f1, or leave it out"
    with pytest.raises(LichenError, match=r"compare\.metric: the text 'f1' is not a choice here"):
        read_recipe({**RECIPE, "compare": {"metric": "f1"}})
