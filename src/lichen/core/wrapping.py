"""Looks through what goes around a client's work or a model, and puts another inside.

Whatever goes around another of its kind calls it ``inner``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

__all__ = ["innermost", "with_innermost"]


@runtime_checkable
class Wrapper(Protocol):
    """Goes around another work or model."""

    @property
    def inner(self) -> Any:
        """What it goes around."""
        ...


def innermost(outer: object) -> object:
    """What lies inside all wrappers; the thing itself where there are none."""
    while isinstance(outer, Wrapper):
        outer = outer.inner
    return outer


def with_innermost(outer: Any, inner: Any) -> Any:
    """The same wrappers, which are dataclasses, around another; ``outer`` stays as it was."""
    if not isinstance(outer, Wrapper):
        return inner
    wrapper: Any = outer
    return replace(wrapper, inner=with_innermost(wrapper.inner, inner))
