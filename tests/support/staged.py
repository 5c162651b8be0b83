"""A small recipe of three stages over a tiny Llama: all weights, an adapter, the adapter again with other words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tiny_llama import WORDS, save_model, save_rows


def save_staged(home: Path) -> Path:
    """A model, what three people wrote, and a text for general perplexity."""
    save_model(home / "model")
    save_rows(home / "rows.jsonl", "pair", clients=3)
    lines = [json.dumps({"text": " ".join((*WORDS, *WORDS)[i : i + 9])}) for i in range(12)]
    (home / "general.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return home


def staged_page(home: Path, **more: Any) -> dict[str, Any]:
    """The recipe over them; ``more`` replaces keys of the recipe around the stages."""
    return {
        "name": "three",
        "question": "What does each stage give?",
        "task": "chat",
        "model": {
            "name": str(home / "model"),
            "adapter": {"target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 4},
        },
        "data": {
            "name": str(home / "rows.jsonl"),
            "columns": {"client": "who", "prompt": "ask", "completion": "reply"},
            "form": "transcript",
            "max_length": 32,
            "valid": 0.2,
            "test": 0.2,
        },
        "optimizer": {"lr": 0.02},
        "federation": {"rounds": 2, "local_steps": 1, "batch_size": 4},
        "compare": {"baselines": ["base"], "retention_text": str(home / "general.jsonl"), "retention_rows": 4},
        "engine": {"packing": False},
        "stages": [
            {"name": "whole", "model.adapter.kind": "full", "data.form": "plain", "optimizer": {"lr": 0.005}},
            {"name": "chat", "federation.server.momentum": 0.5},
            {"name": "again", "optimizer.lr": 0.01},
        ],
        **more,
    }
