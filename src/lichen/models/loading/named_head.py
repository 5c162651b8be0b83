"""Maps the classes of a trained classifier head to the labels of the data, by name.

The weights of a trained head mean what ``id2label`` in the base's ``config.json`` calls them. Under other names,
or in another order, they would be noise that looks like knowledge. So the run takes the base's order, and a label
that the base does not know is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.models.adapters.whole_layers import came_with_head, lacked_layers, output_layer
from lichen.models.loading.load import read_config

__all__ = ["base_names", "has_named_head", "in_base_order"]


def base_names(source: str | Path) -> tuple[str, ...]:
    """The names a base's configuration gives its classes, in order; none where they are ``LABEL_0``, ``LABEL_1``, ...

    Args:
        source: Folder or hub id.

    Raises:
        LichenError: if there is no configuration.
    """
    return _names(read_config(source))


def has_named_head(model: Any) -> bool:
    """Whether a loaded classifier holds the head of its files, and its configuration names the classes."""
    came_along = came_with_head(model) and output_layer(model) not in lacked_layers(model)
    return came_along and bool(_names(model.config))


def _names(config: Any) -> tuple[str, ...]:
    found = getattr(config, "id2label", None) or {}
    numbered = {int(number): str(name) for number, name in found.items()}
    names = tuple(numbered.get(k, f"LABEL_{k}") for k in range(len(numbered)))
    plain = any(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return () if plain or len(names) < 2 or len(set(names)) < len(names) else names


def in_base_order(labels: Sequence[str], names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``(the run's classes in the base's order, the labels that are the base's but for case and blanks)``.

    All of the base's classes stay, those without a row too: with one less, the base would answer otherwise.

    Args:
        labels: The data's.
        names: The base's, from :func:`base_names`.

    Raises:
        LichenError: naming a label that is none of them, or two that are one.

    >>> in_base_order(("debt", "Mortgage"), ("Mortgage", "Debt", "Card"))
    (('Mortgage', 'debt', 'Card'), ('debt',))
    """
    at = {label: names.index(label) for label in labels if label in names}
    loose = [label for label in labels if label not in at]
    for label in loose:
        same = [k for k, name in enumerate(names) if _plain(name) == _plain(label)]
        if len(same) == 1:
            at[label] = same[0]
    known = [label for label in labels if label in at]
    if missing := [label for label in labels if label not in at]:
        rows = f", leave its rows out with data.classes: [{', '.join(known)}]" if len(known) > 1 else ""
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise LichenError(
            f"the head of the base knows the classes {shown}, and not {missing[0]!r}",
            where="model.head",
            fix=f"call the label what the base calls it{rows}, or draw a new head with model.head: random",
        )
    name_at: dict[int, str] = {}
    for label in labels:
        if (other := name_at.setdefault(at[label], label)) != label:
            raise LichenError(
                f"the labels {other!r} and {label!r} are both the base's {names[at[label]]!r}",
                where="data.columns.label",
                fix="make them one label, or draw a new head with model.head: random",
            )
    return tuple(name_at.get(k, name) for k, name in enumerate(names)), tuple(loose)


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
