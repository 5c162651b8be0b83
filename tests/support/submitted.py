"""Recipes that are submitted to a site, and policies with one line that matters."""

from __future__ import annotations

from typing import Any

from lichen.federation.policy.keys import Policy

CHAT: dict[str, Any] = {
    "task": "chat",
    "model": {"name": "smollm2-135m"},
    "data": {"name": "rows.jsonl"},
    "federation": {"rounds": 10, "schedule": {"least": 2}},
    "compare": {"baselines": ["base", "alone"]},
}
CLASSES: dict[str, Any] = {
    **CHAT,
    "task": "classify",
    "model": {"name": "minilm-l6"},
    "data": {"name": "rows.jsonl", "classes": ["good", "bad"]},
}
EXCHANGE: dict[str, Any] = {
    "task": "classify",
    "model": {"students": [{"kind": "text-cnn"}]},
    "data": {"name": "rows.jsonl", "classes": ["good", "bad"], "public": {}},
    "federation": {"aggregate": "mean", "local_steps": 3},
    "exchange": {},
    "compare": {"baselines": ["alone"]},
}
OPEN: dict[str, Any] = {
    "models": ["smollm2-135m", "minilm-l6"],
    "from_scratch": True,
    "labels": True,
    "texts": True,
    "answers": True,
}
"""A policy to which a line is added that says no."""


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The same with other values at dotted keys."""
    out: dict[str, Any] = {key: dict(x) if isinstance(x, dict) else x for key, x in values.items()}
    for key, value in changes.items():
        *outer, last = key.split(".")
        section = out
        for step in outer:
            section[step] = dict(section.get(step, {}))
            section = section[step]
        section[last] = value
    return out


def policy(**lines: Any) -> Policy:
    values = {**OPEN, **lines}
    return Policy.model_validate({key: tuple(x) if isinstance(x, list) else x for key, x in values.items()})
