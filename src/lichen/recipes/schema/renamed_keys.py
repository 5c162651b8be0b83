"""Old names of recipe keys: they are read for one release, and a note names the new one.

A recipe has its new names from the moment it is read: errors, files and digests know no others. The way back, from new
names to old ones, serves folders that were written before: a digest over the old names tells whose they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lichen.core.errors import LichenError

__all__ = [
    "GONE_IN",
    "RENAMED_KEYS",
    "RENAMED_VALUES",
    "REPLACED_KEYS",
    "report_renamed",
    "with_new_names",
    "with_old_names",
]

GONE_IN = "0.2"
"""The release that no longer reads the old names."""

RENAMED_KEYS: dict[str, str] = {
    "federation.per_round": "clients_per_round",
    "federation.steps": "local_steps",
    "federation.epochs": "local_epochs",
    "federation.batch": "batch_size",
    "federation.accumulate": "gradient_accumulation_steps",
    "federation.fragments": "stream_fragments",
    "federation.drop": "drop_prob",
    "compare.columns": "baselines",
    "compare.pooled_batch": "pooled_batch_size",
    "compare.forgotten": "retention_text",
    "compare.forgotten_rows": "retention_rows",
    "engine.block": "clients_per_block",
    "semi.batch": "batch_size",
    "semi.warm": "warmup_rounds",
    "data.unsplit": "on_too_few_rows",
    "data.one_class": "on_single_class",
    "model.adapter.targets": "target_modules",
    "model.adapter.feedforward": "feedforward_modules",
    "model.adapter.tokens": "num_virtual_tokens",
    "teacher.tells": "answer_format",
    "teacher.words": "label_words",
    "teacher.public_batch": "public_batch_size",
    "teacher.most": "max_new_tokens",
    "teacher.confident": "min_confidence",
    "teacher.endpoint.key_from": "api_key_env",
    "teacher.endpoint.per_second": "rate_limit",
    "teacher.endpoint.abreast": "concurrency",
    "teacher.endpoint.tries": "max_retries",
    "synthetic.endpoint.key_from": "api_key_env",
    "synthetic.endpoint.per_second": "rate_limit",
    "synthetic.endpoint.abreast": "concurrency",
    "synthetic.endpoint.tries": "max_retries",
    "synthetic.noun": "item_name",
    "synthetic.most": "max_new_tokens",
    "exchange.digest_steps": "distill_steps",
    "exchange.weigh": "weighting",
    "exchange.confident": "min_confidence",
    "exchange.public_batch": "public_batch_size",
    "kept": "cache_dir",
}
"""The key's new name, in the same section, by the whole path of its old one."""

RENAMED_VALUES: dict[str, dict[str, str]] = {"compare.baselines": {"without": "no_help"}}
"""New words by the old ones, for the key of this path (its new one)."""

ADDED: dict[str, int] = {"teacher.endpoint.tries": -1, "synthetic.endpoint.tries": -1}
"""What is added to a number when its key, of this old path, is renamed."""


REPLACED_KEYS: dict[str, tuple[str, dict[bool, str]]] = {
    "semi.by_class": ("kind", {True: "flexmatch", False: "fixmatch"}),
    "semi.server": ("kind", {True: "semifl"}),
}
"""Switches that are words of another key, in the same section, by their old paths: of two, the later one counts.

What they do has changed, so that there is no way back: a run of before is read, and not resumed.
"""


def with_new_names(values: Mapping[str, Any], path: str = "") -> tuple[dict[str, Any], list[str]]:
    """A recipe's values under their new names, and a note for each old name.

    Args:
        values: Sections and values, as YAML gives them.
        path: Dotted path of ``values`` in the recipe, with a dot at its end; empty for the whole.

    Raises:
        LichenError: if a key is given under both names.

    >>> with_new_names({"synthetic": {"noun": "review"}})
    ({'synthetic': {'item_name': 'review'}}, ['synthetic.noun is now synthetic.item_name'])
    """
    found: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in values.items():
        old = f"{path}{key}"
        if old in REPLACED_KEYS and isinstance(value, bool):
            continue
        name = RENAMED_KEYS.get(old, key)
        new = f"{path}{name}"
        if name != key:
            if name in values:
                raise LichenError(f"is now {new}, and both are given", where=old, fix=f"remove {old}")
            notes.append(f"{old} is now {new}")
            value = _added(value, ADDED.get(old, 0))
        if isinstance(value, Mapping):
            value, more = with_new_names(value, f"{new}.")
            notes += more
        words = RENAMED_VALUES.get(new, {})
        notes += [f"{new}: {word} is now {words[word]}" for word in words if word in _listed(value)]
        found[name] = _replaced(value, words)
    for old, (name, meant) in REPLACED_KEYS.items():
        section, _, key = old.rpartition(".")
        if f"{section}." != path or not isinstance(value := values.get(key), bool):
            continue
        if name in values:
            raise LichenError(f"is now {path}{name}, and both are given", where=old, fix=f"remove {old}")
        notes.append(f"{old} is now {path}{name}")
        if value in meant:
            found[name] = meant[value]
    return found, notes


def with_old_names(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A recipe's values under the names of before, all of them where a name has changed.

    Args:
        values: Sections and values under their new names.
        path: Dotted path of ``values``, with a dot at its end; empty for the whole.

    >>> with_old_names({"synthetic": {"item_name": "review"}})
    {'synthetic': {'noun': 'review'}}
    """
    former = {old.rpartition(".")[0] + "." + new if "." in old else new: old for old, new in RENAMED_KEYS.items()}
    found: dict[str, Any] = {}
    for key, value in values.items():
        new = f"{path}{key}"
        old = former.get(new, new)
        if isinstance(value, Mapping):
            value = with_old_names(value, f"{new}.")
        value = _replaced(value, {after: before for before, after in RENAMED_VALUES.get(new, {}).items()})
        found[old.rpartition(".")[2]] = _added(value, -ADDED.get(old, 0))
    return found


def report_renamed(notes: Iterable[str], note: Callable[[str], None] | None) -> None:
    """Tell, in one line, which names are old.

    Args:
        notes: As :func:`with_new_names` gives them; without any, nothing is told.
        note: Called with the line; None warns, as Python warns of what will change.
    """
    if not (every := list(dict.fromkeys(notes))):
        return
    line = f"{', '.join(every)}; {'the old name goes' if len(every) == 1 else 'the old names go'} with lichen {GONE_IN}"
    if note is not None:
        note(line)
    else:
        warnings.warn(line, FutureWarning, stacklevel=3)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _replaced(value: Any, words: Mapping[str, str]) -> Any:
    if not words:
        return value
    new = [words.get(word, word) if isinstance(word, str) else word for word in _listed(value)]
    return new if isinstance(value, list) else new[0]


def _added(value: Any, number: int) -> Any:
    return value + number if number and isinstance(value, int) and not isinstance(value, bool) else value
