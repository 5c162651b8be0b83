"""Sixty shapes that people's data come in, each as files, with what ``lichen init`` is to take it for."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
WORDS = ("the lamp was broken", "nobody called me back", "a very good day at the sea", "how do I pay my bill")


def said(i: int) -> str:
    return f"{WORDS[i % 4]}, and this is sentence number {i} of many"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Files, and what is expected of them.

    Attributes:
        files: Their names and bytes.
        columns: Roles that are guessed; empty where the data are refused.
        task: What is learned.
        rows: Records that a run reads.
        clients: How many different clients they have; 0 where none is known.
        refused: Words of the error, where there is to be one.
        flags: What the user says.
    """

    files: Mapping[str, bytes]
    columns: Mapping[str, Any] = field(default_factory=dict)
    task: str = "chat"
    rows: int = 24
    clients: int = 0
    refused: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """The file, or the folder where there are several."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder / next(iter(self.files)) if len(self.files) == 1 and "/" not in next(iter(self.files)) else folder


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: Sequence[Row], delimiter: str = ",", **how: Any) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, **how)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet(rows: Sequence[Row], schema: pa.Schema | None = None) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), out)
    return out.getvalue()


def many(make: Callable[[int], Row], rows: int = 24) -> list[Row]:
    return [make(i) for i in range(rows)]


def user(i: int) -> Row:
    return {"role": "user", "content": said(i)}


def answer(i: int) -> Row:
    return {"role": "assistant", "content": f"answer {i}"}


LABELLED = many(lambda i: {"text": said(i), "label": "abc"[i % 3]})
CLASSIFY: dict[str, Any] = {"columns": {"text": "text", "label": "label"}, "task": "classify"}
COMPLAINTS = many(
    lambda i: {
        "Date received": f"2023-0{i % 9 + 1}-11",
        "Product": ("Mortgage", "Debt collection", "Credit card or prepaid card")[i % 3],
        "Issue": ("Struggling to pay", "Attempts to collect debt not owed", "Closing an account", "Other")[i % 4],
        "Consumer complaint narrative": said(i) * 3,
        "Company": ("ACME BANK", "FIRST LENDERS", "NORTH UNION")[i % 3 - i % 2],
        "State": ("CA", "TX", "NY", "FL")[i % 4],
        "ZIP code": f"{90000 + i}",
        "Complaint ID": f"{7000000 + 17 * i}",
        "Link": f"https://example.org/{i}",
    }
)
COMPLAINT = {
    "client": "Company",
    "text": "Consumer complaint narrative",
    "label": "Product",
    "time": "Date received",
}
SHAREGPT = many(
    lambda i: {
        "id": f"conv_{i}",
        "conversations": [{"from": "human", "value": said(i)}, {"from": "gpt", "value": f"answer {i}"}],
    }
)
ALPACA = many(lambda i: {"instruction": f"Translate sentence {i}", "input": said(i), "output": f"phrase {i}"})
ALPACA_COLUMNS = {"prompt": ["instruction", "input"], "completion": "output"}
OPENAI = many(lambda i: {"messages": [{"role": "system", "content": "Be kind."}, user(i), answer(i)]})
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
DPO = many(lambda i: {"prompt": said(i), "chosen": f"good answer {i}", "rejected": f"bad answer {i}"})
TEXTS = {"columns": {"text": "text"}, "rows": 24}
ONLY = [{"text": row["text"]} for row in LABELLED]
CLIENTS = many(lambda i: {"user": f"u{i % 3}", "prompt": said(i), "completion": f"answer {i}", "thread": i // 2})
OWN = {"client": "user", "prompt": "prompt", "completion": "completion", "group": "thread"}

SHAPES: dict[str, Shape] = {
    # tables, whatever parts their cells and in whatever letters
    "complaints": Shape(files={"a.csv": table(COMPLAINTS).encode()}, columns=COMPLAINT, task="classify", clients=3),
    "complaints by state": Shape(
        files={"a.csv": table(COMPLAINTS).encode()},
        columns={**COMPLAINT, "client": "State"},
        task="classify",
        clients=4,
        flags={"client": "State"},
    ),
    "semicolons": Shape(files={"a.csv": table(LABELLED, ";").encode()}, **CLASSIFY),
    "tabs": Shape(files={"a.tsv": table(LABELLED, "\t").encode()}, **CLASSIFY),
    "tabs in a csv": Shape(files={"a.csv": table(LABELLED, "\t").encode()}, **CLASSIFY),
    "bars": Shape(files={"a.csv": table(LABELLED, "|").encode()}, **CLASSIFY),
    "all quoted": Shape(files={"a.csv": table(LABELLED, quoting=csv.QUOTE_ALL).encode()}, **CLASSIFY),
    "quoted line breaks": Shape(
        files={"a.csv": table([{**row, "text": row["text"] + "\n\nmore"} for row in LABELLED]).encode()}, **CLASSIFY
    ),
    "an index column": Shape(
        files={"a.csv": table([{"": i, **row} for i, row in enumerate(LABELLED)]).encode()}, **CLASSIFY
    ),
    "a mark of UTF-8": Shape(files={"a.csv": table(LABELLED).encode("utf-8-sig")}, **CLASSIFY),
    "UTF-16": Shape(files={"a.csv": table(LABELLED, "\t").encode("utf-16")}, **CLASSIFY),
    "UTF-16 without mark": Shape(files={"a.csv": table(LABELLED).encode("utf-16-be")}, **CLASSIFY),
    "Windows-1252": Shape(
        files={"a.csv": table([{**row, "text": "Käse für " + row["text"]} for row in LABELLED]).encode("cp1252")},
        **CLASSIFY,
    ),
    "packed table": Shape(files={"a.csv.gz": gzip.compress(table(LABELLED).encode())}, **CLASSIFY),
    "old line breaks": Shape(files={"a.csv": table(LABELLED, lineterminator="\r").encode()}, **CLASSIFY),
    "one column": Shape(files={"a.csv": table(ONLY).encode()}, **TEXTS),
    "one column, commas unquoted": Shape(
        files={"a.csv": ("text\n" + "".join(row["text"] + "\n" for row in ONLY)).encode()}, **TEXTS
    ),
    "numbers as labels": Shape(
        files={"a.csv": table(many(lambda i: {"Review Text": said(i), "Rating": i % 5 + 1})).encode()},
        columns={"text": "Review Text", "label": "Rating"},
        task="classify",
    ),
    "true and false as labels": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"tweet": said(i), "spam": i % 2 == 0}))},
        columns={"text": "tweet", "label": "spam"},
        task="classify",
    ),
    "a label of another name": Shape(
        files={"a.csv": table(many(lambda i: {"words": said(i), "mood": "gb"[i % 2]})).encode()},
        columns={"text": "words", "label": "mood"},
        task="classify",
    ),
    "ids, dates and links beside a text": Shape(
        files={
            "a.csv": table(
                many(
                    lambda i: {
                        "uuid": f"{i:08x}-0000-4000-8000-{i:012x}",
                        "created": f"{i + 1}.02.2024 10:00",
                        "url": f"https://example.org/longer/than/any/text/{i}?q=" + "x" * 99,
                        "hash": f"{i:064x}",
                        "amount": f"{i}.50",
                        "note": said(i),
                    }
                )
            ).encode()
        },
        columns={"text": "note"},
    ),
    "amounts as labels": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"text": said(i), "label": 0.37 * i + 0.1}))}, columns={"text": "text"}
    ),
    "pictures and classes": Shape(
        files={
            "a.jsonl": jsonl(many(lambda i: {"pixels": [[i, 0], [0, 1]], "label": "ab"[i % 2], "site": f"s{i % 2}"}))
        },
        columns={"client": "site", "numbers": "pixels", "label": "label"},
        task="classify",
        clients=2,
    ),
    "lists of numbers in a CSV": Shape(
        files={"a.csv": table(many(lambda i: {"features": f"[{i}, 2.5]", "label": "ab"[i % 2]})).encode()},
        columns={"numbers": "features", "label": "label"},
        task="classify",
    ),
    "lists of numbers without classes": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"features": [i, 2.5], "site": f"s{i % 2}"}))},
        refused="has no labels to learn",
    ),
    "several labels a row": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"text": said(i), "label": ["a", "b"][: i % 2 + 1]}))},
        refused="several labels cannot be learned",
    ),
    "several labels, as text alone": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"text": said(i), "label": ["a", "b"][: i % 2 + 1]}))},
        columns={"text": "text"},
        flags={"task": "chat"},
    ),
    "Chinese texts": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"文本": "今天天气很好我们去海边玩吧" + "好" * i, "label": i % 2}))},
        columns={"text": "文本", "label": "label"},
        task="classify",
    ),
    # what JSON can look like
    "a list on one line": Shape(files={"a.json": json.dumps(LABELLED).encode()}, **CLASSIFY),
    "a list on one line of a jsonl": Shape(files={"a.jsonl": json.dumps(LABELLED).encode()}, **CLASSIFY),
    "a list with indents": Shape(files={"a.json": json.dumps(LABELLED, indent=2).encode()}, **CLASSIFY),
    "rows under data": Shape(files={"a.json": json.dumps({"v": 1, "data": LABELLED}).encode()}, **CLASSIFY),
    "an object of columns": Shape(
        files={"a.json": json.dumps({key: [row[key] for row in LABELLED] for key in LABELLED[0]}).encode()}, **CLASSIFY
    ),
    "columns by index": Shape(
        files={
            "a.json": json.dumps(
                {name: {str(i): row[name] for i, row in enumerate(LABELLED)} for name in LABELLED[0]}
            ).encode()
        },
        **CLASSIFY,
    ),
    "rows a line in a json": Shape(files={"a.json": jsonl(LABELLED)}, **CLASSIFY),
    "blank lines": Shape(files={"a.jsonl": b"\n" + jsonl(LABELLED).replace(b"\n", b"\n\n")}, **CLASSIFY),
    "packed lines": Shape(files={"a.jsonl.gz": gzip.compress(jsonl(LABELLED))}, **CLASSIFY),
    "lines in UTF-16": Shape(files={"a.jsonl": jsonl(LABELLED).decode().encode("utf-16")}, **CLASSIFY),
    "line separators in texts": Shape(
        files={"a.jsonl": jsonl([{**row, "text": row["text"] + "\u2028more"} for row in LABELLED])}, **CLASSIFY
    ),
    "a row without a label": Shape(
        files={"a.jsonl": jsonl([*LABELLED, {"text": "one more text without"}])}, **CLASSIFY
    ),
    # conversations
    "ShareGPT": Shape(files={"a.jsonl": jsonl(SHAREGPT)}, columns={"messages": "conversations"}),
    "ShareGPT in one list": Shape(
        files={"a.json": json.dumps(SHAREGPT).encode()}, columns={"messages": "conversations"}
    ),
    "OpenAI": Shape(files={"a.jsonl": jsonl(OPENAI)}, columns={"messages": "messages"}),
    "OpenAI with tools": Shape(
        files={"a.jsonl": jsonl([{**row, "tools": TOOLS} for row in OPENAI])}, columns={"messages": "messages"}
    ),
    "conversations of users": Shape(
        files={"a.jsonl": jsonl([{"user_id": i % 4, **row} for i, row in enumerate(OPENAI)])},
        columns={"messages": "messages", "client": "user_id"},
        clients=4,
    ),
    "turns as text in a table": Shape(
        files={"a.csv": table([{"chat": json.dumps(row["messages"])} for row in OPENAI]).encode()},
        columns={"messages": "chat"},
    ),
    # prompts and answers
    "Alpaca": Shape(files={"a.jsonl": jsonl(ALPACA)}, columns=ALPACA_COLUMNS),
    "Alpaca in one list": Shape(files={"a.json": json.dumps(ALPACA).encode()}, columns=ALPACA_COLUMNS),
    "Alpaca without inputs": Shape(
        files={"a.jsonl": jsonl([{**row, "input": ""} for row in ALPACA])},
        columns={"prompt": "instruction", "completion": "output"},
    ),
    "Dolly": Shape(
        files={
            "a.jsonl": jsonl(
                many(
                    lambda i: {
                        "instruction": f"Sum up text {i}",
                        "context": said(i) if i % 2 else "",
                        "response": f"answer {i}",
                        "category": ("open_qa", "summarization")[i % 2],
                    }
                )
            )
        },
        columns={"prompt": ["instruction", "context"], "completion": "response"},
    ),
    "question, context, answer": Shape(
        files={
            "a.jsonl": jsonl(
                many(lambda i: {"question": f"What is {i}?", "context": said(i), "answer": f"it is {i}", "id": i})
            )
        },
        columns={"prompt": ["context", "question"], "completion": "answer"},
    ),
    "a system's words": Shape(
        files={
            "a.jsonl": jsonl(
                many(lambda i: {"system_prompt": "Be short now.", "question": said(i), "response": f"answer {i}"})
            )
        },
        columns={"prompt": ["system_prompt", "question"], "completion": "response"},
    ),
    "documents and summaries": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"document": said(i) * 4, "summary": f"short text {i}"}))},
        columns={"prompt": "document", "completion": "summary"},
    ),
    "TRL prompt and completion": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"prompt": said(i), "completion": f"answer {i}"}))},
        columns={"prompt": "prompt", "completion": "completion"},
    ),
    "TRL prompt and completion as turns": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"prompt": [user(i)], "completion": [answer(i)]}))},
        columns={"messages": ["prompt", "completion"]},
    ),
    "TRL text": Shape(files={"a.jsonl": jsonl(ONLY)}, **TEXTS),
    "prompts of users": Shape(files={"a.jsonl": jsonl(CLIENTS)}, columns=OWN, clients=3),
    "preference pairs": Shape(
        files={"a.jsonl": jsonl(DPO)},
        task="prefer",
        columns={"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    ),
    "preference pairs, chosen alone": Shape(
        files={"a.jsonl": jsonl(DPO)},
        columns={"prompt": "prompt", "completion": "chosen"},
        flags={"prompt": ("prompt",), "completion": "chosen"},
    ),
    "preference pairs as turns": Shape(
        files={
            "a.jsonl": jsonl(
                many(lambda i: {"chosen": [user(i), answer(i)], "rejected": [user(i), answer(i + 1)]})
            )
        },
        task="prefer",
        columns={"chosen": "chosen", "rejected": "rejected"},
    ),
    "preference pairs as turns, chosen alone": Shape(
        files={"a.jsonl": jsonl(many(lambda i: {"chosen": [user(i), answer(i)], "rejected": [user(i), answer(0)]}))},
        columns={"messages": "chosen"},
        flags={"completion": "chosen"},
    ),
    # Parquet
    "Parquet": Shape(files={"a.parquet": parquet(LABELLED)}, **CLASSIFY),
    "Parquet of turns": Shape(files={"a.parquet": parquet(OPENAI)}, columns={"messages": "messages"}),
    "Parquet of bytes and dictionaries": Shape(
        files={
            "a.parquet": parquet(
                [{"text": row["text"].encode(), "label": row["label"]} for row in LABELLED],
                pa.schema([("text", pa.binary()), ("label", pa.dictionary(pa.int32(), pa.string()))]),
            )
        },
        **CLASSIFY,
    ),
    "Parquet with dates, lists and nothing": Shape(
        files={
            "a.parquet": parquet(
                [{**row, "when": i, "tags": ["a"], "none": None} for i, row in enumerate(LABELLED)],
                pa.schema(
                    [
                        *(("text", pa.string()), ("label", pa.string()), ("when", pa.date32())),
                        *(("tags", pa.list_(pa.string())), ("none", pa.null())),
                    ]
                ),
            )
        },
        **CLASSIFY,
    ),
    # folders
    "a file a client": Shape(
        files={f"{name}.jsonl": jsonl(ONLY[:8]) for name in ("ann", "bob", "eve")}, **TEXTS, clients=3
    ),
    "a folder a client": Shape(
        files={f"site{i}/{part}.csv": table(LABELLED[:4]).encode() for i in range(3) for part in ("train", "test")},
        **CLASSIFY,
        clients=3,
    ),
    "parts of nobody": Shape(
        files={"train.csv": table(LABELLED[:20]).encode(), "test.csv": table(LABELLED[20:]).encode()}, **CLASSIFY
    ),
    "one name, two endings": Shape(
        files={"a.jsonl": jsonl(LABELLED[:12]), "a.csv": table(LABELLED[12:]).encode()}, **CLASSIFY, clients=2
    ),
    "what systems leave behind": Shape(
        files={
            **{f"{name}.csv": table(LABELLED[:12]).encode() for name in ("ann", "bob")},
            "._ann.csv": b"\0\5\x16\7",
            ".ipynb_checkpoints/ann.csv": table(LABELLED).encode(),
            "__MACOSX/ann.csv": b"\0",
            "README.md": b"notes",
        },
        **CLASSIFY,
        clients=2,
    ),
    # what is refused
    "Excel": Shape(files={"a.xlsx": b"PK\x03\x04"}, refused="save it as CSV"),
    "no names at all": Shape(
        files={"a.csv": "".join(f"{said(i)},{'ab'[i % 2]}\n" for i in range(24)).replace(", and", "").encode()},
        refused="has no names of columns",
    ),
    "names twice": Shape(files={"a.csv": b"text,text\na b,c d\n"}, refused="two columns named 'text'"),
    "names alone": Shape(files={"a.csv": b"text,label\n"}, refused="has no rows"),
    "nothing": Shape(files={"a.csv": b""}, refused="has no rows"),
    "numbers alone": Shape(files={"a.csv": b"n,m\n1,2\n3,4\n"}, refused="has no column with text"),
    "ids alone": Shape(files={"a.csv": b"id,when\nx1,2024-01-01\nx2,2024-01-02\n"}, refused="has no column with text"),
}  # fmt: skip
