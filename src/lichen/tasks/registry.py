"""Finds a task by its name: the built-in ones, and those that other installed packages declare.

A package declares a task by an entry point of the group ``lichen.tasks`` that names a
:class:`~lichen.tasks.task.Task`::

    [project.entry-points."lichen.tasks"]
    regression = "my_package.regression:REGRESSION"

Entry points are looked at only when a recipe names a task that is not built in, and only that one is imported.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from lichen.core.errors import LichenError
from lichen.tasks.chat import CHAT
from lichen.tasks.classify import CLASSIFY
from lichen.tasks.oneshot import ONESHOT
from lichen.tasks.prefer import PREFER
from lichen.tasks.task import Task

__all__ = ["BUILT_IN", "GROUP", "known_metrics", "task_names", "task_of"]

GROUP = "lichen.tasks"

BUILT_IN = {task.name: task for task in (CHAT, CLASSIFY, ONESHOT, PREFER)}

_LOADED = dict(BUILT_IN)


def task_names() -> tuple[str, ...]:
    """Every task that a recipe can name, the built-in ones first; none of another package is imported.

    Raises:
        LichenError: as :func:`task_of`, if two packages declare one name.
    """
    return (*BUILT_IN, *sorted(_declared()))


def task_of(name: str) -> Task:
    """The task of this name.

    Raises:
        LichenError: if there is none, two packages declare it, or what is declared cannot be imported or is no task.
    """
    if name not in _LOADED:
        _LOADED[name] = _load(name)
    return _LOADED[name]


def known_metrics() -> frozenset[str]:
    """The words of ``compare.metric`` of all tasks that were asked for, and of the built-in ones."""
    return frozenset(name for task in _LOADED.values() for name in task.metric_names)


def _declared() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in BUILT_IN:
            raise LichenError(
                f"the built-in task {point.name!r} is declared again", where=_place(point), fix="give it another name"
            )
        if point.name in found and found[point.name].value != point.value:
            raise LichenError(
                f"two packages declare the task {point.name!r}: {found[point.name].value} and {point.value}",
                where=_place(point),
                fix="uninstall one of them",
            )
        found[point.name] = point
    return found


def _place(point: EntryPoint) -> str:
    return f"entry point {point.name} = {point.value}"


def _load(name: str) -> Task:
    points = _declared()
    if name not in points:
        raise LichenError(
            f"there is no task {name!r}",
            where="task",
            fix=f"use one of: {', '.join((*BUILT_IN, *sorted(points)))}; or install the package that declares it",
        )
    point = points[name]
    try:
        found = point.load()
    except Exception as error:
        raise LichenError(
            f"cannot be imported: {type(error).__name__}: {error}",
            where=_place(point),
            fix="mend or uninstall the package that declares it",
        ) from error
    if not isinstance(found, Task) or found.name != name:
        what = (
            f"is a task called {found.name!r}" if isinstance(found, Task) else f"is a {type(found).__name__}, no Task"
        )
        raise LichenError(what, where=_place(point), fix=f"let it name a lichen.tasks.task.Task called {name!r}")
    return found
