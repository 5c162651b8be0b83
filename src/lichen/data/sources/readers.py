"""Turns each catalog data set into records: client, text, label, group."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np

from lichen.core.errors import LichenError
from lichen.data.sources.changelogs import changelogs
from lichen.data.sources.record import Record

__all__ = ["READERS", "chitchat", "clothing_reviews", "digits", "medmcqa", "mnist_5k", "sotu"]

Reader = Callable[[Path, Mapping[str, str]], list[Record]]
"""``(folder, columns) -> records``; ``columns`` may name other columns for some roles."""


def _choose(name: str, columns: Mapping[str, str], defaults: Mapping[str, str], have: list[str]) -> dict[str, str]:
    for role, column in columns.items():
        if role not in defaults:
            free = ", ".join(defaults) or "none"
            raise LichenError(
                f"{name} has its own {role}", where=f"data.columns.{role}", fix=f"leave it out; free roles: {free}"
            )
        if column not in have:
            raise LichenError(
                f"{name} has no column {column!r}", where=f"data.columns.{role}", fix=f"columns are: {', '.join(have)}"
            )
    return {**defaults, **columns}


def chitchat(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """One record a turn: what one person said before the other spoke again, and the turn before it; free role: rating.

    All turns of a conversation bear the time when it began, so that no period tears it apart. ``rating`` is the mean of
    how witty, upbeat and interesting the conversation was, from 1 to 10; one of the three may be named in its place.
    Where nobody moved the three from 5 there is none.
    """
    _choose("chitchat", columns, {"rating": ""}, ["rating", *_RATED])
    conversations = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    records: list[Record] = []
    seen: set[tuple[str, str]] = set()
    for conversation, content in conversations.items():
        utterances = [
            (u["sender"], u["text"].strip()) for turn in content["messages"] for u in turn if u["text"].strip()
        ]
        before, start_time = "", str(content.get("start") or "")
        rating = _rating(content.get("ratings"), columns.get("rating"))
        for sender, turn in groupby(utterances, key=lambda utterance: utterance[0]):
            text = "\n".join(utterance[1] for utterance in turn)
            if (sender, text) not in seen:
                seen.add((sender, text))
                row = {"client": sender, "text": text, "prompt": before, "group": conversation, "time": start_time}
                records.append(Record(**row, rating=rating))
            before = text
    return records


_RATED = ("witty", "upbeat", "interesting")
_UNTOUCHED = 5.0


def _rating(ratings: Mapping[str, float] | None, column: str | None) -> float | None:
    """One of the ratings of a conversation, or their mean; none of what nobody rated."""
    if ratings is None or column is None:
        return None
    three = [float(ratings[name]) for name in _RATED]
    if all(one == _UNTOUCHED for one in three):
        return None
    return sum(three) / len(three) if column == "rating" else three[_RATED.index(column)]


def clothing_reviews(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """One record a review with a body: title and body, the rating as label; free roles: client, label."""
    import pyarrow.parquet as pq

    table = pq.read_table(next(folder.glob("*.parquet.brotli")))
    have = [c for c in table.column_names if not c.startswith("__")]
    use = _choose("clothing-reviews", columns, {"client": "Clothing ID", "label": "Rating"}, have)
    records: list[Record] = []
    for i, row in enumerate(table.to_pylist()):
        body = (row["Review Text"] or "").strip()
        client, label = row[use["client"]], row[use["label"]]
        if body and client is not None:
            text = "\n".join(part for part in ((row["Title"] or "").strip(), body) if part)
            records.append(Record(client=str(client), text=text, label=label, group=str(i)))
    return records


def medmcqa(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """One record a question with its options; the label is the letter of the right one, or the specialty."""
    use = _choose("medmcqa", columns, {"label": "answer"}, ["answer", "specialty"])
    return [
        Record(
            client=file.stem,
            text=f"{row['question'].strip()}\n{row['options'].strip()}",
            label=file.stem if use["label"] == "specialty" else row["answer"][0],
        )
        for file in sorted(folder.glob("*.jsonl"))
        for row in map(json.loads, filter(str.strip, file.read_text(encoding="utf-8").splitlines()))
    ]


def sotu(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """One record a paragraph; presidents with two separate terms are one client; free roles: client, label, time."""
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    use = _choose(
        "sotu", columns, {"client": "president_full", "label": "", "time": "date"}, list(reader.fieldnames or ())
    )
    return [
        Record(
            client=row[use["client"]],
            text=text,
            label=row.get(use["label"]),
            group=row["fileid"],
            time=row.get(use["time"]) or "",
        )
        for row in rows
        for line in (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8").split("\n")
        if (text := line.strip())
    ]


def advbench(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """One record a request; no row has an answer."""
    import yaml

    _choose("advbench", columns, {}, [])
    whole = yaml.safe_load((folder / "adv_bench.prompt").read_text(encoding="utf-8"))
    return [Record(client="", text=seed["value"].strip()) for seed in whole["seeds"]]


def harmbench(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """One record a request; no row has an answer."""
    _choose("harmbench", columns, {}, [])
    lines = (folder / "harmbench_prompts.txt").read_text(encoding="utf-8").splitlines()
    return [Record(client="", text=text) for line in lines if (text := line.strip())]


def _pictures(pixels_NHW: np.ndarray, labels_N: np.ndarray, *, highest: float, held_out: bool = False) -> list[Record]:
    x_NCHW = np.ascontiguousarray(pixels_NHW, dtype=np.float32)[:, None] / np.float32(highest)
    pairs = zip(x_NCHW, labels_N, strict=True)
    return [Record(client="", label=int(y), features=x, held_out=held_out) for x, y in pairs]


def mnist_5k(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """Pictures ``(1, 28, 28)`` with the digit as label."""
    _choose("mnist-5k", columns, {}, [])
    table = np.loadtxt(folder / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    return _pictures(table[:, :-1].reshape(-1, 28, 28), table[:, -1], highest=255)


def fashion_mnist(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """Pictures ``(1, 28, 28)``, first those to train on, then those held out for tests."""
    _choose("fashion-mnist", columns, {}, [])
    records: list[Record] = []
    for held_out, stem in ((False, "train"), (True, "t10k")):
        images = gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        # idx files: a head of 16 bytes before pixels and of 8 before labels, then plain bytes.
        pixels_NHW = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        records += _pictures(pixels_NHW, np.frombuffer(labels, np.uint8, offset=8), highest=255, held_out=held_out)
    return records


def digits(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """Pictures ``(1, 8, 8)`` with the digit as label, from scikit-learn's folder of data.

    The file is read without scikit-learn, whose import takes ten times as long.
    """
    _choose("digits", columns, {}, [])
    table = np.loadtxt(folder / "digits.csv.gz", delimiter=",")
    return _pictures(table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int), highest=16)


READERS: Mapping[str, Reader] = {
    "chitchat": chitchat,
    "clothing-reviews": clothing_reviews,
    "medmcqa": medmcqa,
    "sotu": sotu,
    "changelogs": changelogs,
    "advbench": advbench,
    "harmbench": harmbench,
    "mnist-5k": mnist_5k,
    "fashion-mnist": fashion_mnist,
    "digits": digits,
}
"""A reader for every data entry of the catalog."""
