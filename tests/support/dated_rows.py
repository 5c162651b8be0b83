"""Rows of people who come and go over some months, and a stream over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lichen.core.seeds import numpy_generator
from support.tiny_llama import recipe, say

MONTHS = ("2018-04", "2018-05", "2018-06", "2018-09")


def save_dated(file: Path, months: Sequence[str], *, clients: int = 4, rows: int = 10) -> Path:
    """In each month one of the people is away; those of a month do not depend on how many months there are."""
    lines = []
    for number, month in enumerate(months):
        for client in range(clients):
            if (client + number) % clients == clients - 1:
                continue
            rng = numpy_generator(client, number, "dated rows")
            for row in range(rows):
                pair = {"ask": say(rng, 3), "reply": say(rng, 5), "mood": ("calm", "glad")[(row + client) % 2]}
                lines.append(json.dumps({"who": f"person-{client}", "when": f"{month}-{row + 1:02d}", **pair}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def stream(model: Path, data: Path, /, **more: Any) -> dict[str, Any]:
    """A stream of months with few steps in each; ``more`` are whole sections, laid over these key by key."""
    columns = {"client": "who", "prompt": "ask", "completion": "reply", "time": "when"}
    sections = {
        "data": {"columns": columns, **more.pop("data", {})},
        "federation": {"rounds": 2, "local_steps": 1, **more.pop("federation", {})},
        "stream": {"by": "month", **more.pop("stream", {})},
        "engine": {"packing": False},
    }
    return recipe(model, data, "pair", **sections, **more)
